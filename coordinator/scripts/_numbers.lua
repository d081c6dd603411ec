-- How scripts read numbers that are stored: anybody may have written anything there.
--
-- U1 A whole number has at most 16 digits and is below 2^53, so that it is exact and can be
--    written again. Any other value is treated as absent.

local WHOLE_MAX = 9007199254740991

local function whole_number(text)
  if type(text) ~= "string" or #text > 16 or not string.match(text, "^%d+$") then return nil end
  local number = tonumber(text)
  return number < WHOLE_MAX and number or nil
end

-- A checkpoint as it is stored; the beginning of the stream, if it is not a stream id.
local function stored_id(text)
  local ms, seq = string.match(text or "", "^(%d+)-(%d+)$")
  for _, part in ipairs({ ms or "", seq or "" }) do
    local too_large = #part == 20 and part > "18446744073709551615"
    if part == "" or #part > 20 or too_large then return "0-0" end
  end
  return text
end
