-- Put events into the ingress stream, all or none.
-- With _ingress.lua.
--
-- KEYS[1] events  stream
-- KEYS[2] before  stream   ingress up to an exhausted id; drained first
-- ARGV[1] bound   of both together
-- ARGV[2..] events, JSON
-- Returns the ids; {0, length} as one integer pair when the stream is full
--
-- I1 A full stream refuses; it is never trimmed to make room.
-- I2 A stream that has no further id is set aside, and the events go into a new one; while
--    one is set aside already, the stream counts as full. No event gets the last id.

local length = redis.call("XLEN", KEYS[1]) + redis.call("XLEN", KEYS[2])
if length + #ARGV - 1 > tonumber(ARGV[1]) then return { 0, length } end

-- The ids; none where the stream came to its end, then it is as before.
local function added()
  local ids = {}
  for i = 2, #ARGV do
    local id = redis.pcall("XADD", KEYS[1], "*", "event", ARGV[i])
    local refused = type(id) == "table" and id.err
    if refused and not string.find(tostring(refused), "exhausted", 1, true) then return id end
    if not refused then ids[#ids + 1] = id end
    if refused or id == LAST_ID then
      if #ids > 0 then redis.call("XDEL", KEYS[1], unpack(ids)) end
      return nil
    end
  end
  return ids
end

local ids = added()
if ids then return ids end
if redis.call("XLEN", KEYS[1]) == 0 then
  redis.call("DEL", KEYS[1])
elseif redis.call("XLEN", KEYS[2]) == 0 then
  redis.call("DEL", KEYS[2])
  redis.call("RENAME", KEYS[1], KEYS[2])
else
  return { 0, length }
end
return added()
