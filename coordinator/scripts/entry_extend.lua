-- Let an entry live on: what was loaded is what is there already.
-- With _change.lua.
--
-- KEYS[1] entry    string, expires   the stored envelope
-- KEYS[2] lease    string, expires   token of the one who may fill
-- KEYS[3] head     hash              epoch and newest version of the shard
-- KEYS[4] log      stream            notices
-- ARGV[1] token    the caller's
-- ARGV[2] since    version of the entry that is extended
-- ARGV[3] soft_ms  lifetime until stale
-- ARGV[4] hard_ms  lifetime until gone, >= soft_ms
-- ARGV[5] middle   kind, codec, length of the meta part, meta
-- ARGV[6] notice   msgpack
-- ARGV[7] bell     channel
-- ARGV[8] shard    number of the shard
-- Returns {1, version, soft_at_ms, hard_at_ms}; {0} refused: the lease is gone; {2} another entry is there
--
-- I1 Without the caller's own token present nothing is written.
-- I2 The lease is used up, but by {2}: the value can still be filled in whole.

if redis.call("GET", KEYS[2]) ~= ARGV[1] then return { 0 } end
local entry = redis.call("GET", KEYS[1])
if not entry or version_of(entry) ~= tonumber(ARGV[2]) or string.sub(entry, 4, 4) ~= "c" then
  return { 2 }
end
local change = next_change(KEYS[3], KEYS[4])
if is_write_pending(change.labels, KEYS[1]) then return { 0 } end
local soft_at, hard_at = lifetimes(change.now, tonumber(ARGV[3]), tonumber(ARGV[4]))
local high, low = string.byte(entry, 65, 66)
local payload = string.sub(entry, 67 + high * 256 + low)
announce(change, KEYS[3], KEYS[4], ARGV[7], ARGV[8], ARGV[6])
redis.call("SET", KEYS[1], envelope(change.version, soft_at, hard_at, 0, ARGV[5] .. payload), "PX", ARGV[4])
redis.call("DEL", KEYS[2])
return { 1, string.format("%.0f", change.version), string.format("%.0f", soft_at), string.format("%.0f", hard_at) }
