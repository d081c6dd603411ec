-- How scripts read numbers that are stored: anybody may have written anything there.
--
-- U1 A whole number has at most 16 digits and is below 2^53, so that it is exact and can be
--    written again. What is no such number is as good as not there.

local WHOLE_MAX = 9007199254740991

local function whole_number(text)
  if type(text) ~= "string" or #text > 16 or not string.match(text, "^%d+$") then return nil end
  local number = tonumber(text)
  return number < WHOLE_MAX and number or nil
end
