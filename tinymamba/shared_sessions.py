"""Sessions that several servers share: each turn is stored before it is acknowledged.

    sessions = SharedSessions(server, store, options, metrics)
    held = await sessions.hold("talk")  # nobody else may change it now; its newest version is here
    ...                                 # a turn
    await held.commit()                 # it is stored, or an ApiError

`server.sessions` is a cache of the store: a session that another server has continued is loaded
when a request names it. Without a store (None) nothing is stored, and a session is held within this
process only.

It needs fastapi: pip install fastapi
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

from tinymamba.breaker import Breaker, NotAsked
from tinymamba.cli import UserError
from tinymamba.openai_api import ApiError
from tinymamba.session_store import Entry, Full, Lease, Refused, Taken, Unavailable

POLL = 0.05  # seconds between two looks at a lease that another server holds
RENEWALS = 4  # in the time of a lease
MOST_KEYS = 64  # turns of a session whose keys are known
MOST_REPLY = 2**24  # bytes of an answer that is kept; the head of a file has at most 10^8
RETRY = {"Retry-After": "1"}


def session_busy(session_id: str) -> ApiError:
    """The error of a request that would change a session while another one does."""
    problem = f"session {session_id} is answering; wait or stop it"
    return ApiError(409, problem, "session_id", "session_busy", RETRY)


def no_session(session_id: str) -> ApiError:
    """The error of a request for a session that does not exist."""
    return ApiError(404, f"there is no session {session_id}", "session_id", "not_found")


def too_many(what: str) -> ApiError:
    """The error of one session more than there may be."""
    problem = f"there are already {what}; delete some"
    return ApiError(429, problem, None, "too_many_sessions", {"Retry-After": "60"})


def unavailable(writing: bool) -> ApiError:
    """The error of a request that the store did not answer."""
    problem = "the session store does not answer, and nothing was changed; try again"
    if writing:
        problem = "the session store did not confirm the change, which may be stored or not; "
        problem += "try again, and send turns with an Idempotency-Key, so that none is doubled"
    return ApiError(503, problem, None, "store_unavailable", RETRY)


def digest(text: str) -> str:
    """A short hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Held:
    """A session that one request may change, until it is committed or released."""

    def __init__(self, sessions: SharedSessions, session_id: str, lease: Lease | None):
        self.sessions, self.session_id, self.lease = sessions, session_id, lease
        self.open = True
        self.on_lost: Callable[[], object] = bool  # called once another server has continued it
        self.renewals = asyncio.ensure_future(self.renew()) if lease else None

    async def renew(self) -> None:
        """Renew the lease again and again."""
        sessions = self.sessions
        while True:
            await asyncio.sleep(sessions.store.lease_seconds / RENEWALS)
            with contextlib.suppress(ApiError):  # `commit` will find out whether it is lost
                said = await sessions.ask("renew", sessions.store.renew, self.lease)
                if said == "stop":
                    await sessions.engine.call(sessions.engine.stop, self.session_id)
                elif said == "lost":
                    self.on_lost()
                    return

    async def commit(self) -> None:
        """Store the session and end its lease."""
        sessions, lease = self.sessions, self.lease
        if lease:
            value = await asyncio.to_thread(self.pack, lease.stamp)
            most = sessions.options.max_sessions
            await sessions.ask("put", sessions.store.put, lease, value, most)
            sessions.set_stamp(self.session_id, lease.stamp)
            self.lease = None
        self.release()

    def pack(self, stamp: str) -> bytes:
        """The session as it is stored."""
        try:
            return self.sessions.server.pack_session(self.session_id, stamp)
        except UserError:
            raise ApiError(409, "the session was deleted", "session_id") from None

    def release(self) -> None:
        """End the lease; a second call does nothing."""
        if not self.open:
            return
        self.open = False
        self.sessions.held.pop(self.session_id, None)
        if self.renewals:
            self.renewals.cancel()
        if self.lease:
            self.sessions.release(self.lease)


class SharedSessions:
    """The sessions of a StreamingServer, and the store that keeps them, or None."""

    def __init__(self, server: Any, store: Any, options: Any, metrics: Any):
        self.server, self.options, self.metrics = server, options, metrics
        self.store: Any = store  # a SessionStore
        self.engine: Any = None  # the Engine, once the app has started
        self.held: dict[str, Held | None] = {}  # by the requests of this process
        self.breaker = Breaker(self.release_rest, self.release_late)
        self.unreleased: list[Lease] = []  # whose release waits until the store answers
        self.pinging: asyncio.Future | None = None  # the last `ping`

    # The store -------------------------------------------------------------------------------

    async def ask(self, operation: str, function: Callable, *arguments: Any) -> Any:
        """Call a function of the store; its errors are ApiErrors."""

        def timed() -> Any:
            with self.metrics.store_seconds.labels(operation).time():
                return function(*arguments)

        try:
            return await self.breaker.run(timed)
        except Unavailable as e:
            self.metrics.store_failures.labels("unavailable").inc()
            asked = not isinstance(e, NotAsked)
            if asked:
                logging.getLogger("serve").warning("the session store: %s: %s", operation, e)
            raise unavailable(asked and operation in ("put", "delete", "save")) from None
        except Refused:
            self.metrics.store_failures.labels("refused").inc()
            problem = "another server has continued this session, or deleted it"
            raise ApiError(409, problem, "session_id", "session_lost", RETRY) from None
        except Full:
            raise too_many(f"{self.options.max_sessions} sessions") from None
        except Taken:
            problem = "name: exists; set overwrite or choose another"
            raise ApiError(409, problem, "name", "name_taken") from None

    async def ping(self) -> None:
        """Raise an ApiError unless the store answers.

        Who asks meanwhile waits for the same answer: else a few who ask a slow store would take all
        threads.
        """
        if not self.pinging or self.pinging.done():
            self.pinging = asyncio.ensure_future(self.ask("ping", self.store.ping))
        await asyncio.shield(self.pinging)

    def release(self, lease: Lease) -> None:
        """End a lease in the background, or once the store answers; else it ends by itself."""
        lease = lease._replace(value=None)  # it may be large

        def keep(call: Future) -> None:
            if call.cancelled():
                self.unreleased.append(lease)

        if self.breaker.tripped:
            self.unreleased.append(lease)
        else:
            self.breaker.submit(self.store.release, lease).add_done_callback(keep)

    def release_rest(self) -> None:
        """End the leases that could not be ended while the store hung."""
        leases, self.unreleased = self.unreleased, []
        for lease in leases:
            self.release(lease)

    def release_late(self, result: Any) -> None:
        """End a lease that was granted when nobody waited for it any more."""
        if isinstance(result, Lease):
            self.release(result)

    def close(self) -> None:
        """End all leases, and the threads."""
        for held in [*self.held.values()]:
            if held and held.lease:
                self.release(held.lease)
        self.breaker.end()

    # One session -----------------------------------------------------------------------------

    async def hold(self, session_id: str, new: bool = False) -> Held:
        """Let nobody else change a session, and have its newest version in memory.

        If another server holds it, this waits until its lease is released or must have ended. The
        session need not exist; `new` says that it is to be made.
        """
        if session_id in self.held:
            raise self.taken(session_id) if new else session_busy(session_id)
        self.held[session_id] = None
        lease = None
        try:
            if self.store:
                lease = await self.wait_for_lease(session_id)
                await self.update(lease)
                self.set_stamp(session_id, "")  # until `commit`, it may be another than the store's
            held = self.held[session_id] = Held(self, session_id, lease)
        except BaseException:
            del self.held[session_id]
            if lease:
                self.release(lease)
            raise
        return held

    @contextlib.asynccontextmanager
    async def holding(self, session_id: str, new: bool = False) -> AsyncIterator[Held]:
        """Hold a session for the body of a `with`, which may commit it."""
        held = await self.hold(session_id, new)
        try:
            yield held
        finally:
            held.release()

    @staticmethod
    def taken(session_id: str) -> ApiError:
        """The error of a new session whose id is in use."""
        return ApiError(409, f"id: {session_id} exists; choose another", "id", "id_taken")

    async def wait_for_lease(self, session_id: str) -> Lease:
        """The lease of a session, once its holder has released it, or is dead."""
        owner, loop = secrets.token_hex(8), asyncio.get_running_loop()
        session = self.server.sessions.get(session_id)
        known = session.stamp if session else ""
        deadline = loop.time() + self.store.lease_seconds + 4 * POLL
        while True:
            lease = await self.ask("lease", self.store.lease, session_id, owner, known)
            if lease and lease.found == known:
                return lease
            if lease and lease.found and lease.value is None:
                self.release(lease)
                raise self.unusable(session_id, "has no value in the store")
            if lease:
                return lease
            if loop.time() > deadline:
                self.metrics.store_failures.labels("busy").inc()
                raise session_busy(session_id)
            await asyncio.sleep(POLL)

    @staticmethod
    def unusable(session_id: str, problem: str) -> ApiError:
        """The error of a session that this server cannot continue."""
        return ApiError(409, f"session {session_id}: {problem}", "session_id", "session_unusable")

    async def update(self, lease: Lease) -> None:
        """Have in memory what the lease has found."""
        name = lease.session_id
        if not lease.found:
            await self.forget(name)
        elif lease.value is not None:
            try:
                unpack = self.server.unpack_session
                session = await asyncio.to_thread(unpack, lease.value, name, name)
            except UserError as e:
                self.metrics.store_failures.labels("unusable").inc()
                raise self.unusable(name, f"{e.args[1]}; {e.args[2]}") from None
            await self.engine.call(self.insert, session)
            self.metrics.session_loads.inc()

    def set_stamp(self, session_id: str, stamp: str) -> None:
        """Note what the store has of a session in memory; empty if that may be something else."""
        if session := self.server.sessions.get(session_id):
            session.stamp = stamp

    def insert(self, session: Any) -> None:
        """Put a session into memory, in the engine's thread."""
        if session.id not in self.server.sessions:
            self.make_room()
        session.used = time.time()  # now: else one that was stored long ago would be deleted
        self.server.insert(session, replace=True)

    def make_room(self) -> None:
        """Drop the sessions that were not used for longest from memory, in the engine's thread."""
        idle = [s for s in self.server.sessions.values() if s.id not in self.held]
        excess = len(self.server.sessions) + 1 - self.options.max_sessions
        for session in sorted(idle, key=lambda s: s.used)[: max(excess, 0)] if self.store else ():
            self.server.delete_session(session.id)

    async def forget(self, session_id: str) -> None:
        """Drop a session from memory, if it is there."""

        def work() -> None:
            if session_id in self.server.sessions:
                self.server.delete_session(session_id)

        if session_id in self.server.sessions:
            await self.engine.call(work)

    async def delete(self, session_id: str) -> bool:
        """Delete a session, and end its answer; whether it was there."""
        known = session_id in self.server.sessions
        if self.store:
            known = await self.ask("delete", self.store.delete, session_id)
        await self.forget(session_id)
        return known

    async def stop(self, session_id: str) -> None:
        """End the answer of a session, also if another server gives it."""
        if self.store and not self.held.get(session_id):
            await self.ask("stop", self.store.stop, session_id)
        elif session_id in self.server.sessions:
            await self.engine.call(self.engine.stop, session_id)

    # What a list shows -----------------------------------------------------------------------

    async def info(self, session_id: str) -> dict:
        """The fields of SessionOut of one session."""
        if not self.store:
            return await self.engine.call(self.engine.session_info, session_id)
        entry = await self.ask("find", self.store.find, session_id)
        if not entry:
            raise no_session(session_id)
        return await self.info_of(session_id, entry)

    async def info_of(self, session_id: str, entry: Entry) -> dict:
        """The fields of SessionOut of a session in the store."""
        try:
            info = self.engine.session_out(json.loads(entry.info))
        except (ValueError, KeyError, TypeError):  # a file of an earlier version, or a damaged one
            async with self.holding(session_id):
                return await self.engine.call(self.engine.session_info, session_id)
        return {**info, "answering": entry.leased or session_id in self.held}

    async def list(self) -> list[dict]:
        """The fields of SessionOut of all sessions, but of those that cannot be read."""
        if not self.store:
            names, info = self.server.sessions, self.engine.session_info
            return await self.engine.call(lambda: [info(name) for name in names])
        entries = await self.ask("list", self.store.entries)
        infos = []
        for name, entry in entries.items():
            try:
                infos.append(await self.info_of(name, entry))
            except ApiError as e:
                if e.status_code != 409:
                    raise
                logging.getLogger("serve").warning("%s", e.detail)
        return infos


# -------------------------------------------------------------------------------- repeated turns


def find_reply(session: Any, key: str, body: str) -> dict | None:
    """The answer of the turn with this key, if the session has it; `body` is that of the request.

    The key of another request, or of a turn whose answer is no longer kept, is an ApiError.
    """
    known = session.keys.get(digest(key))
    if known is None:
        return None
    if known != digest(body):
        problem = "Idempotency-Key: another request had this key; send each turn with its own"
        raise ApiError(422, problem, "Idempotency-Key", "idempotency_key_reused")
    if not session.reply or next(reversed(session.keys)) != digest(key):
        problem = "Idempotency-Key: this turn is stored, but its answer is not kept"
        raise ApiError(409, problem, "Idempotency-Key", "turn_superseded")
    return session.reply


def record_reply(session: Any, key: str, body: str, reply: dict) -> None:
    """Keep the answer of a session's last turn, unless it is very long, for the same key."""
    short = len(json.dumps(reply)) <= MOST_REPLY
    session.keys[digest(key)], session.reply = digest(body), reply if short else {}
    while len(session.keys) > MOST_KEYS:
        del session.keys[next(iter(session.keys))]
