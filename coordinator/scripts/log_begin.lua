-- Where a shard's log ends; one that holds no notice gets a first one.
-- With _change.lua.
--
-- KEYS[1] head    hash     epoch and newest version of the shard
-- KEYS[2] log     stream   notices
-- ARGV[1] notice  msgpack  one that names nothing
-- ARGV[2] bell    channel
-- ARGV[3] shard   number of the shard
-- Returns the id of the last notice
--
-- I1 A follower that began here knows an epoch, so that the loss of the log cannot escape it;
--    nor, of a log that was trimmed to its end, that it had not read all.
-- I2 A log that has notices is not written to, unless its last id is one that no epoch is past: it
--    starts over.
-- I3 It works when memory is full: a node that starts needs it.

local last = redis.call("XREVRANGE", KEYS[2], "+", "-", "COUNT", 1)[1]
if last and whole_number(string.match(last[1], "^%d+")) then return last[1] end
if last then redis.call("DEL", KEYS[2]) end
return announce(next_change(KEYS[1], KEYS[2]), KEYS[1], KEYS[2], ARGV[2], ARGV[3], ARGV[1], true)
