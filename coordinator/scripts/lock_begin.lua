-- Have an era for the locks of a shard before the first of them is taken.
-- With _lock.lua.
--
-- KEYS[1] era      hash   which run of the server these locks are from
-- KEYS[2] index    zset   locks of this shard that are held
-- ARGV[1] fresh    1: the namespace was born in this run of the server, so no lock can be lost
-- ARGV[2] usual_us what is taken for the longest lease while none was given
-- Returns how many microseconds of grace are left
--
-- I1 An era that is there is left as it is, unless it is of another run of the server.
-- I2 Names of locks that ended an hour ago are forgotten.
-- I3 It works when memory is full: a node that starts needs it.

local now = server_us()
-- A first write that memory limits never refuse; none after it is refused either (I3).
redis.call("PERSIST", KEYS[1])
if ARGV[1] == "1" and redis.call("EXISTS", KEYS[1]) == 0 then
  redis.call("HSET", KEYS[1], "rid", run_id(run_info()), "grace", 0, "max", ARGV[2])
end
redis.pcall("ZREMRANGEBYSCORE", KEYS[2], "-inf", digits(now - KEEP_MS * 1000))
return digits(math.max(grace_of(KEYS[1], now) - now, 0))
