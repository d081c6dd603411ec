-- Invalidate whatever carries these tags of one shard, in O(1) each.
-- With _change.lua.
--
-- KEYS[1] head     hash     epoch, newest version, newest ingress mark (i)
-- KEYS[2] log      stream   notices
-- KEYS[3..] the tags' versions
-- ARGV[1] notice   msgpack
-- ARGV[2] bell     channel
-- ARGV[3] shard    number of the shard
-- ARGV[4] mark     place in the ingress stream; empty: it does not come from there
-- ARGV[5] keep_ms  how long a tag version is kept unused
-- ARGV[6] soft     1: what carries them may still be served as stale
-- Returns {1, version}; {2} a repetition
--
-- I1 The new version is later than any that the tag had, also one that was lost.
-- I2 A soft bump of a tag that was lost is a hard one.
-- I3 It works when memory is full, and where head or log is of another type (C9).
-- I4 Each tag gets a mark, where entries of another service may be brought over (C8).
-- I5 A tag of another type is treated as lost.

if is_repetition(KEYS[1], ARGV[4]) then return { 2 } end
local change = next_change(KEYS[1], KEYS[2], true)
local version = string.format("%.0f", change.version)
announce(change, KEYS[1], KEYS[2], ARGV[2], ARGV[3], ARGV[1], true, true)
for i = 3, #KEYS do
  bump_tag(KEYS[i], version, ARGV[6] == "1", ARGV[5])
  mark_changed(change, KEYS[1], label_of(KEYS[i]))
end
if ARGV[4] ~= "" then accepted(true, redis.pcall("HSET", KEYS[1], "i", ARGV[4])) end
return { 1, version }
