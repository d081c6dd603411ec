-- Store a value that the caller knows to be the newest.
-- With _change.lua.
--
-- KEYS[1] entry    string, expires   the stored envelope
-- KEYS[2] lease    string, expires   token of the one who may fill
-- KEYS[3] head     hash              epoch and newest version of the shard
-- KEYS[4] log      stream            notices
-- KEYS[5] tag      string, expires   version of the tag named after the key
-- ARGV[1] soft_ms  lifetime until stale
-- ARGV[2] hard_ms  lifetime until gone, >= soft_ms
-- ARGV[3] tail     the envelope after the numbers
-- ARGV[4] notice   msgpack
-- ARGV[5] bell     channel
-- ARGV[6] shard    number of the shard
-- ARGV[7] keep_ms  how long a tag version is kept unused
-- Returns {version, soft_at_ms, hard_at_ms}
--
-- I1 A load under way cannot fill any more.
-- I2 A pending write-behind stays pending, and so the entry does not expire.
-- I3 What depends on the key is outdated.

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
redis.call("DEL", KEYS[2])
local version = string.format("%.0f", change.version)
outdate_dependents(KEYS[3], KEYS[5], version, false, ARGV[7])
return { version, string.format("%.0f", soft_at), string.format("%.0f", hard_at) }
