-- The exact arithmetic of limits, in whole numbers below 2^53; limits/gcra.py says the same.
-- A state is the theoretical arrival time, microseconds, and when it was written: "tat@written", or
-- "tat+rest/drain@written" where it lies between two. Debt is the time until then, in units: drain
-- of them are paid in 1 us. A state that cannot be read is none.
-- With _numbers.lua.

local DEBT_MAX = 4503599627370496

-- The given time is for tests; what is written then outlives the test.
local function clock_us(given)
  if given ~= "" then return tonumber(given), 3600000 end
  local t = redis.call("TIME")
  return t[1] * 1000000 + t[2], 0
end

-- The debt, and whether the clock was set back since, so that the state must be written again.
local function debt_of(state, now, drain)
  if not state then return 0, false end
  local tat, rest, of, written = string.match(state, "^(%d+)%+?(%d*)/?(%d*)@?(%d*)$")
  tat, rest = whole_number(tat), whole_number(rest) or 0
  if not tat then return 0, false end
  local from = math.max(now, whole_number(written) or 0)
  if rest > 0 and tonumber(of) ~= drain then tat, rest = tat + 1, 0 end
  if tat < from then return 0, from > now end
  return math.min((tat - from) * drain + rest, DEBT_MAX), from > now
end

local function put_debt(key, debt, now, drain, spare_ms)
  if debt == 0 then return redis.call("DEL", key) end
  local whole = math.floor(debt / drain)
  local rest = debt - whole * drain
  local state = string.format("%.0f", now + whole)
  if rest > 0 then state = state .. string.format("+%.0f/%.0f", rest, drain) end
  state = state .. string.format("@%.0f", now)
  local ttl_ms = math.ceil((whole + 1) / 1000) + 1 + spare_ms
  redis.call("SET", key, state, "PX", string.format("%.0f", ttl_ms))
end

local function fits(debt, weight, burst, cost)
  return math.max(0, math.floor((weight * burst - debt) / (weight * cost)))
end
