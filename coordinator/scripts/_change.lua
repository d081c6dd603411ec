-- Put before every script whose header says "With _change.lua.": what all changes share.
--
-- C1 A version is never given twice in a shard: max(previous + 1, server clock in microseconds).
-- C2 Log ids are dense, <epoch>-0, -1, -2 ...; a log that was lost starts a later epoch. A
--    head that was lost is made anew from the end of the log.
-- C3 XADD is the first write of a change: where it is refused (out of memory), nothing
--    happened; where it is not, the server refuses none of the writes that follow.
-- C4 A tag's value is its version; after a soft bump "<version> <hard version>": what carries
--    less than the hard version is invalid, what carries less than the version is stale.
--
-- C5 A shard keeps the newest ingress mark that took effect (i in its head). A mark is text of one
--    length, "<generation>-<ms>-<seq>-<place>"; one that is not later is a repetition. What is
--    no mark repeats nothing.
--
-- An entry begins: magic 3, state 1, version 16, soft_at 13, hard_at 13, pending 16 (digits).

local function server_us()
  local t = redis.call("TIME")
  return t[1] * 1000000 + t[2]
end

local function next_change(head, log)
  local known = redis.call("HMGET", head, "e", "v")
  local epoch, newest, now = tonumber(known[1]), tonumber(known[2]) or 0, server_us()
  if not epoch then
    local last = redis.call("XREVRANGE", log, "+", "-", "COUNT", 1)[1]
    if last then
      epoch = tonumber(string.match(last[1], "^%d+"))
      newest = math.max(newest, tonumber(last[2][2]) or 0)
    end
  end
  if not epoch or redis.call("EXISTS", log) == 0 then
    epoch = math.max(now, (epoch or 0) + 1)
  end
  return { epoch = epoch, version = math.max(newest + 1, now), now = now }
end

local function announce(change, head, log, bell, shard, notice)
  local version = string.format("%.0f", change.version)
  local epoch = string.format("%.0f", change.epoch)
  local id = redis.call("XADD", log, epoch .. "-*", "v", version, "n", notice)
  redis.call("HSET", head, "e", epoch, "v", version)
  local seq = string.sub(id, #epoch + 2)
  redis.call("PUBLISH", bell, shard .. " " .. epoch .. " " .. seq .. " " .. version .. " " .. notice)
  return id
end

local function is_repetition(head, mark)
  if mark == "" then return false end
  local newest = redis.call("HGET", head, "i")
  if not newest or #newest ~= #mark or not string.match(newest, "^[%d-]+$") then return false end
  local generation = tonumber(string.match(newest, "^%d+"))
  return mark <= newest and generation and generation < 2 ^ 52
end

local function lifetimes(now, soft_ms, hard_ms)
  local now_ms = math.floor(now / 1000)
  return now_ms + soft_ms, now_ms + hard_ms
end

local function envelope(version, soft_at, hard_at, pending, tail)
  return string.format("\251E1c%016.0f%013.0f%013.0f%016.0f", version, soft_at, hard_at, pending) .. tail
end

-- The numbers of an entry; empty if there is none, or something that is no string.
local function numbers_of(key)
  local found = redis.pcall("GETRANGE", key, 0, 61)
  return type(found) == "string" and found or ""
end

local function version_of(numbers)
  if not numbers or numbers == "" then return -1 end
  if string.sub(numbers, 1, 3) ~= "\251E1" then return 0 end
  return tonumber(string.sub(numbers, 5, 20)) or 0
end

local function pending_of(numbers)
  if not numbers or string.sub(numbers, 1, 3) ~= "\251E1" then return 0 end
  return tonumber(string.sub(numbers, 47, 62)) or 0
end

local function tag_versions(value)
  local version, hard = string.match(value, "^(%d+) ?(%d*)$")
  return version, hard ~= "" and hard or version
end

local function bump_tag(tag, version, soft, keep_ms)
  local known = soft and redis.call("GET", tag)
  local value = version
  if known then
    local _, hard = tag_versions(known)
    value = version .. " " .. (hard or version)
  end
  redis.call("SET", tag, value, "PX", keep_ms)
end

-- Whatever depends on a key carries a tag named after it; where there is no such tag, nothing does
-- yet: whoever makes it later finds in the head (o) whether a key of the shard changed meanwhile.
local function outdate_dependents(head, named_after, version, soft, keep_ms)
  redis.call("HSET", head, "o", version)
  if redis.call("EXISTS", named_after) == 1 then bump_tag(named_after, version, soft, keep_ms) end
end
