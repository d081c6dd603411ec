-- Fix a fact of a namespace, unless it is fixed already.
--
-- KEYS[1] meta   hash   facts of the namespace
-- ARGV[1] field  the fact's name
-- ARGV[2] value  the value that this node proposes
-- Returns the value that is in force
--
-- I1 The first value is kept; it never changes afterwards.
-- I2 It works when memory is full: a node that starts needs it.

local known = redis.call("HGET", KEYS[1], ARGV[1])
if known then return known end
-- A first write that memory limits never refuse; none after it is refused either (I2).
redis.call("PERSIST", KEYS[1])
redis.call("HSET", KEYS[1], ARGV[1], ARGV[2])
return ARGV[2]
