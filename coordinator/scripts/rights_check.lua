-- Which commands the server's ACL does not allow to the caller.
--
-- ARGV[1..] checks  each the number of its words, then the words of a command
-- Returns the positions, from 1, of the checks that the ACL refuses
--
-- I1 Nothing is written, and none of the commands is run.
-- I2 A command that this server does not know is not refused; a server without ACLs refuses none.

local refused, check, at = {}, 0, 1
while redis.acl_check_cmd and at <= #ARGV do
  local last = at + tonumber(ARGV[at])
  local known, allowed = pcall(redis.acl_check_cmd, unpack(ARGV, at + 1, last))
  check, at = check + 1, last + 1
  if known and not allowed then refused[#refused + 1] = check end
end
return refused
