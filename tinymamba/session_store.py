"""Where sessions are kept between turns: a folder, or a Redis-compatible server.

A session is stored as the bytes of a safetensors file (StreamingServer.pack_session), which has its
own checksum and the hash of its model. Who changes one holds its lease:

    lease = store.lease("talk", owner)  # None if another holds it
    store.put(lease, data, most=1024)   # also ends the lease

A lease ends by itself some seconds after its last renewal, and then another may be granted. Each
has a stamp, "NUMBER-OWNER", whose number grows with every lease. It is a fencing token (Kleppmann,
How to do distributed locking, 2016): `put` is refused, atomically, unless the lease is the last one
that was granted. So a server that was paused for longer than its lease changes nothing when it goes
on. What is stored has the stamp of the lease under which it was stored, which is its version, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from tinymamba.checkpoint import read_notes, write_bytes
from tinymamba.cli import UserError, need, require, say
from tinymamba.lock import NO_LOCKS

SUFFIX = ".safetensors"
TIMEOUT = 3.0  # seconds that a store may take to answer


class Unavailable(Exception):
    """The store does not answer, or cannot write. Whether it has done what it was asked is open."""


class Refused(Exception):
    """The lease is no longer the last one: another has been granted, or the session is deleted."""


class Full(Exception):
    """There are as many sessions as there may be."""


class Taken(Exception):
    """A saved session has this name."""


class Lease(NamedTuple):
    """The right to change a session, and what was found when it was granted."""

    session_id: str
    owner: str
    stamp: str  # of this lease
    found: str  # the stamp of what is stored; empty if nothing is
    value: bytes | None  # what is stored, unless it has the stamp that the caller knows


class Entry(NamedTuple):
    """What a list of sessions shows of one."""

    info: str  # JSON; empty in files of earlier versions
    leased: bool


class SessionStore(Protocol):
    """What both stores do; any method may raise Unavailable."""

    lease_seconds: float

    def lease(self, session_id: str, owner: str, known: str = "") -> Lease | None:
        """The lease of a session, which need not exist, or None while another holds it.

        `known` is the stamp of what the caller has already.
        """

    def renew(self, lease: Lease) -> str:
        """Go on holding a lease: "held"; "stop" if `stop` was called meanwhile; or "lost"."""

    def put(self, lease: Lease, value: bytes, most: int) -> None:
        """Store a session and end its lease; a second call with the same lease changes nothing.

        `value` has the stamp of the lease among its notes.
        Raises Refused, or Full if the session is new and there are `most` already.
        """

    def release(self, lease: Lease) -> None:
        """End a lease without storing anything, if it is still held."""

    def find(self, session_id: str) -> Entry | None:
        """What is known of a session."""

    def entries(self) -> dict[str, Entry]:
        """All sessions."""

    def delete(self, session_id: str) -> bool:
        """Delete a session, whoever holds its lease; whether there was one."""

    def stop(self, session_id: str) -> None:
        """Ask who holds the lease of a session to end its answer."""

    def save(self, name: str, value: bytes, overwrite: bool, most: int) -> None:
        """Keep a copy of a session under a name of its own; raises Taken or Full."""

    def load(self, name: str) -> bytes | None:
        """What was saved under this name."""

    def ping(self) -> None:
        """Raise Unavailable unless the store answers, and can write."""


def open_store(url: str, ttl: float, lease_seconds: float) -> SessionStore:
    """The store at redis://[USER:PASSWORD@]HOST:PORT/DB or rediss://, or the folder `url`.

    redis:// alone stands for what REDIS_URL says: a command line is seen by all users of a machine.
    A session that is not used for `ttl` seconds is deleted.
    """
    scheme, found, _ = url.partition("://")
    if not found:
        return FolderStore(Path(url), ttl, lease_seconds)
    field, remedy = "--session_store", "pass a folder, or redis://HOST:PORT/DB"
    require(scheme in ("redis", "rediss"), field, f"{scheme}:// is no session store", remedy)
    if url == "redis://":
        url = os.environ.get("REDIS_URL", "")
        require(url, field, "redis:// stands for REDIS_URL, which is not set", "set it")
    return RedisStore(url, ttl, lease_seconds)


# ------------------------------------------------------------------------------------- folder


class FolderStore:
    """A folder: open sessions in `kept`, saved ones beside it, each a file of `save_session`.

    The lease of a session is a small file. An operating system's lock keeps other processes of the
    machine, and other threads, from looking while one of them changes it.
    """

    def __init__(
        self, folder: Path, ttl: float, lease_seconds: float, clock: Callable[[], float] = time.time
    ):
        from filelock import FileLock

        self.folder, self.kept, self.ttl = folder, folder / "kept", ttl
        self.lease_seconds, self.clock = lease_seconds, clock
        self.mutex = threading.Lock()
        self.lock: Any = FileLock(
            folder / ".lock", timeout=TIMEOUT, thread_local=False, poll_interval=0.005
        )
        self.kept.mkdir(parents=True, exist_ok=True)
        try:
            with self.lock:
                for file in self.kept.glob(f"*{SUFFIX}"):  # nobody could use it meanwhile
                    os.utime(file, (clock(), clock()))
        except OSError as e:
            if e.errno not in NO_LOCKS:
                raise UserError(str(folder), f"cannot be locked ({e})", "choose another") from None
            say(f"warning: {folder} has no locks ({e.strerror}): let no second server use it")
            self.lock = contextlib.nullcontext()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep others from the folder for a moment; what goes wrong there is Unavailable.

        Of the threads that use a folder that hangs, one hangs with it, and the others give up.
        """
        if not self.mutex.acquire(timeout=TIMEOUT):
            raise Unavailable(f"{self.folder} has not answered another request")
        try:
            with self.lock:
                yield
        except OSError as e:  # a full disk, or a lock that stays held: Timeout
            raise Unavailable(str(e)) from None
        finally:
            self.mutex.release()

    @staticmethod
    def write(file: Path, value: bytes) -> None:
        """Write a file so that it survives a crash of the machine."""
        try:
            write_bytes(file, value)
        except UserError as e:
            raise Unavailable(" ".join(e.args[:2])) from None

    def file(self, session_id: str) -> Path | None:
        """The file of a session; None if there is none, or it has expired, which deletes it.

        One whose lease is held is in use, and does not expire.
        """
        file = self.kept / f"{session_id}{SUFFIX}"
        try:
            unused = self.clock() - file.stat().st_mtime
        except FileNotFoundError:
            return None
        if unused <= self.ttl or self.is_held(self.read_lease(session_id)):
            return file
        self.remove(session_id)
        return None

    def remove(self, session_id: str) -> None:
        """Delete the files of a session."""
        for suffix in (SUFFIX, ".lease"):
            (self.kept / f"{session_id}{suffix}").unlink(missing_ok=True)

    def read_lease(self, session_id: str) -> dict[str, Any]:
        """The last lease that was granted; its number is 0 if there is none."""
        try:
            return json.loads((self.kept / f"{session_id}.lease").read_bytes())
        except (FileNotFoundError, ValueError):  # a crash of the machine may leave it empty
            return {"number": 0, "owner": "", "expires": 0.0, "stop": False}

    def write_lease(self, session_id: str, lease: dict[str, Any]) -> None:
        """Replace the last lease; it need not survive a crash of the machine."""
        file = self.kept / f"{session_id}.lease"
        new = file.with_suffix(".new")
        new.write_text(json.dumps(lease), encoding="utf-8")
        new.replace(file)

    def is_held(self, lease: dict[str, Any]) -> bool:
        """Whether a lease has not ended."""
        return self.clock() < lease["expires"]

    def shorten(self, session_id: str, last: dict[str, Any]) -> None:
        """End a lease in time although the clock was set back since it was granted.

        Its holder, if there is one, renews it; if the clock was set forward, `put` is fenced.
        """
        latest = self.clock() + last.get("seconds", self.lease_seconds)
        if last["expires"] > latest:
            self.write_lease(session_id, {**last, "expires": latest})

    def is_last(self, lease: Lease, last: dict[str, Any]) -> bool:
        """Whether no other lease was granted after this one, and it was not ended."""
        return lease.stamp == f"{last['number']}-{last['owner']}"

    def end(self, session_id: str, last: dict[str, Any]) -> None:
        """End the last lease."""
        self.write_lease(session_id, {**last, "owner": "", "expires": 0.0})

    def lease(self, session_id: str, owner: str, known: str = "") -> Lease | None:
        """As SessionStore says."""
        with self.alone():
            last = self.read_lease(session_id)
            if self.is_held(last):
                self.shorten(session_id, last)
                return None
            file = self.file(session_id)
            number, seconds = last["number"] + 1, self.lease_seconds
            last = {"number": number, "owner": owner, "seconds": seconds, "stop": False}
            self.write_lease(session_id, {**last, "expires": self.clock() + seconds})
            stamp = f"{number}-{owner}"
            if not file:
                return Lease(session_id, owner, stamp, "", None)
            found = self.stamp(file)
            value = None if found == known else file.read_bytes()
            return Lease(session_id, owner, stamp, found, value)

    def stamp(self, file: Path) -> str:
        """The stamp of a file; one of an earlier version has its time instead."""
        return self.notes(file).get("stamp") or f"0-{file.stat().st_mtime_ns}"

    @staticmethod
    def notes(file: Path) -> dict[str, str]:
        """The notes of a file, which lie at its head."""
        with open(file, "rb") as f:
            size = f.read(8)
            return read_notes(size + f.read(min(int.from_bytes(size, "little"), 2**26)))

    def renew(self, lease: Lease) -> str:
        """As SessionStore says."""
        with self.alone():
            last = self.read_lease(lease.session_id)
            if not self.is_last(lease, last):
                return "lost"
            expires = self.clock() + self.lease_seconds
            self.write_lease(lease.session_id, {**last, "expires": expires, "stop": False})
            return "stop" if last["stop"] else "held"

    def put(self, lease: Lease, value: bytes, most: int) -> None:
        """As SessionStore says."""
        with self.alone():
            last, old = self.read_lease(lease.session_id), self.file(lease.session_id)
            if not old or self.stamp(old) != lease.stamp:
                if not self.is_last(lease, last):
                    raise Refused
                if not old and len(self.names()) >= most:
                    raise Full
                file = self.kept / f"{lease.session_id}{SUFFIX}"
                self.write(file, value)
                os.utime(file, (self.clock(), self.clock()))
            if self.is_last(lease, last):
                self.end(lease.session_id, last)

    def names(self) -> list[str]:
        """The open sessions; those that have expired are deleted."""
        names = sorted(file.stem for file in self.kept.glob(f"*{SUFFIX}"))
        return [name for name in names if self.file(name)]

    def release(self, lease: Lease) -> None:
        """As SessionStore says."""
        with self.alone():
            last = self.read_lease(lease.session_id)
            if not self.is_last(lease, last):
                return
            if self.file(lease.session_id):
                self.end(lease.session_id, last)
            else:
                self.remove(lease.session_id)

    def find(self, session_id: str) -> Entry | None:
        """As SessionStore says."""
        with self.alone():
            if not (file := self.file(session_id)):
                return None
            held = self.is_held(self.read_lease(session_id))
            return Entry(self.notes(file).get("info", ""), held)

    def entries(self) -> dict[str, Entry]:
        """As SessionStore says."""
        with self.alone():
            names = self.names()
        return {name: entry for name in names if (entry := self.find(name))}  # others may act, too

    def delete(self, session_id: str) -> bool:
        """As SessionStore says."""
        with self.alone():
            known = self.file(session_id) is not None
            self.remove(session_id)
            return known

    def stop(self, session_id: str) -> None:
        """As SessionStore says."""
        with self.alone():
            last = self.read_lease(session_id)
            if self.is_held(last):
                self.write_lease(session_id, {**last, "stop": True})

    def save(self, name: str, value: bytes, overwrite: bool, most: int) -> None:
        """As SessionStore says; other files are not replaced."""
        file = self.folder / f"{name}{SUFFIX}"
        with self.alone():
            there = os.path.lexists(file)
            if there and not overwrite:
                raise Taken
            is_session = there and file.is_file() and "session" in self.notes(file)
            problem, remedy = "exists, and is not a saved session", "choose another file"
            require(not there or is_session, name, problem, remedy)
            if not there and len([*self.folder.glob(f"*{SUFFIX}")]) >= most:
                raise Full
            self.write(file, value)

    def load(self, name: str) -> bytes | None:
        """As SessionStore says."""
        file = self.folder / f"{name}{SUFFIX}"
        with self.alone():
            return file.read_bytes() if file.is_file() else None

    def ping(self) -> None:
        """As SessionStore says."""
        with self.alone():
            (self.folder / ".ping").write_bytes(b"1")  # a full disk takes empty files
            (self.folder / ".ping").unlink()


# -------------------------------------------------------------------------------------- Redis
#
# Keys, all of which begin with "tinymamba:":
#   session:ID  hash of stamp, info and value     lease:ID  owner of the lease, while it is held
#   stop:ID     whether to end its answer         fence:ID  stamp of the last lease, until it ends
#   sessions    sorted set of IDs by time of use  leases    number of the last lease of all
#   saved       hash of saved sessions by name
#
# A script runs alone: nothing is read or written between its commands. Each may run twice, as the
# client repeats what got no answer.

GRANT = """
local held = redis.call('GET', KEYS[2])
if held and held ~= ARGV[1] then return {0} end
local fence = redis.call('GET', KEYS[3])
if not (held and fence) then
  redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2])
  redis.call('DEL', KEYS[4])
  fence = string.format('%d', redis.call('INCR', KEYS[5])) .. '-' .. ARGV[1]
  redis.call('SET', KEYS[3], fence, 'PX', ARGV[3])
end
local stamp = redis.call('HGET', KEYS[1], 'stamp')
if not stamp then return {1, fence, ''} end
if stamp == ARGV[4] then return {1, fence, stamp} end
return {1, fence, stamp, redis.call('HGET', KEYS[1], 'value')}
"""

RENEW = """
if redis.call('GET', KEYS[3]) ~= ARGV[4] then return 'lost' end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
redis.call('PEXPIRE', KEYS[3], ARGV[3])
if redis.call('DEL', KEYS[4]) == 1 then return 'stop' end
return 'held'
"""

PUT = """
local mine = redis.call('GET', KEYS[3]) == ARGV[4]
local stamp = redis.call('HGET', KEYS[1], 'stamp')
if stamp ~= ARGV[4] then
  if not mine then return 'refused' end
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  redis.call('ZREMRANGEBYSCORE', KEYS[6], '-inf', now - ARGV[3])
  if not stamp and redis.call('ZCARD', KEYS[6]) >= tonumber(ARGV[5]) then return 'full' end
  redis.call('HSET', KEYS[1], 'stamp', ARGV[4], 'info', ARGV[6], 'value', ARGV[7])
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  redis.call('ZADD', KEYS[6], now, ARGV[8])
end
if mine then redis.call('DEL', KEYS[2], KEYS[3]) end
return 'stored'
"""

RELEASE = """
if redis.call('GET', KEYS[3]) == ARGV[4] then redis.call('DEL', KEYS[2], KEYS[3]) end
"""

SAVE = """
local there = redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1
if there and ARGV[3] == '0' then return 'taken' end
if not there and redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[4]) then return 'full' end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 'stored'
"""

PREFIX = "tinymamba:"
MOST_DOUBTFUL = 1024  # sessions whose lease may have been granted without an answer


class RedisStore:
    """A Redis-compatible server: Redis from 5.0, or Valkey. Time is the server's."""

    def __init__(self, url: str, ttl: float, lease_seconds: float):
        redis = need("redis")
        field = "--session_store"
        self.ttl, self.lease_seconds, self.errors = ttl, lease_seconds, redis.exceptions
        self.doubtful: dict[str, str] = {}  # owners of leases that may have been granted
        # Closed connections only: of a server that hangs, new ones would take four time limits.
        closed = (redis.exceptions.ConnectionError,)
        retry = redis.retry.Retry(redis.backoff.NoBackoff(), 1, supported_errors=closed)
        try:
            parts = urlsplit(url)
            self.name = f"{parts.scheme}://{parts.hostname}:{parts.port or 6379}"  # no password
            self.client = redis.Redis.from_url(
                url,
                socket_timeout=TIMEOUT,
                socket_connect_timeout=TIMEOUT,
                health_check_interval=30,
                retry=retry,
            )
        except (ValueError, TypeError) as e:
            raise UserError(field, f"is no address ({e})", "pass redis://HOST:PORT/DB") from None
        sources = (GRANT, RENEW, PUT, RELEASE, SAVE)
        scripts = (self.client.register_script(source) for source in sources)
        self.grant_script, self.renew_script, self.put_script, *rest = scripts
        self.release_script, self.save_script = rest
        try:
            self.check_memory()
        except Unavailable as e:
            remedy = "start the server, or check the address and the password"
            raise UserError(field, f"{self.name} does not answer ({e})", remedy) from None

    def check_memory(self) -> None:
        """Warn of a server that deletes sessions when its memory is full."""
        with self.answering():
            self.client.ping()
        try:
            info: Any = self.client.info("memory")
        except self.errors.RedisError:  # some services do not tell
            return
        policy = info.get("maxmemory_policy", "noeviction")
        if info.get("maxmemory", 0) and policy != "noeviction":
            problem = f"{self.name} has maxmemory-policy {policy}: sessions are deleted"
            say(f"warning: {problem} when its memory is full; set noeviction")

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Errors of the server, and of the way to it, are Unavailable.

        After a fail-over, an open connection may lead to a server that only reads: all are closed.
        If a firewall has dropped one that was idle, it has dropped the others that are.
        """
        try:
            yield
        except self.errors.RedisError as e:
            if isinstance(e, self.errors.TimeoutError):
                self.client.connection_pool.disconnect(inuse_connections=False)
            if isinstance(e, self.errors.ReadOnlyError) or "READONLY" in str(e):
                self.client.connection_pool.disconnect()
            raise Unavailable(str(e) or type(e).__name__) from None

    def run(self, script: Any, lease: Lease, *more: Any) -> Any:
        """Call a script about the session of a lease."""
        kinds = ("session", "lease", "fence", "stop")
        keys = [f"{PREFIX}{kind}:{lease.session_id}" for kind in kinds]
        keys += [f"{PREFIX}leases", f"{PREFIX}sessions"]
        periods = [round(1000 * self.lease_seconds), round(1000 * self.ttl)]
        with self.answering():
            return script(keys=keys, args=[lease.owner, *periods, lease.stamp, *more])

    def lease(self, session_id: str, owner: str, known: str = "") -> Lease | None:
        """As SessionStore says."""
        owner = self.doubtful.pop(session_id, owner)
        asked = Lease(session_id, owner, known, "", None)
        try:
            granted, *rest = self.run(self.grant_script, asked)
        except Unavailable:  # a server that was paused grants it when it goes on: ask for the same
            if len(self.doubtful) >= MOST_DOUBTFUL:
                self.doubtful.clear()  # who asks for one that was granted waits until it ends
            self.doubtful[session_id] = owner
            raise
        if not granted:
            return None
        stamp, found, *value = rest
        return Lease(session_id, owner, stamp.decode(), found.decode(), value[0] if value else None)

    def renew(self, lease: Lease) -> str:
        """As SessionStore says."""
        return self.run(self.renew_script, lease).decode()

    def put(self, lease: Lease, value: bytes, most: int) -> None:
        """As SessionStore says."""
        info = read_notes(value).get("info", "")
        said = self.run(self.put_script, lease, most, info, value, lease.session_id)
        if said != b"stored":
            raise Full if said == b"full" else Refused

    def release(self, lease: Lease) -> None:
        """As SessionStore says."""
        self.run(self.release_script, lease)

    def find(self, session_id: str) -> Entry | None:
        """As SessionStore says."""
        return self.look([session_id]).get(session_id)

    def entries(self) -> dict[str, Entry]:
        """As SessionStore says."""
        with self.answering():
            names: Any = self.client.zrange(f"{PREFIX}sessions", 0, -1)
        return self.look([name.decode() for name in names])

    def look(self, names: list[str]) -> dict[str, Entry]:
        """What is known of those of these sessions that exist."""
        with self.answering(), self.client.pipeline(transaction=False) as asked:
            for name in names:
                asked.hget(f"{PREFIX}session:{name}", "info")
                asked.exists(f"{PREFIX}lease:{name}")
            said = asked.execute()
        pairs = zip(names, said[::2], said[1::2], strict=True)
        return {n: Entry(info.decode(), bool(held)) for n, info, held in pairs if info is not None}

    def delete(self, session_id: str) -> bool:
        """As SessionStore says."""
        with self.answering(), self.client.pipeline() as asked:
            asked.delete(f"{PREFIX}session:{session_id}")
            asked.delete(*(f"{PREFIX}{kind}:{session_id}" for kind in ("lease", "fence", "stop")))
            asked.zrem(f"{PREFIX}sessions", session_id)
            return bool(asked.execute()[0])

    def stop(self, session_id: str) -> None:
        """As SessionStore says."""
        with self.answering():
            period = round(1000 * self.lease_seconds)
            self.client.set(f"{PREFIX}stop:{session_id}", 1, px=period)

    def save(self, name: str, value: bytes, overwrite: bool, most: int) -> None:
        """As SessionStore says."""
        args = [name, value, int(overwrite), most]
        with self.answering():
            said: Any = self.save_script(keys=[f"{PREFIX}saved"], args=args)
        if said != b"stored":
            raise Full if said == b"full" else Taken

    def load(self, name: str) -> bytes | None:
        """As SessionStore says."""
        with self.answering():
            found: Any = self.client.hget(f"{PREFIX}saved", name)
        return found

    def ping(self) -> None:
        """As SessionStore says."""
        with self.answering():  # a write, which a server without memory refuses; it changes nothing
            self.client.setrange(f"{PREFIX}ping", 0, "")
