-- Take one of a number of slots for a while, or keep it.
--
-- KEYS[1] slots      sorted set, expires   nonce -> until (microseconds, server clock)
-- ARGV[1] nonce      the caller's, drawn before it asks
-- ARGV[2] lease_ms   integer > 0
-- ARGV[3] capacity   slots in all
-- ARGV[4] renew      1: only if it is held already
-- Returns {1, slots in use} held; {0, slots in use, microseconds until the first may be free}
--
-- I1 Never more than capacity slots are held, of those that have not expired.
-- I2 Asked again with the same nonce, the same slot is kept.
-- I3 What is refused takes nothing from anybody.

local t = redis.call("TIME")
local now = t[1] * 1000000 + t[2]
local lease_ms = tonumber(ARGV[2])
redis.call("ZREMRANGEBYSCORE", KEYS[1], "-inf", string.format("%.0f", now))
local used = redis.call("ZCARD", KEYS[1])
if not redis.call("ZSCORE", KEYS[1], ARGV[1]) then
  if ARGV[4] == "1" then return { 0, used, 0 } end
  if used >= tonumber(ARGV[3]) then
    local soonest = redis.call("ZRANGE", KEYS[1], 0, 0, "WITHSCORES")
    return { 0, used, tonumber(soonest[2]) - now }
  end
  used = used + 1
end
redis.call("ZADD", KEYS[1], string.format("%.0f", now + lease_ms * 1000), ARGV[1])
redis.call("PEXPIRE", KEYS[1], math.max(redis.call("PTTL", KEYS[1]), lease_ms + 1000))
return { 1, used }
