-- Give a fill lease back, so that the next caller need not wait for its end.
--
-- KEYS[1] lease  string, expires   token of the one who may fill
-- ARGV[1] token  the caller's
-- Returns 1, or 0 if it was gone or another's
--
-- I1 Another's lease is never deleted.

if redis.call("GET", KEYS[1]) == ARGV[1] then return redis.call("DEL", KEYS[1]) end
return 0
