-- Let a shard mark what changes, so that entries of another service can be brought over safely.
-- With _change.lua.
--
-- KEYS[1] head      hash     until when (l, in milliseconds; negative: nothing is brought over), newest
--   version that outdated anything (o)
-- ARGV[1] until_ms  marks are kept until then, on the server's clock
-- Returns {until_ms, late}; until_ms is negative where there were too many marks, and late is 1 if
--   keys of the shard were invalidated or written before marks began
--
-- I1 The time never moves back. A shard that had too many marks stays closed until then.
-- I2 It works when memory is full: a node that starts needs it.

local wanted = tonumber(ARGV[1])
local known = redis.call("HMGET", KEYS[1], "l", "o")
local before = legacy_until(known[1])
local now_ms = math.floor(server_us() / 1000)
local late = (before == 0 and known[2]) and 1 or 0
local chosen = math.max(before, wanted)
if before < 0 and -before > now_ms then chosen = -math.max(-before, wanted) end
-- A first write that memory limits never refuse; none after it is refused either (I2).
redis.call("PERSIST", KEYS[1])
redis.call("HSET", KEYS[1], "l", string.format("%.0f", chosen))
return { string.format("%.0f", chosen), late }
