-- Have a stale entry loaded again by some node: its fill lease goes to the job.
-- With _change.lua.
--
-- KEYS[1] entry     string, expires   the stored envelope
-- KEYS[2] lease     string, expires   token of the one who may fill
-- KEYS[3] refreshes stream            jobs
-- ARGV[1] token     random; the job carries it
-- ARGV[2] lease_ms  integer > 0
-- ARGV[3] seen      version that is to be replaced; -1: there was no entry
-- ARGV[4] job       msgpack
-- ARGV[5] bound     of the stream
-- ARGV[6] work      channel of jobs
-- ARGV[7] shard     number of the shard
-- Returns 1; 0 it is refreshed already or was; -1 the stream is full: the refresh is shed
--
-- I1 At most one job of a key is under way at a time.

local numbers = numbers_of(KEYS[1])
if version_of(numbers) > tonumber(ARGV[3]) or pending_of(numbers) > 0 then return 0 end
if redis.call("EXISTS", KEYS[2]) == 1 then return 0 end
if redis.call("XLEN", KEYS[3]) >= tonumber(ARGV[5]) then return -1 end
-- A stream that has given its last id starts over: readers publish the lost refreshes again.
local added = redis.pcall("XADD", KEYS[3], "*", "j", ARGV[4])
if type(added) ~= "string" then
  if string.find(tostring(added.err), "exhausted", 1, true) then redis.call("DEL", KEYS[3]) end
  redis.call("XADD", KEYS[3], "*", "j", ARGV[4])
end
redis.call("SET", KEYS[2], ARGV[1], "PX", ARGV[2])
redis.call("PUBLISH", ARGV[6], "r " .. ARGV[7])
return 1
