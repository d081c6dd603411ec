-- Store a value that the caller knows to be the newest.
-- With _change.lua.
--
-- KEYS[1] entry    string, expires   the stored envelope
-- KEYS[2] lease    string, expires   token of the one who may fill
-- KEYS[3] head     hash              epoch and newest version of the shard
-- KEYS[4] log      stream            notices
-- KEYS[5] tag      string, expires   version of the tag named after the key
-- KEYS[6] fence    string, expires   the highest fencing token seen
-- ARGV[1] soft_ms  lifetime until stale
-- ARGV[2] hard_ms  lifetime until gone, >= soft_ms
-- ARGV[3] tail     the envelope after the numbers
-- ARGV[4] notice   msgpack
-- ARGV[5] bell     channel
-- ARGV[6] shard    number of the shard
-- ARGV[7] keep_ms  how long a tag version, and a fence, is kept unused
-- ARGV[8] token    of the lease under which it is put; 0: of none
-- Returns {1, version, soft_at_ms, hard_at_ms}; {0, highest} refused
--
-- I1 A load under way cannot fill any more.
-- I2 A pending write-behind stays pending, and so the entry does not expire.
-- I3 What depends on the key is outdated.
-- I4 Under a token lower than one that was seen, nothing is written.
-- I5 Entries of other cache versions are outdated.

if ARGV[8] ~= "0" then
  local highest = redis.call("GET", KEYS[6])
  if highest and (whole_number(highest) or WHOLE_MAX) > tonumber(ARGV[8]) then return { 0, highest } end
end
local pending = pending_of(numbers_of(KEYS[1]))
local change = next_change(KEYS[3], KEYS[4])
local soft_at, hard_at = lifetimes(change.now, tonumber(ARGV[1]), tonumber(ARGV[2]))
local entry = envelope(change.version, soft_at, hard_at, pending, ARGV[3])
announce(change, KEYS[3], KEYS[4], ARGV[5], ARGV[6], ARGV[4])
if pending > 0 then
  redis.call("SET", KEYS[1], entry)
else
  redis.call("SET", KEYS[1], entry, "PX", ARGV[2])
end
know_label(change, KEYS[3], KEYS[1])
outdate_other_versions(change.labels, KEYS[1], false)
redis.call("DEL", KEYS[2])
outdate_dependents(change, KEYS[3], KEYS[5], false, ARGV[7])
if ARGV[8] ~= "0" then redis.call("SET", KEYS[6], ARGV[8], "PX", ARGV[7]) end
local version = string.format("%.0f", change.version)
return { 1, version, string.format("%.0f", soft_at), string.format("%.0f", hard_at) }
