-- The exact arithmetic of limits, in whole numbers below 2^53; limits/gcra.py says the same.
-- A state is the theoretical arrival time, microseconds: "tat", or "tat+rest/drain" where it
-- lies between two. Debt is the time until then, in units: drain of them are paid in 1 us.
-- Where more than a burst is owed it is "tat+0/written": with the time at which that was so.
local DEBT_MAX = 4503599627370496

-- The given time is for tests; what is written then outlives the test.
local function clock_us(given)
  if given ~= "" then return tonumber(given), 3600000 end
  local t = redis.call("TIME")
  return t[1] * 1000000 + t[2], 0
end

-- The debt, and whether the clock was set back since: then the state is to be written anew.
local function debt_of(state, now, drain, capacity)
  if not state then return 0, false end
  local tat, rest, of = string.match(state, "^(%d+)%+?(%d*)/?(%d*)$")
  tat, of = tonumber(tat), tonumber(of)
  local forced_at = rest == "0" and of
  rest = tonumber(rest) or 0
  local from = math.max(now, forced_at or 0)
  if rest > 0 and of ~= drain then tat, rest = tat + 1, 0 end
  local debt = tat < from and 0 or math.min((tat - from) * drain + rest, DEBT_MAX)
  if forced_at then return debt, now < forced_at end
  return math.min(debt, capacity), debt > capacity
end

local function put_debt(key, debt, now, drain, spare_ms, capacity)
  if debt == 0 then return redis.call("DEL", key) end
  local whole = math.floor(debt / drain)
  local rest = debt - whole * drain
  local state = string.format("%.0f+%.0f/%.0f", now + whole, rest, drain)
  if debt > capacity then
    state = string.format("%.0f+0/%.0f", now + whole + (rest > 0 and 1 or 0), now)
  elseif rest == 0 then
    state = string.format("%.0f", now + whole)
  end
  local ttl_ms = math.ceil((whole + 1) / 1000) + 1 + spare_ms
  redis.call("SET", key, state, "PX", string.format("%.0f", ttl_ms))
end

local function fits(debt, weight, burst, cost)
  return math.max(0, math.floor((weight * burst - debt) / (weight * cost)))
end
