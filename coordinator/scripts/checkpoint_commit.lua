-- Move a checkpoint, if the caller is still the owner; entries that were sunk may expire again.
-- With _change.lua.
--
-- KEYS[1] own       hash     o owner, e epoch
-- KEYS[2] done      hash     checkpoints, by the stream's name
-- KEYS[3] stream    stream   trimmed up to the checkpoint
-- KEYS[4] head      hash     cache versions (c)
-- KEYS[5..] entry and lease of each key whose write was sunk, by turns
-- ARGV[1] owner     node id
-- ARGV[2] epoch     the owner's
-- ARGV[3] name      of the stream
-- ARGV[4] position  id of the last entry done
-- ARGV[5] next      id after it: entries before are trimmed; empty: there is none, and the
--   stream starts over
-- ARGV[6] work      channel of jobs; empty: nobody waits for this checkpoint
-- ARGV[7] shard     number of the shard
-- ARGV[8] from      checkpoint that the caller went on from; empty: it is not compared
-- ARGV[9] last      id of the last entry read, which must still be there; empty: it is not looked for
-- ARGV[10..] the version that was sunk, of each key
-- Returns {1}; {2} the checkpoint stays: the stream is not the one that was read; {0, epoch} fenced off
--
-- I1 Nothing is written for anyone but the owner of this epoch.
-- I2 An entry with a newer write pending stays as it is.
-- I3 It works when memory is full, because it empties the streams. Entries that were sunk are
--    then deleted, as if they had expired: the source has their values.
-- I4 Whoever hears of it on the channel finds the checkpoint moved.
-- I5 The entry is found in any cache version. An older write of the key in
--    another version was sunk with it, and its entry is gone.
-- I6 A server that lost the last accepted writes (its log's tail, a failover) loses no more by it:
--    a checkpoint that went back is not moved by a caller that read further, and nothing is trimmed.
-- I7 A load that began before the write was sunk cannot fill any more: of another cache version,
--    or of an entry that was lost meanwhile.

local function settle_write(entry_key, sunk, is_full)
  local numbers = numbers_of(entry_key)
  local pending = pending_of(numbers)
  if pending == 0 or pending > sunk then return end
  if is_full or pending < sunk or string.sub(numbers, 4, 4) == "x" then
    redis.call("UNLINK", entry_key)
  else
    redis.call("SETRANGE", entry_key, 46, string.rep("0", 16))
    redis.call("PEXPIREAT", entry_key, string.sub(numbers, 34, 46))
  end
end

local known = redis.call("HMGET", KEYS[1], "o", "e")
if known[1] ~= ARGV[1] or known[2] ~= ARGV[2] then return { 0, known[2] or "0" } end
local stored = stored_id(redis.call("HGET", KEYS[2], ARGV[3]))
local lost = (ARGV[8] ~= "" and ARGV[8] ~= stored)
  or (ARGV[9] ~= "" and #redis.call("XRANGE", KEYS[3], ARGV[9], ARGV[9]) == 0)
local position = lost and stored or ARGV[4]
local moved = redis.pcall("HSET", KEYS[2], ARGV[3], position)
local is_full = type(moved) ~= "number"
if is_full then
  -- A first write that memory limits never refuse; none after it is refused either (I3).
  redis.call("PERSIST", KEYS[2])
  redis.call("HSET", KEYS[2], ARGV[3], position)
end
if not lost and ARGV[5] == "" then
  redis.call("DEL", KEYS[3])
  redis.call("HDEL", KEYS[2], ARGV[3])
elseif not lost then
  redis.call("XTRIM", KEYS[3], "MINID", ARGV[5])
end
local labels = redis.call("HGET", KEYS[4], "c") or ""
for i = 5, #KEYS, 2 do
  local sunk = tonumber(ARGV[(i - 5) / 2 + 10])
  settle_write(KEYS[i], sunk, is_full)
  for _, label in ipairs((other_labels(labels, KEYS[i]))) do
    local other = sibling(KEYS[i], label)
    settle_write(other, sunk, is_full)
  end
  redis.call("DEL", KEYS[i + 1])
end
if lost then return { 2 } end
if ARGV[6] ~= "" then redis.call("PUBLISH", ARGV[6], "d " .. ARGV[7]) end
return { 1 }
