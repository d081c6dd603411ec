-- Write behind: the entry, its notice and the job for the sink, all or none.
-- With _change.lua.
--
-- KEYS[1] entry       string   the stored envelope; it does not expire until the write was sunk
-- KEYS[2] lease       string, expires   token of the one who may fill
-- KEYS[3] head        hash     epoch, newest version, newest ingress mark (i)
-- KEYS[4] log         stream   notices
-- KEYS[5] writes      stream   jobs
-- KEYS[6] seen        zset     event ids seen lately, by when they were published (milliseconds)
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
-- ARGV[11] seen_ms    for how long after its publication an event id counts once; 0: it has none
-- ARGV[12] keep_ms    how long a tag version is kept unused
-- ARGV[13] event_id   its source and id; empty: it has none
-- ARGV[14] published_ms  when it was published, on the server's clock; 0: now
-- ARGV[15] seen_max   how many event ids are remembered
-- ARGV[16] at_full    1: it may use memory beyond the server's limit
-- Returns {1, version, soft_at_ms, hard_at_ms, job id, length}, and how many event ids
--   were forgotten for lack of room, if any; {0, length} full; {2} a repetition
--
-- I1 A mark that is not later than the newest one, or an event id seen, changes nothing. Whether
--    it was seen lately depends on the times of publication, however late both are applied.
-- I2 A full stream refuses, and one that has given its last id; neither is trimmed to make room.
-- I3 Dependents of the key are outdated, and so are entries of other cache versions.
-- I4 Lifetimes count from when it was published.
-- I5 When memory is full it is refused as a whole, unless at_full.

if is_repetition(KEYS[3], ARGV[10]) then return { 2 } end
local published_ms = math.floor(server_us() / 1000)
local given_ms, seen_ms = tonumber(ARGV[14]), tonumber(ARGV[11])
if given_ms > 0 and given_ms < published_ms then published_ms = given_ms end
if seen_ms > 0 then
  local seen_at = redis.call("ZSCORE", KEYS[6], ARGV[13])
  if seen_at and published_ms - tonumber(seen_at) < seen_ms then return { 2 } end
end
local length = redis.call("XLEN", KEYS[5])
if length >= tonumber(ARGV[8]) then return { 0, length } end
local change = next_change(KEYS[3], KEYS[4])
local soft_at, hard_at = lifetimes(published_ms * 1000, tonumber(ARGV[1]), tonumber(ARGV[2]))
local version = string.format("%.0f", change.version)
redis.call("XLEN", KEYS[4])  -- fails here, before anything is written, if it is not a stream
local id = redis.pcall("XADD", KEYS[5], "*", "v", version, "j", ARGV[7])
local added = type(id) == "string"
-- A stream that has given its last id has no room until it is drained.
if not added and string.find(tostring(id.err), "exhausted", 1, true) then return { 0, length } end
announce(change, KEYS[3], KEYS[4], ARGV[5], ARGV[6], ARGV[4], ARGV[16] == "1")
if not added then id = redis.call("XADD", KEYS[5], "*", "v", version, "j", ARGV[7]) end
redis.call("SET", KEYS[1], envelope(change.version, soft_at, hard_at, change.version, ARGV[3]))
know_label(change, KEYS[3], KEYS[1])
outdate_other_versions(change.labels, KEYS[1], false)
redis.call("DEL", KEYS[2])
outdate_dependents(change, KEYS[3], KEYS[7], false, ARGV[12])
if ARGV[10] ~= "" then redis.call("HSET", KEYS[3], "i", ARGV[10]) end
local forgotten = 0
if seen_ms > 0 then
  redis.call("ZREMRANGEBYSCORE", KEYS[6], "-inf", string.format("%.0f", published_ms - seen_ms))
  redis.call("ZADD", KEYS[6], string.format("%.0f", published_ms), ARGV[13])
  forgotten = redis.call("ZREMRANGEBYRANK", KEYS[6], 0, -1 - ARGV[15])
end
redis.call("PUBLISH", ARGV[9], "w " .. ARGV[6])
local soft, hard = string.format("%.0f", soft_at), string.format("%.0f", hard_at)
local reply = { 1, version, soft, hard, id, length + 1 }
if forgotten > 0 then reply[7] = forgotten end
return reply
