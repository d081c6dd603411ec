-- Become, or stay, the owner of a shard's ordered work.
--
-- KEYS[1] own     hash   o owner, e epoch, u until (microseconds, server clock)
-- ARGV[1] owner   node id
-- ARGV[2] ttl_ms  integer > 0
-- Returns {1, epoch} granted; {0, epoch, left_ms, owner} another owns it
--
-- I1 Each change of owner has a larger epoch than the one before, also when the record was lost.
-- I2 Asked again by the owner, the same epoch is returned, and the lease is renewed.

local t = redis.call("TIME")
local now = t[1] * 1000000 + t[2]
local known = redis.call("HMGET", KEYS[1], "o", "e", "u")
local epoch, till = tonumber(known[2]) or 0, tonumber(known[3]) or 0
if known[1] ~= ARGV[1] and till > now then
  return { 0, string.format("%.0f", epoch), math.ceil((till - now) / 1000), known[1] }
end
if known[1] ~= ARGV[1] then epoch = math.max(epoch + 1, now) end
till = now + ARGV[2] * 1000
redis.call("HSET", KEYS[1], "o", ARGV[1], "e", string.format("%.0f", epoch), "u", string.format("%.0f", till))
return { 1, string.format("%.0f", epoch) }
