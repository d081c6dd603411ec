-- Announce a batch of the ingress stream before it is applied; renew the stream where it must be.
-- With _ingress.lua.
--
-- KEYS[1] own       hash     o owner, e epoch
-- KEYS[2] done      hash     events checkpoint, g generation, b batch under way ("first digest last")
-- KEYS[3] events    stream   ingress
-- KEYS[4] before    stream   ingress up to an exhausted id; drained first
-- ARGV[1] owner     node id
-- ARGV[2] epoch     the owner's
-- ARGV[3] first     id of the batch's first entry; empty: the streams are empty, as far as is known
-- ARGV[4] last      id of its last entry
-- ARGV[5] digest    of the first entry, in hexadecimal digits: an id may be given twice
-- ARGV[6] highest   newest generation that a mark of some shard carries
-- ARGV[7] reached   newest id that a mark of that generation carries
-- Returns {1, generation, ahead_ms, why}; {0, epoch} fenced off
--   ahead_ms: how far the newest id is ahead of the server's clock; why: a generation was begun
--
-- I1 Ids grow within a generation. Where they went back (the stream was deleted, restored, or
--    failed over), a new generation begins, so that every mark is older than every new entry.
-- I2 A batch that is taken again after a crash keeps its generation, and so its marks.
-- I3 An exhausted stream makes room: it is set aside, and drained first.
-- I4 It works when memory is full.

local known = redis.call("HMGET", KEYS[1], "o", "e")
if known[1] ~= ARGV[1] or known[2] ~= ARGV[2] then return { 0, known[2] or "0" } end
-- A first write that memory limits never refuse; none after it is refused either (I4).
redis.call("PERSIST", KEYS[2])
local now_ms = server_ms()
local state = redis.call("HMGET", KEYS[2], "events", "g", "b")
local generation, highest = generation_of(state[2]), generation_of(ARGV[6])
local why = ""
local newest = newest_id(KEYS[3])
if redis.call("XLEN", KEYS[4]) == 0 then redis.call("DEL", KEYS[4]) end
if newest == LAST_ID and redis.call("XLEN", KEYS[3]) > 0 and redis.call("EXISTS", KEYS[4]) == 0 then
  redis.call("RENAME", KEYS[3], KEYS[4])
end
if ARGV[3] ~= "" then
  local first, last = string.match(state[3] or "", "^(%S+ %x+) (%S+)$")
  local begins = ARGV[3] .. " " .. ARGV[5]
  local done = padded(state[1])
  local taken = last and padded(last) > done and padded(last) or done
  if generation == 0 then
    why = "begun"
  elseif highest > generation then
    why = "restored"
  elseif padded(ARGV[3]) <= done or (taken ~= done and first ~= begins) then
    why = "replaced"
  elseif highest == generation and padded(ARGV[7]) > taken and ms_of(ARGV[7]) > now_ms then
    why = "lost"
  end
  redis.call("HSET", KEYS[2], "b", begins .. " " .. ARGV[4])
elseif redis.call("EXISTS", KEYS[4]) == 0 and redis.call("XLEN", KEYS[3]) == 0 and
    ms_of(newest) > now_ms then
  redis.call("DEL", KEYS[3])
  redis.call("HDEL", KEYS[2], "b")
  why = "drained"
end
if why ~= "" then
  generation = next_generation(math.max(generation, highest))
  redis.call("HSET", KEYS[2], "g", string.format("%.0f", generation), "events", "0-0")
end
local ahead_ms = math.max(0, math.min(ms_of(newest) - now_ms, 2 ^ 53))
return { 1, string.format("%.0f", generation), string.format("%.0f", ahead_ms), why }
