-- Renew leases of one shard, all at once.
-- With _lock.lua.
--
-- KEYS[1] era      hash   which run of the server these locks are from
-- KEYS[2] index    zset   locks of this shard that are held
-- KEYS[3..] records  hash   the locks, one for each lease
-- ARGV[1..] leases  name, nonce, token and lease_us of each
-- Returns {now_us, status, ...}: 1 renewed, 0 not held any more, 2 unknown in a new era: reclaim it
--
-- I1 A lease that has ended, or was given to another, is not renewed.
-- I2 It works when memory is full, also in a new era.
-- I3 Done again, a renewal has no further effect but time.
-- I4 A record of another type holds nothing; others are renewed.

local now = server_us()
-- A first write that memory limits never refuse; none after it is refused either (I2).
redis.call("PERSIST", KEYS[1])
local grace = grace_of(KEYS[1], now)
local answer = { digits(now) }
for i = 3, #KEYS do
  local at = 1 + (i - 3) * 4
  local name, nonce, wanted, lease_us = ARGV[at], ARGV[at + 1], ARGV[at + 2], tonumber(ARGV[at + 3])
  local line = redis.pcall("HGET", KEYS[i], "h:" .. nonce) or ""
  if type(line) ~= "string" then line = "" end -- the record of another type
  local weight, token, ends, rest = string.match(line, "^(%d+) (%d+) (%d+) (.*)$")
  if token == wanted and (whole_number(ends) or 0) > now then
    local until_us = digits(math.max(tonumber(ends), now + lease_us))
    redis.call("PEXPIRE", KEYS[i], KEEP_MS)
    redis.call("HSET", KEYS[i], "h:" .. nonce, table.concat({ weight, token, until_us, rest }, " "))
    redis.pcall("ZADD", KEYS[2], "GT", until_us, name)
    answer[#answer + 1] = 1
  else
    answer[#answer + 1] = grace > now and 2 or 0
  end
end
return answer
