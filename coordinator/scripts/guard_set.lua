-- Set a value, unless a higher token has been here.
-- With _numbers.lua.
--
-- KEYS[1] value   string   what is guarded
-- KEYS[2] fence   string   the highest token seen
-- ARGV[1] token   of the lease under which it is set
-- ARGV[2] value   bytes
-- ARGV[3] ttl_ms  0: it does not expire
-- Returns {1, token} set; {0, highest} refused
--
-- I1 The highest token never sinks, and no value is set under a lower one.
-- I2 The same token may set again.

local highest = redis.call("GET", KEYS[2])
if highest and (whole_number(highest) or WHOLE_MAX) > tonumber(ARGV[1]) then return { 0, highest } end
redis.call("SET", KEYS[2], ARGV[1])
if ARGV[3] == "0" then
  redis.call("SET", KEYS[1], ARGV[2])
else
  redis.call("SET", KEYS[1], ARGV[2], "PX", ARGV[3])
end
return { 1, ARGV[1] }
