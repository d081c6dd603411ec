-- Give a lock back, or leave its queue; whoever waits first has it from then on.
-- With _lock.lua.
--
-- KEYS[1] record   hash   the lock and its holders
-- KEYS[2] queue    zset   who waits, in order
-- KEYS[3] waiters  hash   what they wait for
-- KEYS[4] index    zset   locks of this shard that are held
-- KEYS[5] era      hash   which run of the server these locks are from
-- ARGV[1] nonce    whose lease or place in the queue it is
-- ARGV[2] run      id of the run of this server, if known; else empty
-- ARGV[3] name     of the lock
-- Returns 1, or {1, handed}, released, or left the queue; {2, {}} it was the last to be released, before;
--         {0, {}} it is neither. handed: nonces and tokens of the same process that have it now
--
-- I1 Who neither holds nor waits changes nothing.
-- I2 Released twice, the second time has no effect.
-- I3 Its first write only frees memory: a server whose memory is full still releases.
-- I4 The lock goes to the first who waits in this very step: nobody can come between.

local nonce = ARGV[1]
local time = redis.call("TIME")
local now = time[1] * 1000000 + time[2]

-- What is asked for most, shorter: its only holder, and nobody who waits.
local held = redis.call("HMGET", KEYS[1], "f", "h:" .. nonce)
local ends = held[1] == "=" and held[2] and tonumber(string.match(held[2], "^%d+ %d+ (%d+) %d+$"))
if ends and ends > now then
  redis.call("HDEL", KEYS[1], "f", "h:" .. nonce, "a:" .. nonce)
  redis.call("HSET", KEYS[1], "r", nonce)
  return 1
end

-- Here _lock.lua.

local lock = load(KEYS[1], now)
if lock.holders[nonce] then
  drop(KEYS[1], lock, nonce)
  redis.call("HSET", KEYS[1], "r", nonce)
elseif redis.call("ZREM", KEYS[2], nonce) == 1 then
  redis.call("HDEL", KEYS[3], nonce)
else
  return { lock.r == nonce and 2 or 0, {} }
end
local handed = {}
if redis.call("EXISTS", KEYS[2]) == 1 and grace_of(KEYS[5], now, ARGV[2]) <= now then
  handed = admit(KEYS[1], KEYS[2], KEYS[3], lock, now, process_of(nonce))
end
settle(KEYS[1], KEYS[4], KEYS[2], lock, ARGV[3])
return { 1, handed }
