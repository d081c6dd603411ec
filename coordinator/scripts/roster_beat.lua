-- Say that a node lives, and learn who else does.
--
-- KEYS[1] nodes   sorted set   node id -> deadline (milliseconds, server clock)
-- ARGV[1] node    node id
-- ARGV[2] ttl_ms  integer > 0; 0: the node leaves
-- Returns the living nodes
--
-- I1 A node past its deadline is not returned, and is removed.
-- I2 It works when memory is full: removing comes first, and is never refused.

local t = redis.call("TIME")
local now = t[1] * 1000 + math.floor(t[2] / 1000)
redis.call("ZREMRANGEBYSCORE", KEYS[1], "-inf", "(" .. now)
if ARGV[2] == "0" then
  redis.call("ZREM", KEYS[1], ARGV[1])
else
  redis.call("ZADD", KEYS[1], now + ARGV[2], ARGV[1])
end
return redis.call("ZRANGE", KEYS[1], 0, -1)
