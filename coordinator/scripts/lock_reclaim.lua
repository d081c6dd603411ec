-- Put back a lease that a failover or restart has lost, while the new era is in its grace.
-- With _lock.lua.
--
-- KEYS[1] record    hash   the lock and its holders
-- KEYS[2] index     zset   locks of this shard that are held
-- KEYS[3] era       hash   which run of the server these locks are from
-- KEYS[4] queue     zset   who waits, in order
-- ARGV[1] name      of the lock
-- ARGV[2] nonce     of the lease
-- ARGV[3] kind      m, s or r
-- ARGV[4] capacity  integer > 0, unless it was set live
-- ARGV[5] weight    integer > 0
-- ARGV[6] token     as it was granted
-- ARGV[7] left_us   what was left of it when this was sent
-- ARGV[8] about     who and what for; one line
-- Returns {1, now_us} it is held again; {0, now_us} it is lost
--
-- I1 It ends when it would have ended, never later.
-- I2 The higher token wins: a lock that takes no second holder is not given back to an older one,
--    and taken from it when the younger comes.
-- I3 When the grace is over, nothing is put back.
-- I4 It works when memory is full: the lease was granted before.

local nonce, weight, token = ARGV[2], tonumber(ARGV[5]), tonumber(ARGV[6])
local now = server_us()
-- A first write that memory limits never refuse; none after it is refused either (I4).
redis.call("PERSIST", KEYS[3])
local grace = grace_of(KEYS[3], now)
local lock = load(KEYS[1], now)
if lock.holders[nonce] then return { 1, digits(now) } end
if not lock.v then lock.c = tonumber(ARGV[4]) end
local alone = weight >= lock.c
if grace <= now or (alone and lock.t > token) then return { 0, digits(now) } end
local older = {}
for each, held in pairs(lock.holders) do
  if tonumber(held.token) < token and not fits(lock, weight) then older[#older + 1] = each end
end
if not alone and not fits(lock, weight) then return { 0, digits(now) } end
for _, each in ipairs(older) do
  drop(KEYS[1], lock, each)
end
lock.k, lock.changed = ARGV[3], true
hold(KEYS[1], lock, nonce, weight, token, now + ARGV[7], now, ARGV[8])
settle(KEYS[1], KEYS[2], KEYS[4], lock, ARGV[1])
return { 1, digits(now) }
