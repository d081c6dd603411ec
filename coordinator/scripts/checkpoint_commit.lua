-- Move a checkpoint, if the caller is still the owner; entries that were sunk may expire again.
-- With _change.lua.
--
-- KEYS[1] own       hash     o owner, e epoch
-- KEYS[2] done      hash     checkpoints, by the stream's name
-- KEYS[3] stream    stream   trimmed up to the checkpoint
-- KEYS[4..] entries whose write was sunk
-- ARGV[1] owner     node id
-- ARGV[2] epoch     the owner's
-- ARGV[3] name      of the stream
-- ARGV[4] position  id of the last entry done
-- ARGV[5] next      id after it: entries before are trimmed
-- ARGV[6] work      channel of jobs; empty: nobody waits for this checkpoint
-- ARGV[7] shard     number of the shard
-- ARGV[8..] the version that was sunk, of each entry
-- Returns {1}; {0, epoch} fenced off: another owns it since
--
-- I1 Nothing is written for anyone but the owner of this epoch.
-- I2 An entry with a newer write pending stays as it is.
-- I3 It works when memory is full: this is what empties the streams.
-- I4 Whoever hears of it on the channel finds the checkpoint moved.

local known = redis.call("HMGET", KEYS[1], "o", "e")
if known[1] ~= ARGV[1] or known[2] ~= ARGV[2] then return { 0, known[2] or "0" } end
-- A first write that memory limits never refuse; none after it is refused either (I3).
redis.call("PERSIST", KEYS[2])
redis.call("HSET", KEYS[2], ARGV[3], ARGV[4])
redis.call("XTRIM", KEYS[3], "MINID", ARGV[5])
for i = 4, #KEYS do
  local numbers = numbers_of(KEYS[i])
  local pending = pending_of(numbers)
  if pending > 0 and pending == tonumber(ARGV[i + 4]) then
    if string.sub(numbers, 4, 4) == "x" then
      redis.call("UNLINK", KEYS[i])
    else
      redis.call("SETRANGE", KEYS[i], 46, string.rep("0", 16))
      redis.call("PEXPIREAT", KEYS[i], string.sub(numbers, 34, 46))
    end
  end
end
if ARGV[6] ~= "" then redis.call("PUBLISH", ARGV[6], "d " .. ARGV[7]) end
return { 1 }
