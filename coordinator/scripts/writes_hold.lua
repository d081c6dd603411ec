-- Set aside the writes that their owner cannot bring to a sink, so that they do not block others.
--
-- KEYS[1] own       hash     o owner, e epoch
-- KEYS[2] stream    stream   where they are: the shard's writes, or those held already
-- KEYS[3] held      stream   writes held; their ids tell since when, f the id that each had
-- KEYS[4] tried     hash     id in held -> tokens of the members that could not decode the value
-- ARGV[1] owner     node id
-- ARGV[2] epoch     the owner's
-- ARGV[3] held_max  bound of the stream of those held
-- ARGV[4] token     of the member that could not decode the value; empty: none has tried
-- ARGV[5..] ids in the stream
-- Returns {1, id in held, ...}, one for each id: "" if held is full, "-" if it is not in the
-- stream; {0, epoch} fenced off: another owns it since
--
-- I1 A write is in one of the two streams, and never in both or in neither.
-- I2 Nothing is written for anyone but the owner of this epoch.
-- I3 It works when memory is full: a held write is removed from its former stream.
-- I4 A write without room stays in its stream.

local known = redis.call("HMGET", KEYS[1], "o", "e")
if known[1] ~= ARGV[1] or known[2] ~= ARGV[2] then return { 0, known[2] or "0" } end
if ARGV[4] ~= "" then redis.call("HLEN", KEYS[4]) end -- fails here if it is not a hash
local reply, room = { 1 }, ARGV[3] - redis.call("XLEN", KEYS[3])
-- A first write that memory limits never refuse; none after it is refused either (I3).
redis.call("PERSIST", KEYS[1])

local function hold(id)
  if KEYS[2] == KEYS[3] then return id end
  local entry = redis.call("XRANGE", KEYS[2], id, id)[1]
  if not entry then return "-" end
  if room <= 0 then return "" end
  room = room - 1
  local job = { v = "", j = "" }
  for i = 1, #entry[2], 2 do job[entry[2][i]] = entry[2][i + 1] end
  local held = redis.call("XADD", KEYS[3], "*", "v", job.v, "j", job.j, "f", id)
  redis.call("XDEL", KEYS[2], id)
  return held
end

for i = 5, #ARGV do
  local id = hold(ARGV[i])
  if ARGV[4] ~= "" and id ~= "" and id ~= "-" then
    local before = redis.call("HGET", KEYS[4], id)
    redis.call("HSET", KEYS[4], id, before and before .. " " .. ARGV[4] or ARGV[4])
  end
  reply[#reply + 1] = id
end
return reply
