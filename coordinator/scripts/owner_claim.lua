-- Become, or stay, the owner of a shard's ordered work.
--
-- KEYS[1] own     hash   o owner, t its token, e epoch, u until (microseconds, server clock)
-- ARGV[1] owner   node id
-- ARGV[2] ttl_ms  integer > 0
-- ARGV[3] token   drawn at random by the process: two that share a node id differ in it
-- Returns {1, epoch} granted; {0, epoch, left_ms, owner} another owns it
--
-- I1 Each change of owner has a larger epoch than the one before, also when the record was lost.
-- I2 Asked again with the same token, the same epoch is returned, and the lease is renewed.
-- I3 It works when memory is full: the owners are those who empty the streams.

local t = redis.call("TIME")
local now = t[1] * 1000000 + t[2]
local known = redis.call("HMGET", KEYS[1], "o", "t", "e", "u")
local epoch, till = tonumber(known[3]) or 0, tonumber(known[4]) or 0
local ours = known[1] == ARGV[1] and known[2] == ARGV[3]
if not ours and till > now then
  return { 0, string.format("%.0f", epoch), math.ceil((till - now) / 1000), known[1] }
end
if not ours then epoch = math.max(epoch + 1, now) end
-- A first write that memory limits never refuse; none after it is refused either (I3).
redis.call("PERSIST", KEYS[1])
local e, u = string.format("%.0f", epoch), string.format("%.0f", now + ARGV[2] * 1000)
redis.call("HSET", KEYS[1], "o", ARGV[1], "t", ARGV[3], "e", e, "u", u)
return { 1, e }
