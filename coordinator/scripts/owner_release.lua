-- Give up a shard's ordered work, so that another may take it at once.
--
-- KEYS[1] own    hash   o owner, t its token, e epoch, u until
-- ARGV[1] owner  node id
-- ARGV[2] epoch  the owner's
-- Returns 1, or 0 if another owns it by now
--
-- I1 The epoch stays, so that the next owner's is larger.

local known = redis.call("HMGET", KEYS[1], "o", "e")
if known[1] ~= ARGV[1] or known[2] ~= ARGV[2] then return 0 end
redis.call("HDEL", KEYS[1], "o", "t", "u")
return 1
