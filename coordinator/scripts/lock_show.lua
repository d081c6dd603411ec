-- Who holds a lock since when, and who waits for it.
-- With _lock.lua.
--
-- KEYS[1] record   hash   the lock and its holders
-- KEYS[2] queue    zset   who waits, in order
-- KEYS[3] waiters  hash   what they wait for
-- ARGV[1] bound    how many holders and waiters are told at most
-- Returns {now_us, kind, capacity, live, token, {nonce, line, about, ...}, {nonce, ticket, line, ...}, waiting}
--
-- I1 Nothing is written.

local now = server_us()
local lock = load(KEYS[1], now)
local bound, holders, shown = tonumber(ARGV[1]), {}, {}
for nonce, each in pairs(lock.holders) do
  if #holders < 3 * bound then
    holders[#holders + 1] = nonce
    holders[#holders + 1] = each.line
    holders[#holders + 1] = lock.about[nonce] or ""
  end
end
local waiting = redis.call("ZRANGE", KEYS[2], 0, bound - 1, "WITHSCORES")
for i = 1, #waiting, 2 do
  shown[#shown + 1] = waiting[i]
  shown[#shown + 1] = waiting[i + 1]
  shown[#shown + 1] = redis.call("HGET", KEYS[3], waiting[i]) or ""
end
local count = redis.call("ZCARD", KEYS[2])
return { digits(now), lock.k or "", digits(lock.c), lock.v and 1 or 0, digits(lock.t), holders, shown, count }
