-- Set the capacity of a semaphore while it is in use; what its users declare counts no more.
-- With _lock.lua.
--
-- KEYS[1] record    hash   the lock and its holders
-- KEYS[2] queue     zset   who waits, in order
-- KEYS[3] waiters   hash   what they wait for
-- KEYS[4] index     zset   locks of this shard that are held
-- KEYS[5] era       hash   which run of the server these locks are from
-- ARGV[1] name      of the lock
-- ARGV[2] capacity  integer > 0; 0: as its users declare again
-- ARGV[3] declared  what this user declares
-- Returns {1, capacity, used}; {0, kind} it is in use as something else
--
-- I1 Nothing is taken from those who hold. Lowered under them, it admits nobody until they fit.
-- I2 Raised, it admits at once those who waited for room.

local now = server_us()
local lock = load(KEYS[1], now)
if lock.k and lock.k ~= "s" then return { 0, lock.k } end
lock.k, lock.changed = "s", true
local live = ARGV[2] ~= "0"
lock.c = tonumber(live and ARGV[2] or ARGV[3])
lock.v = live and tostring((tonumber(lock.v) or 0) + 1) or nil
redis.call("HSET", KEYS[1], "k", "s", "c", digits(lock.c))
if live then
  redis.call("HSET", KEYS[1], "v", lock.v)
  redis.call("PERSIST", KEYS[1])
else
  redis.call("HDEL", KEYS[1], "v")
  redis.call("PEXPIRE", KEYS[1], KEEP_MS)
end
if grace_of(KEYS[5], now) <= now then
  admit(KEYS[1], KEYS[2], KEYS[3], lock, now, "")
end
settle(KEYS[1], KEYS[4], KEYS[2], lock, ARGV[1])
return { 1, digits(lock.c), digits(lock.used) }
