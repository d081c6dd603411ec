-- Begin to write a key through to its source: take its fill lease, and a version for the row.
-- With _change.lua.
--
-- KEYS[1] entry     string, expires   the stored envelope
-- KEYS[2] lease     string, expires   token of the one who may fill; "!": the source failed lately
-- KEYS[3] head      hash              epoch and newest version of the shard
-- KEYS[4] log       stream            notices
-- ARGV[1] token     random, drawn by the caller before sending
-- ARGV[2] lease_ms  integer > 0
-- Returns {1, version} granted, {0, left_ms} another has it, {2} a write-behind is pending
--
-- I1 Nobody gets a lease while another token is present; that loads failed does not matter.
-- I2 Asked again with the same token (the reply was lost), it is granted again, with a later version.
-- I3 The version is later than all that the shard gave before, and is not given again.
-- I4 No lease is given while a write-behind is pending, in any cache version: the sink shall
--    have that one first.
-- I5 Neither the entry nor the log is changed: nothing was written yet.

local change = next_change(KEYS[3], KEYS[4])
if is_write_pending(change.labels, KEYS[1]) then return { 2 } end
local holder = redis.call("GET", KEYS[2])
if holder and holder ~= ARGV[1] and holder ~= "!" then
  return { 0, redis.call("PTTL", KEYS[2]) }
end
local version = string.format("%.0f", change.version)
redis.call("SET", KEYS[2], ARGV[1], "PX", ARGV[2])
redis.call("HSET", KEYS[3], "e", string.format("%.0f", change.epoch), "v", version)
return { 1, version }
