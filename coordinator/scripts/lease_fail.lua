-- The loader of a key failed: leave its source alone for a while, if there is something to serve.
--
-- KEYS[1] entry        string, expires   the stored envelope
-- KEYS[2] lease        string, expires   token of the one who may fill; "!": the source failed lately
-- ARGV[1] token        the caller's
-- ARGV[2] throttle_ms  integer > 0
-- Returns 1 left alone; 0 the lease is free, or another's
--
-- I1 Another's lease stays as it is.

if redis.call("GET", KEYS[2]) ~= ARGV[1] then return 0 end
if redis.call("EXISTS", KEYS[1]) == 0 then
  redis.call("DEL", KEYS[2])
  return 0
end
redis.call("SET", KEYS[2], "!", "PX", ARGV[2])
return 1
