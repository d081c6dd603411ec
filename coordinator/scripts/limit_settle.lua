-- Charge what a reservation really cost, in place of what was estimated.
-- With _gcra.lua.
--
-- KEYS[1] reservation  string, expires  the estimated costs, one for each limit
-- KEYS[2..] states     string, expires  theoretical arrival time of each limit
-- ARGV[1] now          "": the server's clock; else microseconds, for tests
-- ARGV[2] channel      where it is told that something was given back
-- ARGV[3] word         what is told there
-- ARGV[4..] limits, costs  per state: drain, weight, burst, shadow; then the actual costs
-- Returns 1 settled; 0 there is no such reservation
--
-- I1 A reservation is settled at most once; one that is not known changes nothing.
-- I2 More than estimated is charged whatever the debt is; less is given back.

local now, spare_ms = clock_us(ARGV[1])
local reserved = redis.call("GET", KEYS[1])
if not reserved then return 0 end

local count, estimates = #KEYS - 1, {}
for each in string.gmatch(reserved, "%d+") do estimates[#estimates + 1] = tonumber(each) end
redis.call("DEL", KEYS[1])
local less = false
for i = 1, count do
  local base = 4 * i
  local drain, weight = tonumber(ARGV[base]), tonumber(ARGV[base + 1])
  local change = tonumber(ARGV[3 + 4 * count + i]) - (estimates[i] or 0)
  local debt = debt_of(redis.call("GET", KEYS[i + 1]), now, drain)
  less = less or change < 0
  debt = math.max(0, math.min(debt + change * weight, DEBT_MAX))
  put_debt(KEYS[i + 1], debt, now, drain, spare_ms)
end
if less then redis.call("PUBLISH", ARGV[2], ARGV[3]) end
return 1
