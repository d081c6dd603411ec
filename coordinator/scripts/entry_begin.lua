-- Begin to load a key: take its fill lease, unless somebody has it or the work is done.
-- With _change.lua.
--
-- KEYS[1] entry     string, expires   the stored envelope
-- KEYS[2] lease     string, expires   token of the one who may fill; "!": the source failed lately
-- ARGV[1] token     random, drawn by the caller before sending
-- ARGV[2] lease_ms  integer > 0
-- ARGV[3] seen      version that the caller found unusable; -1: it found no entry
-- ARGV[4] patient   1: the caller has something to serve while the source fails
-- Returns {1, entry, now_us} granted; {0, entry, 0, 0} there is a newer entry;
--         {0, false, left_ms, failing} another has it, or the source is left alone so long
--
-- I1 Nobody gets a lease while another token is present.
-- I2 Asked again with the same token (the reply was lost), it is granted again.
-- I3 No lease is given while a write-behind is pending: the source is older than the entry.

local entry = redis.call("GET", KEYS[1])
if version_of(entry) > tonumber(ARGV[3]) or pending_of(entry) > 0 then
  return { 0, entry, 0, 0 }
end
local holder = redis.call("GET", KEYS[2])
if holder and holder ~= ARGV[1] then
  local failing = holder == "!"
  if not failing or ARGV[4] == "1" then
    return { 0, false, redis.call("PTTL", KEYS[2]), failing and 1 or 0 }
  end
end
redis.call("SET", KEYS[2], ARGV[1], "PX", ARGV[2])
return { 1, entry, string.format("%.0f", server_us()) }
