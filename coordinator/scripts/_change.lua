-- Put before every script whose header says "With _change.lua.": what all changes share.
-- With _numbers.lua.
--
-- C1 A version is never given twice in a shard: max(previous + 1, server clock in microseconds).
-- C2 Log ids are dense, <epoch>-0, -1, -2 ...; a log that was lost starts a later epoch. A
--    head that was lost is made again from the end of the log. An id in the log that is ahead of the
--    epoch, or the last of all, starts a later epoch, too.
-- C3 The append to the log is the first write of a change: where it is refused (out of memory),
--    nothing happened; where it is not, the server refuses none of the writes that follow.
-- C4 A tag's value is its version; after a soft bump "<version> <hard version>": what carries
--    less than the hard version is invalid, what carries less than the version is stale.
--    Any other value is treated as lost.
-- C5 The head (c) names each cache version of which the shard stores entries, so a script that
--    outdates a key reaches its entries of all versions. Their names are the only ones that
--    scripts make: of a declared entry, in its slot.
-- C6 A shard keeps the newest ingress mark that took effect (i in its head). A mark is text of one
--    length, "<generation>-<ms>-<seq>-<place>"; one that is not later is a repetition. Any other
--    text repeats nothing.
-- C7 A change that must work when memory is full (at_full) first cuts the log to its newest 100
--    notices, so its growth is bounded. Followers that are further behind read the shard again.
-- C8 While entries of another service may be brought over (l in the head: until when, in ms), a change marks
--    its keys and tags in a set beside the head. Nothing is brought over for a key with a mark, or with a
--    tag that has one. At most LEGACY_MARKS_MAX marks are kept: beyond that, the shard brings nothing over
--    (l becomes negative). After that time the set and l are deleted.
-- C9 An invalidation (always) takes effect also where head or log is of another type: what these
--    keep is lost, as if they were deleted. Other changes are refused before they write anything.
--
-- An entry begins: magic 3, state 1, version 16, soft_at 13, hard_at 13, pending 16 (digits).

local function server_us()
  local t = redis.call("TIME")
  return t[1] * 1000000 + t[2]
end

local function is_wrong_type(reply)
  return type(reply) == "table" and string.find(tostring(reply.err), "WRONGTYPE", 1, true) ~= nil
end

-- A reply of redis.pcall; empty where the key is of another type, and that is no reason to refuse.
local function accepted(always, reply)
  if always and is_wrong_type(reply) then return {} end
  if type(reply) == "table" and reply.err then error(reply) end
  return reply
end

-- The l of a head, in milliseconds: until when changes are marked; negative: too many were.
local function legacy_until(text)
  local sign, digits = string.match(text or "", "^(-?)(%d+)$")
  local ms = whole_number(digits) or 0
  return sign == "-" and -ms or ms
end

local function next_change(head, log, always)
  local known = accepted(always, redis.pcall("HMGET", head, "e", "v", "c", "l"))
  local epoch, newest, now = whole_number(known[1]), whole_number(known[2]) or 0, server_us()
  if not epoch then
    local last = accepted(always, redis.pcall("XREVRANGE", log, "+", "-", "COUNT", 1))[1]
    if last then
      epoch = whole_number(string.match(last[1], "^%d+"))
      newest = math.max(newest, whole_number(last[2][2]) or 0)
    end
  end
  if not epoch or redis.call("EXISTS", log) == 0 then
    epoch = math.max(now, (epoch or 0) + 1)
  end
  return {
    epoch = epoch,
    version = math.max(newest + 1, now),
    now = now,
    labels = known[3] or "",
    legacy_until_ms = legacy_until(known[4]),
  }
end

-- The id that a log has given last, also if its entry is gone.
local function last_id(log)
  local facts = redis.call("XINFO", "STREAM", log)
  for i = 1, #facts, 2 do
    if facts[i] == "last-generated-id" then return facts[i + 1] end
  end
end

-- The epoch to go on with where the log refused the change for the id: one that is past any id of
-- an entry that was not made by these scripts. A log whose ids no epoch can exceed starts over.
local function epoch_past(change, log, refused)
  local for_the_id = string.find(refused, "smaller", 1, true) or string.find(refused, "exhausted", 1, true)
  if not for_the_id then return change.epoch end
  local ahead = whole_number(string.match(last_id(log), "^%d+"))
  if not ahead then redis.call("DEL", log) end
  return math.max(change.now, change.epoch, (ahead or 0)) + 1
end

local LOG_AT_FULL_MAX = 100

local function append(log, change, version, notice, at_full, always)
  local function try(call)
    local id = string.format("%.0f-*", change.epoch)
    return call("XADD", log, id, "v", version, "n", notice)
  end
  local added = try(redis.pcall)
  if type(added) == "string" then return added end
  if always and is_wrong_type(added) then return nil end
  -- A first write that memory limits never refuse; none after it is refused either (C7).
  if at_full then
    redis.call("XTRIM", log, "MAXLEN", LOG_AT_FULL_MAX)
    added = try(redis.pcall)
    if type(added) == "string" then return added end
  end
  change.epoch = epoch_past(change, log, tostring(type(added) == "table" and added.err))
  return try(redis.call)
end

local function announce(change, head, log, bell, shard, notice, at_full, always)
  local version = string.format("%.0f", change.version)
  local id = append(log, change, version, notice, at_full, always)
  local epoch = string.format("%.0f", change.epoch)
  accepted(always, redis.pcall("HSET", head, "e", epoch, "v", version))
  if not id then return nil end
  local seq = string.sub(id, #epoch + 2)
  redis.call("PUBLISH", bell, shard .. " " .. epoch .. " " .. seq .. " " .. version .. " " .. notice)
  return id
end

local function is_repetition(head, mark)
  if mark == "" then return false end
  local newest = redis.pcall("HGET", head, "i")
  if type(newest) ~= "string" or #newest ~= #mark or not string.match(newest, "^[%d-]+$") then return false end
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
  if type(found) == "table" and not string.find(tostring(found.err), "WRONGTYPE", 1, true) then
    redis.call("GETRANGE", key, 0, 61)  -- fails likewise
  end
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

-- The entry of the same key in another cache version.
local function sibling(entry_key, label)
  return (string.gsub(entry_key, "^({.-}:e)[^:]*", "%1" .. label, 1))
end

-- The cache versions in the head, but for the one of this entry.
local function other_labels(labels, entry_key)
  local own, others = string.match(entry_key, "^{.-}:e([^:]*):"), {}
  if labels == own then return others, true end
  local is_known = false
  for label in string.gmatch(labels, "%S+") do
    if label == own then is_known = true else others[#others + 1] = label end
  end
  return others, is_known, own
end

local LABELS_MAX = 16

local function know_label(change, head, entry_key)
  local others, is_known, own = other_labels(change.labels, entry_key)
  if is_known then return end
  others[#others + 1] = own
  change.labels = table.concat(others, " ", math.max(1, #others - LABELS_MAX + 1))
  redis.call("HSET", head, "c", change.labels)
end

-- Whether a write of the key, in any cache version, waits for its sink.
local function is_write_pending(labels, entry_key)
  if pending_of(numbers_of(entry_key)) > 0 then return true end
  for _, label in ipairs((other_labels(labels, entry_key))) do
    local other = sibling(entry_key, label)
    if pending_of(numbers_of(other)) > 0 then return true end
  end
  return false
end

-- An entry whose write is pending is newer than the source: it stays, marked x, until it is sunk.
local function outdate_entry(entry_key, soft)
  local numbers = numbers_of(entry_key)
  if pending_of(numbers) > 0 then
    redis.call("SETRANGE", entry_key, 3, "x")
  elseif soft and string.sub(numbers, 1, 3) == "\251E1" then
    -- Stale from the start of time: the readers' clock may be a little behind.
    redis.call("SETRANGE", entry_key, 20, string.rep("0", 13))
  else
    redis.call("UNLINK", entry_key)
  end
end

local function outdate_other_versions(labels, entry_key, soft)
  for _, label in ipairs((other_labels(labels, entry_key))) do
    local other = sibling(entry_key, label)
    outdate_entry(other, soft)
  end
end

local function tag_versions(value)
  local version, hard = string.match(value, "^(%d+) ?(%d*)$")
  if hard == "" then hard = version end
  if not whole_number(version) or not whole_number(hard) then return nil end
  return version, hard
end

local function bump_tag(tag, version, soft, keep_ms)
  local known = soft and redis.pcall("GET", tag)
  local value = version
  if type(known) == "string" then
    local _, hard = tag_versions(known)
    value = version .. " " .. (hard or version)
  end
  redis.call("SET", tag, value, "PX", keep_ms)
end

local LEGACY_MARKS_MAX = 100000
local LEGACY_MARK_MS = 31 * 86400000  -- longer than an entry may be brought over after its cache was declared so

-- The set of marks, in the shard of this head.
local function marks_of(head)
  return (string.gsub(head, ":head$", ":legacy", 1))
end

-- Nothing of another service is brought over for this key (*KEY) or tag any more.
local function mark_changed(change, head, label)
  if change.legacy_until_ms <= 0 then return end
  local marks, now_ms = marks_of(head), math.floor(change.now / 1000)
  if now_ms > change.legacy_until_ms then
    redis.call("HDEL", head, "l")
    redis.call("UNLINK", marks)
    return
  end
  local added = redis.pcall("ZADD", marks, string.format("%.0f", now_ms), label)
  local count = LEGACY_MARKS_MAX + 1  -- where something else has that name
  if type(added) == "number" then
    redis.call("ZREMRANGEBYSCORE", marks, "-inf", string.format("%.0f", now_ms - LEGACY_MARK_MS))
    count = redis.call("ZCARD", marks)
  end
  if count > LEGACY_MARKS_MAX then
    redis.call("HSET", head, "l", string.format("%.0f", -change.legacy_until_ms))
    redis.call("UNLINK", marks)
  end
end

-- The name in the name of a tag's version.
local function label_of(tag)
  return string.match(tag, "^{.-}:t:(.*)$")
end

-- Whatever depends on a key carries a tag named after it; where there is no such tag, nothing does
-- yet: whoever makes it later finds in the head (o) whether a key of the shard changed meanwhile.
local function outdate_dependents(change, head, named_after, soft, keep_ms)
  local version = string.format("%.0f", change.version)
  accepted(true, redis.pcall("HSET", head, "o", version))
  mark_changed(change, head, label_of(named_after))
  if redis.call("EXISTS", named_after) == 1 then bump_tag(named_after, version, soft, keep_ms) end
end
