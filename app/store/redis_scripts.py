"""The Lua scripts of the Redis store: what must happen at once, or not at all.

Keys of one tenant share a hash tag. ``lease`` names the claim that may write: ``<number>:<server>``. The number rises
with every claim of any tenant and is never given twice, so that a server that slept through the end of its claim is
recognised when it wakes, and what it sent before as well. Without a lease nobody writes.
"""

from __future__ import annotations

# KEYS lease, fence, wanted, manifest, erasing, index; ARGV server, ttl (ms), tenant, anew (1: a new number even if the
# lease is ours). Returns {1, lease, manifest or false, listed, erasing} or {0, milliseconds left}.
CLAIM = """
local lease = redis.call('GET', KEYS[1])
if lease and string.match(lease, ':(.*)$') ~= ARGV[1] then
  redis.call('SET', KEYS[3], '1', 'PX', ARGV[2])
  return {0, redis.call('PTTL', KEYS[1])}
end
if not lease or ARGV[4] == '1' then
  lease = redis.call('INCR', KEYS[2]) .. ':' .. ARGV[1]
end
redis.call('SET', KEYS[1], lease, 'PX', ARGV[2])
redis.call('DEL', KEYS[3])
local listed = redis.call('ZSCORE', KEYS[6], ARGV[3])
return {1, lease, redis.call('GET', KEYS[4]), listed and 1 or 0, redis.call('EXISTS', KEYS[5])}
"""

# KEYS lease; ARGV the claim's lease, ttl (ms). Returns 1 while the claim holds, 0 when it does not.
RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""

# KEYS lease, wanted; ARGV the claim's lease. Gives it up if it is still this claim's.
RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1], KEYS[2]) end
return 1
"""

# KEYS manifest, lease, index, erasing; ARGV lease, mark of the manifest that must be there ('': none), the new
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

# KEYS manifest, lease, erasing, index; ARGV lease, tenant. Takes the tenant out of reach. Only commands that a full
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

# KEYS erasing, index, blobs, lease, wanted, manifest; ARGV lease, tenant. The end of an erasure. A second time, as
# after an answer that was lost, it changes nothing.
ERASED = """
if redis.call('GET', KEYS[4]) ~= ARGV[1] then
  if redis.call('EXISTS', KEYS[1], KEYS[3], KEYS[6]) == 0 and not redis.call('ZSCORE', KEYS[2], ARGV[2]) then
    return 'ok'
  end
  return 'fenced'
end
if redis.call('EXISTS', KEYS[6]) == 1 then return 'changed' end
redis.call('ZREM', KEYS[2], ARGV[2])
redis.call('UNLINK', KEYS[1], KEYS[3], KEYS[4], KEYS[5])
return 'ok'
"""
