"""The Lua scripts of the Redis store: what must happen at once, or not at all.

Keys of one tenant share a hash tag. ``holder`` names the claim that may write: ``<number>:<server>``, where the number
rises with every claim, so that a server that slept through the end of its claim is recognised when it wakes.
"""

from __future__ import annotations

# KEYS lease, holder, fence, wanted, manifest, erasing, index; ARGV server, ttl (ms), tenant, anew (1: a new number
# even if the lease is ours). Returns {1, holder, manifest or false, indexed} or {0, milliseconds left}.
CLAIM = """
local lease = redis.call('GET', KEYS[1])
if lease and string.match(lease, ':(.*)$') ~= ARGV[1] then
  redis.call('SET', KEYS[4], '1', 'PX', ARGV[2])
  return {0, redis.call('PTTL', KEYS[1])}
end
local holder = lease
if not lease or ARGV[4] == '1' or redis.call('GET', KEYS[2]) ~= lease then
  holder = redis.call('INCR', KEYS[3]) .. ':' .. ARGV[1]
  redis.call('SET', KEYS[2], holder)
end
redis.call('SET', KEYS[1], holder, 'PX', ARGV[2])
redis.call('DEL', KEYS[4])
local indexed = redis.call('ZSCORE', KEYS[7], ARGV[3])
return {1, holder, redis.call('GET', KEYS[5]), indexed and 1 or 0, redis.call('EXISTS', KEYS[6])}
"""

# KEYS lease, wanted; ARGV holder, ttl (ms). Returns {1, wanted} while the claim holds, {0} when it does not.
RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return {0} end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {1, redis.call('EXISTS', KEYS[2])}
"""

# KEYS lease, wanted; ARGV holder. Gives the lease up if it is still this claim's.
RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1], KEYS[2]) end
return 1
"""

# KEYS manifest, holder, index, erasing; ARGV holder, mark of the manifest that must be there ('': none), the new
# manifest, tenant. Returns 'ok', or why not: 'fenced', 'exists', 'changed'.
SWAP = """
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 'fenced' end
if redis.call('EXISTS', KEYS[4]) == 1 then return 'changed' end
local now = redis.call('GET', KEYS[1])
if ARGV[2] == '' then
  if now or redis.call('ZSCORE', KEYS[3], ARGV[4]) then return 'exists' end
elseif not now or string.sub(now, 1, 32) ~= ARGV[2] then
  return 'changed'
end
redis.call('SET', KEYS[1], ARGV[3])
redis.call('ZADD', KEYS[3], 0, ARGV[4])
return 'ok'
"""

# KEYS manifest, holder, erasing, index; ARGV holder, tenant. Takes the tenant out of reach. Only commands that a full
# server allows. Returns 'ok', 'absent' or 'fenced'.
ERASE = """
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 'fenced' end
if redis.call('EXISTS', KEYS[3]) == 1 then return 'ok' end
if redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('RENAME', KEYS[1], KEYS[3])
  return 'ok'
end
if redis.call('ZSCORE', KEYS[4], ARGV[2]) then return 'ok' end
return 'absent'
"""

# KEYS erasing, index, blobs, fence, holder, lease, wanted, manifest; ARGV holder, tenant. The end of an erasure.
ERASED = """
if redis.call('GET', KEYS[5]) ~= ARGV[1] then return 'fenced' end
if redis.call('EXISTS', KEYS[8]) == 1 then return 'changed' end
redis.call('ZREM', KEYS[2], ARGV[2])
redis.call('UNLINK', KEYS[1], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7])
return 'ok'
"""
