-- Say that a member lives, judge those that are silent, and tell what has changed.
-- With _numbers.lua.
--
-- KEYS[1] beats    sorted set   member -> its last beat (milliseconds, server clock)
-- KEYS[2] members  hash         member -> "version state beat_ms grace_ms profile";
--                               "" -> "version floor last": of the whole, and its last beat of all
-- ARGV[1] member   node id
-- ARGV[2] state    active, leaving, away (back soon), gone (leaves for good)
-- ARGV[3] beat_ms  integer > 0: how often this member beats
-- ARGV[4] grace_ms for how long its place is kept when it is silent; 0: not at all
-- ARGV[5] profile  what others want to know of it
-- ARGV[6] version  of the roster that the caller knows; 0: none
-- Returns {version, whole, member, record, ...}: members changed since; with whole = 1, all
--
-- I1 A member is suspect when it missed three of its own beats. After five it is away, if
--    it has a grace, and gone when that is over since its last beat; without a grace, gone.
-- I2 Versions only grow; a caller that missed a removal, or knows a roster that was lost, is
--    told the whole.
-- I3 Nobody is judged by a time in which nobody beat at all, be it that the server was away or
--    that its clock was set: each has two beats to be heard again.
-- I4 It works when memory is full.
-- I5 An unreadable record is not returned to members, and is deleted when its member is silent.

local KEEP_GONE_MS, BEAT_MAX = 60000, 600000
local t = redis.call("TIME")
local us = t[1] * 1000000 + t[2]
local now = math.floor(us / 1000)
-- A first write that memory limits never refuse; none after it is refused either (I4).
redis.call("PERSIST", KEYS[1])
local head = redis.call("HGET", KEYS[2], "")
local version, floor, last = string.match(head or "", "^(%d+) (%d+) (%d+)$")
version, floor, last = whole_number(version) or us, whole_number(floor) or us, whole_number(last) or now
local function number(value) return string.format("%.0f", value) end

local function parts(member)
  local record = redis.call("HGET", KEYS[2], member) or ""
  local v, state, beat, grace, profile = string.match(record, "^(%d+) (%a+) (%d+) (%d+) (.*)$")
  v, beat, grace = whole_number(v), whole_number(beat), whole_number(grace)
  if not (v and beat and grace) or beat > BEAT_MAX then return v end
  return v, state, beat, grace, profile
end

local function put(member, rest)
  version = math.max(version + 1, us)
  redis.call("HSET", KEYS[2], member, number(version) .. " " .. rest)
end

local quiet = 3 * ARGV[3]
if now < last or now - last >= quiet then
  local all = redis.call("ZRANGE", KEYS[1], 0, -1, "WITHSCORES")
  for i = 1, #all, 2 do
    local _, state, beat = parts(all[i])
    if state and state ~= "gone" then
      local heard = math.min(now, math.max(tonumber(all[i + 1]), now - 3 * beat))
      redis.call("ZADD", KEYS[1], number(heard), all[i])
    end
  end
end

local silent = redis.call(
  "ZRANGEBYSCORE", KEYS[1], "-inf", number(now - quiet), "WITHSCORES", "LIMIT", 0, 1000)
for i = 1, #silent, 2 do
  local member, for_ms = silent[i], now - tonumber(silent[i + 1])
  local v, state, beat, grace, profile = parts(member)
  local judged = state
  if not state or (state == "gone" and for_ms >= KEEP_GONE_MS) then
    redis.call("ZREM", KEYS[1], member)
    redis.call("HDEL", KEYS[2], member)
    floor, judged = math.max(floor, v or 0), nil
  elseif state == "away" then
    judged = for_ms < grace and "away" or "gone"
  elseif for_ms >= 5 * beat and state ~= "gone" then
    judged = state ~= "leaving" and for_ms < grace and "away" or "gone"
  elseif for_ms >= 3 * beat and state == "active" then
    judged = "suspect"
  end
  if judged and judged ~= state then
    put(member, judged .. " " .. beat .. " " .. grace .. " " .. profile)
  end
end

local _, state, beat, grace, profile = parts(ARGV[1])
local changed = state ~= ARGV[2] or beat ~= tonumber(ARGV[3]) or grace ~= tonumber(ARGV[4])
if changed or profile ~= ARGV[5] then
  put(ARGV[1], ARGV[2] .. " " .. ARGV[3] .. " " .. ARGV[4] .. " " .. ARGV[5])
end
redis.call("ZADD", KEYS[1], number(now), ARGV[1])
redis.call("HSET", KEYS[2], "", number(version) .. " " .. number(floor) .. " " .. number(now))

local known = tonumber(ARGV[6])
local whole = known < floor or known > version
local reply = { number(version), whole and 1 or 0 }
if known == version then return reply end
local all = redis.call("HGETALL", KEYS[2])
for i = 1, #all, 2 do
  local v = whole_number(string.match(all[i + 1], "^(%d+) %a"))
  if v and (whole or v > known) then
    reply[#reply + 1] = all[i]
    reply[#reply + 1] = all[i + 1]
  end
end
return reply
