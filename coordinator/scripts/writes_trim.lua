-- Delete the writes that every sink is past, if the checkpoints are where the caller knows them.
-- With _numbers.lua.
--
-- KEYS[1] done    hash     checkpoints, by name
-- KEYS[2] writes  stream   jobs
-- ARGV[1] next    id after the last entry that all are past; empty: there is none, and the stream
--   starts over
-- ARGV[2..] name and position of each checkpoint, by turns
-- Returns 1; 0 a checkpoint is elsewhere: nothing is trimmed
--
-- I1 A checkpoint that went back (a lost tail of the server's log, a failover) keeps its writes.
-- I2 It works when memory is full.

for i = 2, #ARGV, 2 do
  if stored_id(redis.call("HGET", KEYS[1], ARGV[i])) ~= ARGV[i + 1] then return 0 end
end
if ARGV[1] == "" then
  for i = 2, #ARGV, 2 do redis.call("HDEL", KEYS[1], ARGV[i]) end
  redis.call("DEL", KEYS[2])
else
  redis.call("XTRIM", KEYS[2], "MINID", ARGV[1])
end
return 1
