-- Become, or stay, the owner of a resource's ordered work; or wish for it.
-- With _numbers.lua.
--
-- KEYS[1] own          hash     o owner, t its token, e epoch, u until (microseconds, server clock);
--                               w who wishes for it, s since when, f until when the wish is fresh
-- ARGV[1] owner        node id
-- ARGV[2] ttl_ms       integer > 0
-- ARGV[3] token        drawn at random by the process: two that share a node id differ in it
-- ARGV[4] forced_ms    how long an owner may take to drain once another wishes
-- ARGV[5] fresh_ms     how long a wish that is not repeated counts
-- Returns {1, epoch, left_ms, wisher, kind} granted; wisher: who waits for it, or "". kind: kept,
-- free, wished (released for us), forced, dead (the lease before was over).
-- {0, epoch, left_ms, owner} another owns it, or is to have it next
--
-- I1 Each change of owner has a larger epoch than the one before, also when the record was lost.
-- I2 Asked again with the same token, the same epoch is returned, and the lease is renewed; but
--    for no longer than until forced_ms after another began to wish for it.
-- I3 It works when memory is full: the owners are those who empty the streams.
-- I4 A lease that was granted is kept to its end, whoever wishes for it.
-- I5 What is free, and wished for, goes to nobody but the one whose wish is fresh.
-- I6 An impossible record is treated as absent: text instead of a number, a lease or a wish that
--    ends later than any that is granted.

local t = redis.call("TIME")
local now = t[1] * 1000000 + t[2]
local known = redis.call("HMGET", KEYS[1], "o", "t", "e", "u", "w", "s", "f")
local LATEST = now + 120000000 -- twice as long as any lease, or any wish
local function time_of(text)
  local found = whole_number(text) or 0
  return found <= LATEST and found or 0
end
local epoch, till, fresh_till = whole_number(known[3]) or 0, time_of(known[4]), time_of(known[7])
local fresh = fresh_till > now
local wisher, since = fresh and known[5] or "", fresh and whole_number(known[6]) or now
local forced = since + ARGV[4] * 1000
local ends = now + ARGV[2] * 1000
local ours = known[1] == ARGV[1] and known[2] == ARGV[3]
local wished = wisher ~= "" and wisher ~= ARGV[1]
local function number(value) return string.format("%.0f", value) end
local function left(value) return math.max(0, math.floor((value - now) / 1000)) end

if wished and ours then ends = math.min(ends, math.max(forced, till)) end
if wished and ((ours and ends <= now) or (not ours and till <= now)) then
  return { 0, number(epoch), left(fresh_till), wisher }
end
-- A first write that memory limits never refuse; none after it is refused either (I3).
redis.call("PERSIST", KEYS[1])
if not ours and till > now then
  if not wished then
    local f = number(now + ARGV[5] * 1000)
    redis.call("HSET", KEYS[1], "w", ARGV[1], "s", number(since), "f", f)
  end
  return { 0, number(epoch), left(till), known[1] }
end
local kind = "kept"
if not ours then
  kind = wisher == ARGV[1] and (known[1] and (forced <= now and "forced" or "dead") or "wished")
    or known[1] and "dead" or "free"
  epoch = math.max(epoch + 1, now)
  redis.call("HDEL", KEYS[1], "w", "s", "f")
end
redis.call("HSET", KEYS[1], "o", ARGV[1], "t", ARGV[3], "e", number(epoch), "u", number(ends))
return { 1, number(epoch), left(ends), wished and wisher or "", kind }
