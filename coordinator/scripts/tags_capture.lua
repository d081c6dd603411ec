-- The versions of tags of one shard, before a loader starts; a tag without one gets one.
-- With _change.lua.
--
-- KEYS[1] head     hash   newest version of the shard, and of what outdated anything (o)
-- KEYS[2..] the tags' versions
-- ARGV[1] keep_ms  how long a tag version is kept unused
-- Returns for each tag in turn: version and hard version, as text, and if it was made now, the
--         version of the newest change in the shard that outdated anything, or 1; 0 otherwise
--
-- I1 A tag that was lost never gets a version that an entry may carry already.
-- I2 It works when memory is full: write-behind entries carry tags, too.

local found, drawn = {}, nil
for i = 2, #KEYS do
  local version, hard, made = nil, nil, 0
  local value = redis.call("GET", KEYS[i])
  if value then version, hard = tag_versions(value) end
  if version then
    redis.call("PEXPIRE", KEYS[i], ARGV[1])
  else
    if not drawn then
      -- A first write that memory limits never refuse; none after it is refused either (I2).
      redis.call("PERSIST", KEYS[1])
      local previous = whole_number(redis.call("HGET", KEYS[1], "v")) or 0
      drawn = string.format("%.0f", math.max(previous + 1, server_us()))
      redis.call("HSET", KEYS[1], "v", drawn)
    end
    local outdated = redis.call("HGET", KEYS[1], "o")
    if not whole_number(outdated) then outdated = 1 end
    version, hard, made = drawn, drawn, outdated
    redis.call("SET", KEYS[i], version, "PX", ARGV[1])
  end
  found[#found + 1] = version
  found[#found + 1] = hard
  found[#found + 1] = made
end
return found
