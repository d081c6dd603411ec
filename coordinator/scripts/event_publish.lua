-- Put events into the ingress stream, all or none.
--
-- KEYS[1] events  stream
-- ARGV[1] bound   of the stream
-- ARGV[2..] events, JSON
-- Returns the ids; {0, length} as one integer pair when the stream is full
--
-- I1 A full stream refuses; it is never trimmed to make room.

local length = redis.call("XLEN", KEYS[1])
if length + #ARGV - 1 > tonumber(ARGV[1]) then return { 0, length } end
local ids = {}
for i = 2, #ARGV do
  ids[#ids + 1] = redis.call("XADD", KEYS[1], "*", "event", ARGV[i])
end
return ids
