-- Put into every script whose header says "With _lock.lua.": what all kinds of locks share.
-- With _numbers.lua.
--
-- A lock is a weighted semaphore with a queue; a mutex has room for one, a writer takes all of it.
-- record (hash): k kind, c capacity, v set if c was set live, t last token, r nonce released last;
--                per holder "h:NONCE": "weight token ends since", and "a:NONCE": about;
--                f in short: not there, nobody holds it; "=", one does; in both nobody waits and
--                c was not set live. Else "".
--                No value of 64 bytes or more, where about is short: it stays a listpack.
-- queue (zset): nonce -> ticket.  waiters (hash): nonce -> "beat weight lease about"
-- index (zset): name -> until when it may be held.  era (hash): rid, grace, max: longest lease given
-- All times in microseconds of this server's clock. A nonce begins with its process: "PROCESS.N".
--
-- L1 A token is larger than each before it, also if the record was lost: max(last + 1, clock).
-- L2 A holder counts until its end. Weights of holders never exceed the capacity, unless that
--    was lowered under them.
-- L3 Who waits and was not heard of for 3 s is passed over when its turn comes.
-- L4 What is handed to another process is held for 1 s only, until that has asked again.
-- L5 While a new era is in its grace, nothing is granted that was not held before.
-- L6 Whatever is held is in the index. What is there may be idle: it goes a minute or two after
--    its last use, so that taking and releasing need not touch the index each time. Locks work
--    without an index, where it is of another type.
-- L8 An unreadable line neither holds nor waits for a lock; an unreadable number counts as absent.
-- L7 What f says is so but for time: its holder may have ended.

local CAP_US = 30000000 -- the longest lease that there can be
local STALE_US, HANDOFF_US, ADMIT_MAX = 3000000, 1000000, 100
local KEEP_MS, TOUCH_US, FORGET_EACH = 3600000, 60000000, 32

local function server_us()
  local t = redis.call("TIME")
  return t[1] * 1000000 + t[2]
end

local function digits(number)
  return string.format("%.0f", number)
end

-- What the server says of its run; "" where a script cannot ask (fakeredis).
local function run_info()
  local info = redis.pcall("INFO", "server")
  return type(info) == "string" and info or ""
end

local function run_id(info)
  return string.match(info, "run_id:(%w+)") or ""
end

-- Until when nothing new is granted, and the longest lease that was given. A run of the server
-- that is new here may have lost what its predecessor granted.
-- Who has asked in this connection may tell which run it is: asking here costs as much as all else.
local function grace_of(run, now, told)
  local known = redis.call("HMGET", run, "rid", "grace", "max")
  local longest, grace = math.min(whole_number(known[3]) or CAP_US, CAP_US), whole_number(known[2]) or 0
  if grace > now + 2 * CAP_US then grace = 0 end
  if grace > now + longest then -- the clock was set back
    grace = now + longest
    redis.call("HSET", run, "grace", digits(grace))
  end
  if told and told ~= "" and known[1] == told then return grace, longest end
  local info = run_info()
  if known[1] and string.find(info, known[1], 1, true) then return grace, longest end
  redis.call("HSET", run, "rid", run_id(info), "grace", digits(now + longest), "max", digits(longest))
  return now + longest, longest
end

-- Have it in the index until the end of the minute after its token's, and forget some that is over.
local function note(noted, name, token, now)
  redis.pcall("ZADD", noted, digits((math.floor(token / TOUCH_US) + 2) * TOUCH_US), name)
  if now % FORGET_EACH > 0 then return end
  local over = redis.pcall("ZRANGEBYSCORE", noted, "-inf", digits(now), "LIMIT", 0, 2 * FORGET_EACH)
  if not over.err and #over > 0 then redis.call("ZREM", noted, unpack(over)) end
end

local function process_of(nonce)
  return string.match(nonce, "^[^.]*")
end

-- A namespace may hold no colon: what is before the number of the shard.
local function wake_of(near, process)
  return "forebay:" .. string.match(near, "^{([^:]*):") .. ":wake:" .. process
end

local function load(stored, now)
  local lock = { t = 0, c = 1, used = 0, count = 0, holders = {}, about = {}, ended = {}, now = now }
  local raw = redis.call("HGETALL", stored)
  for i = 1, #raw, 2 do
    local field, value = raw[i], raw[i + 1]
    if #field == 1 then
      local counts = field == "t" or field == "c"
      lock[field] = not counts and value or whole_number(value) or lock[field]
    elseif string.sub(field, 1, 2) == "a:" then
      lock.about[string.sub(field, 3)] = value
    else
      local weight, token, ends = string.match(value, "^(%d+) (%d+) (%d+) %d+$")
      weight, ends = whole_number(weight), whole_number(ends)
      if weight and ends and whole_number(token) and ends > now then
        lock.holders[string.sub(field, 3)] = { weight = weight, token = token, ends = ends, line = value }
        lock.used, lock.count = lock.used + weight, lock.count + 1
      else
        lock.ended[#lock.ended + 1] = field
        lock.ended[#lock.ended + 1] = "a:" .. string.sub(field, 3)
      end
    end
  end
  return lock
end

local function fits(lock, weight)
  return lock.used + math.min(weight, lock.c) <= lock.c
end

local function soonest(lock)
  local found
  for _, each in pairs(lock.holders) do
    if not found or each.ends < found then found = each.ends end
  end
  return found
end

local function hold(held_in, lock, nonce, weight, token, ends, since, about)
  local text = digits(token)
  local from = since == token and text or digits(since)
  local line = weight .. " " .. text .. " " .. digits(ends) .. " " .. from
  lock.holders[nonce] = { weight = weight, token = text, ends = ends, line = line }
  lock.used, lock.count = lock.used + weight, lock.count + 1
  lock.about[nonce], lock.given = about, true
  lock.t = math.max(lock.t, token)
  local last = token < lock.t and digits(lock.t) or text
  redis.call("HSET", held_in, "t", last, "h:" .. nonce, line, "a:" .. nonce, about)
  if lock.changed then redis.call("HSET", held_in, "k", lock.k, "c", digits(lock.c)) end
end

local function drop(dropped_from, lock, nonce)
  local held = lock.holders[nonce]
  lock.holders[nonce] = nil
  lock.used, lock.count = lock.used - held.weight, lock.count - 1
  redis.call("HDEL", dropped_from, "h:" .. nonce, "a:" .. nonce)
end

local function first_alive(places, asking, now)
  while true do
    local head = redis.call("ZRANGE", places, 0, 0)[1]
    if not head then return nil end
    local line = redis.call("HGET", asking, head) or ""
    local beat, weight, lease_us, about = string.match(line, "^(%d+) (%d+) (%d+) (.*)$")
    beat, weight, lease_us = whole_number(beat), whole_number(weight), whole_number(lease_us)
    if beat and weight and lease_us and beat + STALE_US > now then return head, weight, lease_us, about end
    redis.call("ZREM", places, head)
    redis.call("HDEL", asking, head)
  end
end

-- Hand the lock to the head of the queue, and to the next while they fit. Those of the caller's
-- process are in the answer: nonce, token, ...; another process is told on its channel.
local function admit(record, queue, waiters, lock, now, process)
  local answer = {}
  for _ = 1, ADMIT_MAX do
    local head, weight, lease_us, about = first_alive(queue, waiters, now)
    if not head or not fits(lock, weight) then break end
    local here, token = process_of(head) == process, math.max(lock.t + 1, now)
    local ends = now + (here and lease_us or math.min(lease_us, HANDOFF_US))
    hold(record, lock, head, weight, token, ends, now, about)
    redis.call("ZREM", queue, head)
    redis.call("HDEL", waiters, head)
    if here then
      answer[#answer + 1] = head
      answer[#answer + 1] = digits(token)
    else
      redis.call("PUBLISH", wake_of(record, process_of(head)), "g " .. head)
    end
  end
  return answer
end

-- The last writes of a change: what has ended goes, and what there is is said in short.
local function settle(changed, overview, places, lock, name)
  if #lock.ended > 0 then redis.call("HDEL", changed, unpack(lock.ended)) end
  if lock.v or lock.count > 1 or redis.call("EXISTS", places) == 1 then
    if lock.f ~= "" and lock.k then redis.call("HSET", changed, "f", "") end
  elseif lock.count == 1 then
    if lock.f ~= "=" then redis.call("HSET", changed, "f", "=") end
  elseif lock.f then
    redis.call("HDEL", changed, "f")
  end
  if lock.count == 0 then return end
  if not lock.v then redis.call("PEXPIRE", changed, KEEP_MS) end
  note(overview, name, math.max(lock.t, lock.now), lock.now)
end
