-- Take a lock, or wait for it in its queue: asked anew, it is a waiter's sign of life.
-- With _lock.lua.
--
-- KEYS[1] record    hash   the lock and its holders
-- KEYS[2] queue     zset   who waits, in order
-- KEYS[3] waiters   hash   what they wait for, and when they were heard of
-- KEYS[4] index     zset   locks of this shard that are held
-- KEYS[5] era       hash   which run of the server these locks are from
-- ARGV[1] nonce     drawn by the caller before sending
-- ARGV[2] kind      m, s or r: what it is used as
-- ARGV[3] capacity  integer > 0, unless it was set live
-- ARGV[4] weight    integer > 0
-- ARGV[5] lease_us  integer > 0
-- ARGV[6] mode      try: do not wait; wait; barge: pass by those who wait
-- ARGV[7] floor     largest token that the caller knows of this lock, or 0
-- ARGV[8] run       id of the run of this server, if known; else empty
-- ARGV[9] about     who and what for; one line
-- ARGV[10] name     of the lock
-- Returns token, or {1, token, handed}, granted; {0, left_us, holder, head, handed} it waits (head: it
--         is the first) or was refused, and in so long something ends; {-1, bound} the queue is full;
--         {-2, kind} it is in use as something else; {-3, bound} there are too many holders.
--         handed: nonces and tokens of others of the same process that got the lock by this call
--
-- I1 Asked again with the same nonce (the reply was lost), the same token is returned.
-- I2 Nobody is granted before those who wait, but by "barge".
-- I3 A refused try grants nothing and does not wait.

local nonce, floor = ARGV[1], tonumber(ARGV[7])
local time = redis.call("TIME")
local now, lease_us = time[1] * 1000000 + time[2], tonumber(ARGV[5])

-- What is asked for most, shorter: a lock that nobody holds or waits for. Each 32nd that is to be
-- in the index for longer goes the long way, on which names that are over leave the index.
local last = redis.call("HMGET", KEYS[1], "t", "k", "c", "f")
local unknown = not last[1] and redis.call("EXISTS", KEYS[1], KEYS[2]) == 0
if unknown or (last[2] == ARGV[2] and last[3] == ARGV[3] and not last[4]) then
  local era = redis.call("HMGET", KEYS[5], "rid", "grace", "max")
  local before = tonumber(last[1] or 0) or now
  local kept = now % 60000000 >= now - before
  if era[1] == ARGV[8] and (tonumber(era[2]) or now + 1) <= now and lease_us <= (tonumber(era[3]) or 0)
    and now > before and now > floor and (kept or now % 32 > 0) then
    local token = time[1] .. string.sub("00000" .. time[2], -6)
    local line = string.format("%s %s %.0f %s", ARGV[4], token, now + lease_us, token)
    redis.call("HSET", KEYS[1], "t", token, "f", "=", "h:" .. nonce, line, "a:" .. nonce, ARGV[9])
    if unknown then redis.call("HSET", KEYS[1], "k", ARGV[2], "c", ARGV[3]) end
    if not kept then
      redis.call("PEXPIRE", KEYS[1], 3600000)
      redis.pcall("ZADD", KEYS[4], string.format("%.0f", now - now % 60000000 + 120000000), ARGV[10])
    end
    return token
  end
end

-- Here _lock.lua.

local QUEUE_MAX, HOLDERS_MAX = 10000, 1000

local weight, mode = tonumber(ARGV[4]), ARGV[6]
local kind, capacity = ARGV[2], tonumber(ARGV[3])
local lock = load(KEYS[1], now)
local mine = lock.holders[nonce]
if mine then
  local weighs, token, _, since = string.match(mine.line, "^(%d+) (%d+) (%d+) (%d+)$")
  mine.ends = math.max(mine.ends, now + lease_us)
  local line = table.concat({ weighs, token, digits(mine.ends), since }, " ")
  redis.call("HSET", KEYS[1], "h:" .. nonce, line)
  settle(KEYS[1], KEYS[4], KEYS[2], lock, ARGV[10])
  return { 1, mine.token, {} }
end
local queued = redis.call("EXISTS", KEYS[2]) == 1
local in_use = lock.count > 0 or queued or lock.v
if lock.k and lock.k ~= kind and in_use then return { -2, lock.k } end
if lock.count >= HOLDERS_MAX then return { -3, HOLDERS_MAX } end
if not lock.v and (lock.k ~= kind or lock.c ~= capacity) then
  lock.k, lock.c, lock.changed = kind, capacity, true
end
lock.t = math.max(lock.t, floor)

local grace, longest = grace_of(KEYS[5], now, ARGV[8])
local longer = lease_us > longest
local head
if queued then head = first_alive(KEYS[2], KEYS[3], now) end
if grace <= now and fits(lock, weight) and (not head or head == nonce or mode == "barge") then
  local token, handed = math.max(lock.t + 1, now), {}
  hold(KEYS[1], lock, nonce, weight, token, now + lease_us, now, ARGV[9])
  if head then
    redis.call("ZREM", KEYS[2], nonce)
    redis.call("HDEL", KEYS[3], nonce)
    handed = admit(KEYS[1], KEYS[2], KEYS[3], lock, now, process_of(nonce))
  end
  if longer then redis.call("HSET", KEYS[5], "max", digits(lease_us)) end
  settle(KEYS[1], KEYS[4], KEYS[2], lock, ARGV[10])
  return { 1, lock.holders[nonce].token, handed }
end

local handed = {}
if mode ~= "try" then
  if not redis.call("ZSCORE", KEYS[2], nonce) then
    if redis.call("ZCARD", KEYS[2]) >= QUEUE_MAX then return { -1, QUEUE_MAX } end
    local last = redis.call("ZREVRANGE", KEYS[2], 0, 0, "WITHSCORES")
    redis.call("ZADD", KEYS[2], digits(math.max((tonumber(last[2]) or 0) + 1, now)), nonce)
  end
  redis.call("HSET", KEYS[3], nonce, string.format("%.0f %.0f %.0f %s", now, weight, lease_us, ARGV[9]))
  if longer then redis.call("HSET", KEYS[5], "max", digits(lease_us)) end
  if lock.f ~= "" and redis.call("EXISTS", KEYS[1]) == 1 then redis.call("HSET", KEYS[1], "f", "") end
  redis.call("PEXPIRE", KEYS[2], KEEP_MS)
  redis.call("PEXPIRE", KEYS[3], KEEP_MS)
  if grace <= now then
    handed = admit(KEYS[1], KEYS[2], KEYS[3], lock, now, process_of(nonce))
    if lock.given or #lock.ended > 0 then settle(KEYS[1], KEYS[4], KEYS[2], lock, ARGV[10]) end
  end
  head = redis.call("ZRANGE", KEYS[2], 0, 0)[1]
end
mine = lock.holders[nonce]
if mine then return { 1, mine.token, handed } end
local ends, holder = math.max(grace, soonest(lock) or 0), next(lock.holders)
local left_us = math.max(ends - now, 0)
return { 0, digits(left_us), holder and lock.about[holder] or "", head == nonce and 1 or 0, handed }
