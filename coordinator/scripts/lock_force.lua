-- Take a lock from its holders, and tell them; the next token is higher than all of theirs.
-- With _lock.lua.
--
-- KEYS[1] record   hash   the lock and its holders
-- KEYS[2] queue    zset   who waits, in order
-- KEYS[3] waiters  hash   what they wait for
-- KEYS[4] index    zset   locks of this shard that are held
-- KEYS[5] era      hash   which run of the server these locks are from
-- ARGV[1] name     of the lock
-- Returns {count, token} of the holders it was taken from, and the last token now
--
-- I1 A lock that nobody holds is left as it is.
-- I2 Who waits keeps its place, and may have it from then on.

local now = server_us()
local lock = load(KEYS[1], now)
local count = lock.count
if count == 0 then return { 0, digits(lock.t) } end
local nonces = {}
for nonce in pairs(lock.holders) do
  nonces[#nonces + 1] = nonce
end
for _, nonce in ipairs(nonces) do
  drop(KEYS[1], lock, nonce)
  redis.call("PUBLISH", wake_of(KEYS[1], process_of(nonce)), "x " .. nonce)
end
lock.t = math.max(lock.t + 1, now)
redis.call("HSET", KEYS[1], "t", digits(lock.t))
if grace_of(KEYS[5], now) <= now then
  admit(KEYS[1], KEYS[2], KEYS[3], lock, now, "")
end
settle(KEYS[1], KEYS[4], KEYS[2], lock, ARGV[1])
return { count, digits(lock.t) }
