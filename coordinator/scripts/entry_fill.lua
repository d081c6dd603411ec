-- Store what a loader returned, if the caller's lease is still there.
-- With _change.lua.
--
-- KEYS[1] entry    string, expires   the stored envelope
-- KEYS[2] lease    string, expires   token of the one who may fill
-- KEYS[3] head     hash              epoch and newest version of the shard
-- KEYS[4] log      stream            notices
-- ARGV[1] token    the caller's
-- ARGV[2] soft_ms  lifetime until stale
-- ARGV[3] hard_ms  lifetime until gone, >= soft_ms
-- ARGV[4] tail     the envelope after the numbers
-- ARGV[5] notice   msgpack
-- ARGV[6] bell     channel
-- ARGV[7] shard    number of the shard
-- ARGV[8] label    *KEY: mark the key, so that no entry of another service replaces this one; or empty
-- Returns {1, version, soft_at_ms, hard_at_ms}; {0} refused: the lease is gone
--
-- I1 Without the caller's own token present nothing is written.
-- I2 The lease is used up.
-- I3 Nothing is stored while a write of the key waits for its sink, in any cache version.

if redis.call("GET", KEYS[2]) ~= ARGV[1] then return { 0 } end
local change = next_change(KEYS[3], KEYS[4])
if is_write_pending(change.labels, KEYS[1]) then return { 0 } end
local soft_at, hard_at = lifetimes(change.now, tonumber(ARGV[2]), tonumber(ARGV[3]))
announce(change, KEYS[3], KEYS[4], ARGV[6], ARGV[7], ARGV[5])
redis.call("SET", KEYS[1], envelope(change.version, soft_at, hard_at, 0, ARGV[4]), "PX", ARGV[3])
know_label(change, KEYS[3], KEYS[1])
redis.call("DEL", KEYS[2])
if ARGV[8] ~= "" then mark_changed(change, KEYS[3], ARGV[8]) end
return { 1, string.format("%.0f", change.version), string.format("%.0f", soft_at), string.format("%.0f", hard_at) }
