-- Move the checkpoint of ingress, if the caller is still the owner, and delete the applied events.
-- With _ingress.lua.
--
-- KEYS[1] own       hash     o owner, e epoch
-- KEYS[2] done      hash     events checkpoint, g generation, b batch under way
-- KEYS[3] events    stream   ingress
-- KEYS[4] before    stream   ingress up to an exhausted id; drained first
-- ARGV[1] owner     node id
-- ARGV[2] epoch     the owner's
-- ARGV[3] position  id of the last entry done
-- ARGV[4] next      id after it; empty: there is none
-- Returns {1, why}; {0, epoch} fenced off: another owns it since
--
-- I1 Nothing is written for anyone but the owner of this epoch.
-- I2 When an exhausted stream is drained, or one whose ids are ahead of the server's clock, it
--    starts over: stream, checkpoint and generation at once (why: "drained").
-- I3 It works when memory is full, because it empties the stream.

local known = redis.call("HMGET", KEYS[1], "o", "e")
if known[1] ~= ARGV[1] or known[2] ~= ARGV[2] then return { 0, known[2] or "0" } end
-- A first write that memory limits never refuse; none after it is refused either (I3).
redis.call("PERSIST", KEYS[2])
redis.call("HSET", KEYS[2], "events", ARGV[3])
redis.call("HDEL", KEYS[2], "b")
local set_aside = redis.call("EXISTS", KEYS[4]) == 1
local ahead = set_aside or ms_of(ARGV[3]) > server_ms()

-- Delete the applied events, and with them a stream that is to start over; whether it is gone.
local function shorten(stream)
  if ARGV[4] ~= "" then
    redis.call("XTRIM", stream, "MINID", ARGV[4])
    if not ahead or redis.call("XLEN", stream) > 0 then return false end
  end
  redis.call("DEL", stream)
  return true
end

local gone
if set_aside then gone = shorten(KEYS[4]) else gone = shorten(KEYS[3]) end
if not gone then return { 1, "" } end
local generation = next_generation(generation_of(redis.call("HGET", KEYS[2], "g")))
redis.call("HSET", KEYS[2], "g", string.format("%.0f", generation), "events", "0-0")
return { 1, "drained" }
