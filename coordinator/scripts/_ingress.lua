-- Shared by the scripts of ingress: ids of streams, and generations of the ingress stream.
--
-- N1 Two ids compare as their texts do after ``padded``; no id is larger than LAST_ID, and a
--    stream that has given it refuses every further entry.
-- N2 A generation is a whole number below 2^52, larger than all before: at least the server's
--    clock in microseconds when it began. 0: none, or a value that is not a generation.

local LAST_ID = "18446744073709551615-18446744073709551615"
local GENERATION_MAX = 2 ^ 52

local function server_ms()
  local t = redis.call("TIME")
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function padded(id)
  local ms, seq = string.match(id or "", "^(%d+)-(%d+)$")
  if not ms or #ms > 20 or #seq > 20 then ms, seq = "0", "0" end
  return string.rep("0", 20 - #ms) .. ms .. string.rep("0", 20 - #seq) .. seq
end

local function ms_of(id)
  return tonumber(string.match(id or "", "^(%d+)-%d+$")) or 0
end

-- The newest id that a stream has given, also if its entry is gone.
local function newest_id(stream)
  if redis.call("EXISTS", stream) == 0 then return "0-0" end
  local facts = redis.call("XINFO", "STREAM", stream)
  for i = 1, #facts, 2 do
    if facts[i] == "last-generated-id" then return facts[i + 1] end
  end
  return "0-0"
end

local function generation_of(text)
  local number = string.match(text or "", "^%d+$") and tonumber(text) or 0
  return number < GENERATION_MAX and number or 0
end

local function next_generation(known)
  local t = redis.call("TIME")
  return math.max(t[1] * 1000000 + t[2], known + 1)
end
