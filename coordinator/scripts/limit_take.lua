-- Decide a queue of asks on all limits of one subject, one after the other, at one instant.
-- With _gcra.lua.
--
-- KEYS[1..] states  string, expires  theoretical arrival time of each limit
-- ARGV[1] now       "": the server's clock; else microseconds, for tests
-- ARGV[2] channel   where it is told that something was given back
-- ARGV[3] word      what is told there
-- ARGV[4..] limits, runs
--           per key: drain, weight, burst, 1 if it is a shadow else 0; then per run of equal
--           asks: t take, p peek, f force or r refund; how many; the cost of one to each key
-- Returns per run: asks granted, number of the key that binds, what remains of it, wait for
--         one more ask, time until it is full (microseconds); then per key: refusals as a shadow
--
-- I1 An ask is granted by all limits or by none; first come, first served.
-- I2 A refusal or a mere look writes nothing, unless the clock was set back.
-- I3 A shadow refuses nothing; it is charged what it would have granted, alone.
-- I4 force charges whatever the debt is; refund never makes a debt negative.

local now, spare_ms = clock_us(ARGV[1])
local count, at = #KEYS, 4
local drain, weight, burst, shadow, debt, first, over = {}, {}, {}, {}, {}, {}, {}
local enforced = false
for i = 1, count do
  drain[i], weight[i], burst[i] = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  shadow[i], over[i] = ARGV[at + 3] == "1", 0
  enforced = enforced or not shadow[i]
  local is_set_back
  debt[i], is_set_back = debt_of(redis.call("GET", KEYS[i]), now, drain[i])
  first[i] = is_set_back and -1 or debt[i]
  at = at + 4
end

local function charge(i, mode, asks, cost)
  if mode == "t" then
    local charged = asks
    if shadow[i] then charged = math.min(asks, fits(debt[i], weight[i], burst[i], cost)) end
    over[i] = over[i] + asks - charged
    debt[i] = debt[i] + charged * cost * weight[i]
  elseif mode == "f" then
    debt[i] = math.min(debt[i] + asks * cost * weight[i], DEBT_MAX)
  elseif mode == "r" then
    debt[i] = math.max(debt[i] - asks * cost * weight[i], 0)
  end
end

-- The limit that lets the next ask wait longest; if none does, the one with least left.
local function binding(base)
  local chosen, wait, least = 0, 0, nil
  for i = 1, count do
    if not (enforced and shadow[i]) then
      local cost = tonumber(ARGV[base + i])
      local lack = debt[i] + cost * weight[i] - burst[i] * weight[i]
      local waits = math.max(0, math.ceil(lack / drain[i]))
      local left = fits(debt[i], weight[i], burst[i], 1)
      if chosen == 0 or waits > wait or (waits == wait and wait == 0 and left < least) then
        chosen, wait, least = i, waits, left
      end
    end
  end
  return chosen, wait, least
end

local replies, refunded = {}, false
while at <= #ARGV do
  local mode, asks, base = ARGV[at], tonumber(ARGV[at + 1]), at + 1
  local granted = asks
  if mode == "t" or mode == "p" then
    for i = 1, count do
      if not shadow[i] then
        local room = fits(debt[i], weight[i], burst[i], tonumber(ARGV[base + i]))
        granted = math.min(granted, room)
      end
    end
  end
  for i = 1, count do charge(i, mode, granted, tonumber(ARGV[base + i])) end
  local chosen, wait, left = binding(base)
  for _, value in ipairs({ granted, chosen, left, wait, math.ceil(debt[chosen] / drain[chosen]) }) do
    replies[#replies + 1] = value
  end
  refunded = refunded or mode == "r"
  at = base + count + 1
end

for i = 1, count do
  if debt[i] ~= first[i] then put_debt(KEYS[i], debt[i], now, drain[i], spare_ms) end
  replies[#replies + 1] = over[i]
end
if refunded then redis.call("PUBLISH", ARGV[2], ARGV[3]) end
return replies
