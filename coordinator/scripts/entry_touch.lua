-- Tell of entries of one shard that were changed or deleted past the scripts, by others.
-- With _change.lua.
--
-- KEYS[1] head    hash     epoch, newest version, cache versions (c)
-- KEYS[2] log     stream   notices
-- KEYS[3..] entry, lease and tag of each key, by turns
-- ARGV[1] notice  msgpack  says that copies of all these keys are old
-- ARGV[2] bell    channel
-- ARGV[3] shard   number of the shard
-- ARGV[4] keep_ms  how long a tag version is kept unused
-- Returns {how many, version}; {0} all of them are ours again: nothing was written
--
-- I1 No entry of this cache version is changed: a value that others wrote is there to be read.
-- I2 A load under way cannot fill any more, except of a key whose entry is ours: a script of
--    ours stored it, and told so. The notice may name that key all the same.
-- I3 Entries of other cache versions are outdated if the entry is not ours.
-- I4 It works when memory is full.

local foreign = {}
for i = 3, #KEYS, 3 do
  -- The third character of the magic is the format; a newer one is ours, too.
  if string.sub(numbers_of(KEYS[i]), 1, 2) ~= "\251E" then
    foreign[#foreign + 1] = i
  end
end
if #foreign == 0 then return { 0 } end
local change = next_change(KEYS[1], KEYS[2])
announce(change, KEYS[1], KEYS[2], ARGV[2], ARGV[3], ARGV[1], true)
local version = string.format("%.0f", change.version)
for _, i in ipairs(foreign) do
  know_label(change, KEYS[1], KEYS[i])
  redis.call("DEL", KEYS[i + 1])
  outdate_other_versions(change.labels, KEYS[i], false)
  outdate_dependents(change, KEYS[1], KEYS[i + 2], false, ARGV[4])
end
return { #foreign, version }
