"""The connection to a Redis or Valkey server: what it must be like, and how its errors are the service's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.errors import FULL_SECONDS, StoreFailed, StoreFull

_T = TypeVar("_T")
_LEAST_VERSION = (6, 2)
_WAITAOF_VERSION = (7, 2)
_FLAGS_VERSION = (7, 0)
_OWN = {"prefix", "persistence", "lease", "timeout"}
# of the client's own options those that change how the server is reached, and not how it is spoken to
_CLIENTS = {"db", "username", "password", "ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile"}
_CLIENTS |= {"ssl_check_hostname", "ssl_ca_path"}


@dataclass(frozen=True)
class RedisOptions:
    """A store's URL taken apart. ``url`` is what the client is given; ``lease`` and ``timeout`` are seconds."""

    url: str
    prefix: str = "memoryllm"
    persistence: bool = True
    lease: float = 10.0
    timeout: float = 10.0


def parse_url(url: str) -> RedisOptions:
    """``redis://[user:password@]host:port/db?prefix=…&persistence=none&lease=10&timeout=10``, ``rediss://`` for TLS,
    ``redis+unix:///path?db=0``; ``valkey`` may stand for ``redis``. Raises ValueError, which never shows the URL."""
    parts = urlsplit(url)
    scheme = {
        "redis": "redis", "valkey": "redis", "rediss": "rediss", "valkeys": "rediss",
        "redis+unix": "unix", "valkey+unix": "unix",
    }.get(parts.scheme)  # fmt: skip
    if scheme is None:
        raise ValueError(f"unknown store {parts.scheme}://")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    own = {name: query.pop(name) for name in _OWN & set(query)}
    if set(query) - _CLIENTS:
        raise ValueError("the Redis store's URL has a parameter that there is not")
    if own.get("persistence", "aof") not in ("aof", "none"):
        raise ValueError("the store's persistence is aof or none")
    prefix = own.get("prefix", "memoryllm")
    if not prefix or any(c in "{}:*?[]\\" or c.isspace() for c in prefix):
        raise ValueError("the store's prefix is a word without braces, colons and patterns")
    # urlunsplit leaves the slashes out where there is no host, as for a socket
    target = f"{scheme}://{parts.netloc}{parts.path}" + (f"?{urlencode(query)}" if query else "")
    try:
        lease, timeout = float(own.get("lease", 10)), float(own.get("timeout", 10))
        redis.ConnectionPool.from_url(target)
    except (ValueError, TypeError):
        # what is wrong may be a piece of the password
        raise ValueError("the Redis store's URL cannot be understood") from None
    if not 0.1 <= lease <= 3600 or not 0.1 <= timeout <= 600:
        raise ValueError("the store's lease is 0.1 to 3600 seconds, its timeout 0.1 to 600")
    return RedisOptions(target, prefix, own.get("persistence") != "none", lease, timeout)


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Raises StoreFull or StoreFailed in place of the client's errors; they may hold addresses, and are not shown."""
    try:
        yield
    except redis.exceptions.OutOfMemoryError as error:
        raise _full() from error
    except redis.exceptions.ResponseError as error:
        if "OOM" in str(error) or "MISCONF" in str(error):
            raise _full() from error
        raise StoreFailed(f"the store failed while {doing}") from error
    except redis.RedisError as error:
        raise StoreFailed(f"the store cannot be reached while {doing}") from error


def _full() -> StoreFull:
    return StoreFull("no room is left in the store; nothing was changed", retry_after=FULL_SECONDS)


class Server:
    """A checked connection. Nothing is ever sent twice by itself but what says so: a commit could count twice.

    Raises StoreFailed, with a message for the operator, if this is no server to keep memories on.
    """

    def __init__(self, options: RedisOptions) -> None:
        self.options = options
        self.client: Any = redis.Redis.from_url(
            options.url,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=options.timeout,
            socket_connect_timeout=options.timeout,
            health_check_interval=0,
            redis_connect_func=self._connected,
        )
        self._unchecked = True
        self._checking = threading.Lock()
        # whether a commit waits for the server's disk by itself
        self.waits = options.persistence
        try:
            self._wait_until_loaded()
            self._recheck()
        except redis.exceptions.AuthenticationError as error:
            self.close()
            if "password" not in self.client.connection_pool.connection_kwargs:
                raise StoreFailed("Redis wants a password, and the store's URL has none") from error
            raise StoreFailed("Redis refused the user or password of the store's URL") from error
        except redis.exceptions.NoPermissionError as error:
            self.close()
            raise StoreFailed(
                "this Redis user may not do what a store needs (INFO, scripts, keys)"
            ) from error
        except redis.RedisError as error:
            self.close()
            raise StoreFailed("the Redis server of the store's URL cannot be reached") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.client.close()

    # ------------------------------------------------------------ what it must be like

    def _wait_until_loaded(self) -> None:
        """A server that has just been started reads its file first."""
        until = time.monotonic() + self.options.timeout
        while True:
            try:
                self.client.ping()
                return
            except redis.exceptions.BusyLoadingError:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.05)

    def _connected(self, connection: Any) -> None:
        connection.on_connect()
        self._unchecked = True

    def _recheck(self) -> None:
        """Checks the server once more after a new connection to it: it may have come back as another. Whoever comes
        meanwhile waits for what is found."""
        with self._checking:
            if not self._unchecked:
                return
            self._unchecked = False
            try:
                self._check()
            except BaseException:
                self._unchecked = True
                raise

    def _check(self) -> None:
        info: dict[str, Any] = {}
        for section in ("server", "memory", "persistence", "replication", "cluster"):
            info |= self.client.info(section)
        text = str(info.get("valkey_version") or info.get("redis_version") or "0")
        version = tuple(int(part) for part in text.split(".")[:2])
        if version < _LEAST_VERSION:
            raise StoreFailed(f"Redis 6.2 or newer is needed to keep memories, this one is {text}")
        if info.get("cluster_enabled"):
            raise StoreFailed("a Redis Cluster cannot keep memories; use a single primary")
        if info.get("role") != "master":
            raise StoreFailed("this Redis server is a replica: give the store the primary's address")
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            raise StoreFailed(
                f"this Redis evicts keys when it is full (maxmemory-policy {policy}) and would lose memories: "
                "set maxmemory-policy noeviction"
            )
        waits = self.options.persistence and self._must_wait(info, version, text)
        # not before all is known: others commit meanwhile
        self._version, self.waits = version, waits

    def _must_wait(self, info: dict[str, Any], version: tuple[int, ...], text: str) -> bool:
        """Whether the server answers before its file is on the disk. Raises StoreFailed if it could not tell when."""
        if not info.get("aof_enabled"):
            raise StoreFailed(
                "this Redis has no append-only file and loses memories when it stops: set appendonly yes, "
                "or say ?persistence=none if that is what you want"
            )
        synced = self._configured("appendfsync")
        if synced == "no":
            raise StoreFailed(
                "this Redis leaves it to the system when its file is written (appendfsync no): set appendfsync always "
                "or everysec"
            )
        # while its file is written anew, "always" does not hold then
        always = synced == "always" and self._configured("no-appendfsync-on-rewrite") == "no"
        if not always and version < _WAITAOF_VERSION:
            raise StoreFailed(
                f"this Redis ({text}) cannot tell when an update has reached its disk: set appendfsync always "
                "and no-appendfsync-on-rewrite no, or use Redis or Valkey 7.2 or newer"
            )
        return not always

    def _configured(self, name: str) -> str:
        """What the server is set to; nothing where that is not known."""
        try:
            return str(self.client.config_get(name).get(name, ""))
        except redis.exceptions.ResponseError:
            # a hosted server may forbid CONFIG
            return ""

    # ------------------------------------------------------------ calls

    def script(self, source: str, keys: list[str], args: list[Any], pipeline: Any = None) -> Any:
        """Runs a script, or adds it to ``pipeline``. By its source, which spares asking whether the server knows it."""
        return (pipeline or self.client).eval(source, len(keys), *keys, *args)

    def settled(self, source: str, keys: list[str], args: list[Any]) -> Any:
        """A script's answer, when all that it and others have written is on the disk. Raises StoreFailed if not."""
        # once, since a check by another thread may change it meanwhile
        waits = self.waits
        pipeline = self.client.pipeline(transaction=False)
        self.script(source, keys, args, pipeline)
        if waits:
            self.wait(pipeline)
        answers = pipeline.execute()
        if waits:
            self.durable(answers)
        # before anything is acknowledged that went over a new connection
        self._recheck()
        if self.waits and not waits:
            raise StoreFailed(
                "the store came back as one that syncs its file later: nothing is acknowledged that was not waited for"
            )
        return answers[0]

    def although_full(self, source: str) -> str:
        """A script that may write its few bytes to a full server too, where the server can tell (Redis 7)."""
        return f"#!lua flags=allow-oom\n{source}" if self._version >= _FLAGS_VERSION else source

    def again(self, doing: str, call: Callable[[], _T]) -> _T:
        """``call``, once more if its connection turns out to be broken; for what may well be done twice.

        Raises StoreFull, StoreFailed.
        """
        with translated(doing):
            try:
                return call()
            except (redis.ConnectionError, redis.TimeoutError):
                self._drop_idle()
                return call()

    def once(self, doing: str, call: Callable[[], _T]) -> _T:
        """``call``, which is not repeated whatever happens. Raises StoreFull, StoreFailed."""
        with translated(doing):
            try:
                return call()
            except (redis.ConnectionError, redis.TimeoutError):
                self._drop_idle()
                raise

    def _drop_idle(self) -> None:
        """Closes the connections that wait in the pool, which are most likely broken too. What other threads are
        at is theirs: they will see for themselves."""
        self.client.connection_pool.disconnect(inuse_connections=False)

    def wait(self, pipeline: Any) -> None:
        """Has ``pipeline`` end with waiting until what it wrote, and all before it, is in the append-only file."""
        pipeline.execute_command("WAITAOF", 1, 0, int(self.options.timeout * 500))

    def durable(self, answers: list[Any]) -> None:
        """Raises StoreFailed unless the answers of such a pipeline say that it is on the disk."""
        if int(answers[-1][0]) < 1:
            raise StoreFailed(
                "the store did not confirm that the update is on its disk: nothing is acknowledged"
            )
