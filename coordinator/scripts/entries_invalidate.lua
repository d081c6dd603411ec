-- Invalidate keys of one shard.
-- With _change.lua.
--
-- KEYS[1] head    hash     epoch, newest version, newest ingress mark (i), cache versions (c)
-- KEYS[2] log     stream   notices
-- KEYS[3..] entry, lease and tag of each key, by turns
-- ARGV[1] notice  msgpack
-- ARGV[2] bell    channel
-- ARGV[3] shard   number of the shard
-- ARGV[4] mark    place in the ingress stream; empty: it does not come from there
-- ARGV[5] soft    1: the entries stay, as stale; 0: they are deleted
-- ARGV[6] keep_ms  how long a tag version is kept unused
-- Returns {1, version}; {2} a repetition
--
-- I1 A load under way cannot fill any more.
-- I2 An entry whose write-behind is pending is newer than the source: it stays, marked x,
--    and is dropped when the write was sunk.
-- I3 What depends on the keys is outdated with them, as softly.
-- I4 The entries of all cache versions are outdated alike.
-- I5 It works when memory is full, and where head or log is of another type (C9).

if is_repetition(KEYS[1], ARGV[4]) then return { 2 } end
local change = next_change(KEYS[1], KEYS[2], true)
local version = string.format("%.0f", change.version)
announce(change, KEYS[1], KEYS[2], ARGV[2], ARGV[3], ARGV[1], true, true)
for i = 3, #KEYS, 3 do
  outdate_entry(KEYS[i], ARGV[5] == "1")
  outdate_other_versions(change.labels, KEYS[i], ARGV[5] == "1")
  redis.call("DEL", KEYS[i + 1])
  outdate_dependents(change, KEYS[1], KEYS[i + 2], ARGV[5] == "1", ARGV[6])
end
if ARGV[4] ~= "" then accepted(true, redis.pcall("HSET", KEYS[1], "i", ARGV[4])) end
return { 1, version }
