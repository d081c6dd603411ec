-- Write behind: the entry, its notice and the job for the sink, all or none.
-- With _change.lua.
--
-- KEYS[1] entry       string   the stored envelope; it does not expire until the write was sunk
-- KEYS[2] lease       string, expires   token of the one who may fill
-- KEYS[3] head        hash     epoch, newest version, newest ingress mark (i)
-- KEYS[4] log         stream   notices
-- KEYS[5] writes      stream   jobs
-- KEYS[6] seen        string, expires   an event id seen lately
-- KEYS[7] tag         string, expires   version of the tag named after the key
-- ARGV[1] soft_ms     lifetime until stale
-- ARGV[2] hard_ms     lifetime until gone, >= soft_ms
-- ARGV[3] tail        the envelope after the numbers
-- ARGV[4] notice      msgpack
-- ARGV[5] bell        channel of notices
-- ARGV[6] shard       number of the shard
-- ARGV[7] job         msgpack
-- ARGV[8] writes_max  bound of the stream
-- ARGV[9] work        channel of jobs
-- ARGV[10] mark       place in the ingress stream; empty: it does not come from there
-- ARGV[11] seen_ms    how long the event id is remembered; 0: it has none
-- ARGV[12] keep_ms    how long a tag version is kept unused
-- Returns {1, version, soft_at_ms, hard_at_ms, job id, length}; {0, length} full; {2} a repetition
--
-- I1 A mark that is not later than the newest one, or an event id seen, changes nothing.
-- I2 A full stream refuses; it is never trimmed to make room.
-- I3 What depends on the key is outdated, and so are entries of other cache versions.

if is_repetition(KEYS[3], ARGV[10]) then return { 2 } end
if ARGV[11] ~= "0" and redis.call("EXISTS", KEYS[6]) == 1 then return { 2 } end
local length = redis.call("XLEN", KEYS[5])
if length >= tonumber(ARGV[8]) then return { 0, length } end
local change = next_change(KEYS[3], KEYS[4])
local soft_at, hard_at = lifetimes(change.now, tonumber(ARGV[1]), tonumber(ARGV[2]))
local version = string.format("%.0f", change.version)
announce(change, KEYS[3], KEYS[4], ARGV[5], ARGV[6], ARGV[4])
local id = redis.call("XADD", KEYS[5], "*", "v", version, "j", ARGV[7])
redis.call("SET", KEYS[1], envelope(change.version, soft_at, hard_at, change.version, ARGV[3]))
know_label(change, KEYS[3], KEYS[1])
outdate_other_versions(change.labels, KEYS[1], false)
redis.call("DEL", KEYS[2])
outdate_dependents(KEYS[3], KEYS[7], version, false, ARGV[12])
if ARGV[10] ~= "" then redis.call("HSET", KEYS[3], "i", ARGV[10]) end
if ARGV[11] ~= "0" then redis.call("SET", KEYS[6], version, "PX", ARGV[11]) end
redis.call("PUBLISH", ARGV[9], "w " .. ARGV[6])
return { 1, version, string.format("%.0f", soft_at), string.format("%.0f", hard_at), id, length + 1 }
