-- Delete a value, unless a higher token has been here.
-- With _numbers.lua.
--
-- KEYS[1] value  any type  what is guarded
-- KEYS[2] fence  string    the highest token seen
-- ARGV[1] token  of the lease under which it is deleted
-- Returns {1, count} deleted, so many; {0, highest} refused
--
-- I1 The highest token never sinks, and stays when the value goes.
-- I2 It works when memory is full: its first write frees memory.

local highest = redis.call("GET", KEYS[2])
if highest and (whole_number(highest) or WHOLE_MAX) > tonumber(ARGV[1]) then return { 0, highest } end
local count = redis.call("DEL", KEYS[1])
redis.call("SET", KEYS[2], ARGV[1])
return { 1, count }
