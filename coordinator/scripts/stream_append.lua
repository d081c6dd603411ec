-- Keep an entry that leaves another stream: a dead letter, or an event to be applied later.
--
-- KEYS[1] stream  stream
-- ARGV[1] id      of the entry, or *
-- ARGV[2] bound   about so many of the newest entries stay; 0: all
-- ARGV[3..] fields and values, by turns
-- Returns {1, entries dropped}; {0} the stream has an entry of that id
--
-- I1 It works when memory is full: an entry kept here is deleted there.
-- I2 An id that is not larger than those before it is replaced by one that is.

if ARGV[1] ~= "*" and #redis.call("XRANGE", KEYS[1], ARGV[1], ARGV[1]) > 0 then return { 0 } end
-- A first write that memory limits never refuse; none after it is refused either (I1).
redis.call("PERSIST", KEYS[1])
local added = redis.pcall("XADD", KEYS[1], ARGV[1], unpack(ARGV, 3))
if type(added) ~= "string" then redis.call("XADD", KEYS[1], "*", unpack(ARGV, 3)) end
if ARGV[2] == "0" then return { 1, 0 } end
return { 1, redis.call("XTRIM", KEYS[1], "MAXLEN", "~", ARGV[2]) }
