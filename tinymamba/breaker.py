"""Calls to a store that may hang: each in a thread, and none while the store does not answer.

    breaker = Breaker(on_reset, on_late)
    value = await breaker.run(store.load, "talk")  # or Unavailable, NotAsked included

A circuit breaker (Nygard, Release It!, 2007, section 5.2). A call that takes longer than `timeout`
trips it, even if it has not ended: a thread that waits for a dead file system never does. While it
is tripped, calls fail at once. After each `pause` one call is let through as a trial. Any answer of
the store resets it, also an error that comes soon: such a store keeps nobody waiting.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from tinymamba.session_store import TIMEOUT, Unavailable


class NotAsked(Unavailable):
    """The breaker is tripped: the store was not asked, and has changed nothing."""


class Call(concurrent.futures.Future):
    """A function for one of the threads, and its result."""

    def __init__(self, function: Callable, arguments: tuple):
        super().__init__()
        self.function, self.arguments = function, arguments
        self.began: float | None = None
        self.ended: float | None = None

    def carry_out(self, on_error: Callable[[Call, Exception], object]) -> None:
        """Call the function, unless the call is cancelled; `on_error` hears first of an error."""
        if not self.set_running_or_notify_cancel():
            return
        self.began = time.monotonic()
        try:
            result, error = self.function(*self.arguments), None
        except Exception as e:
            result, error = None, e
        self.ended = time.monotonic()
        if error:
            on_error(self, error)
        self.set_exception(error) if error else self.set_result(result)

    def seconds(self) -> float:
        """The time that its thread has spent on it."""
        return 0.0 if self.began is None else (self.ended or time.monotonic()) - self.began


class Breaker:
    """Threads for the calls to a store. Its state changes on the event loop only."""

    threads = 8
    timeout = TIMEOUT  # seconds that a call may take before it trips the breaker
    limit = 10.0  # seconds until nobody waits for its result any more
    pause = 2.0  # seconds from a failure to the next trial

    def __init__(self, on_reset: Callable[[], object], on_late: Callable[[Any], object]):
        """`on_reset` is called when the store answers again, `on_late` with a late result."""
        self.on_reset, self.on_late = on_reset, on_late
        self.queue: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self.workers: list[threading.Thread] = []
        self.unfinished: set[Call] = set()
        self.tripped, self.trial_at = False, 0.0
        self.trial: Call | None = None

    async def run(self, function: Callable, *arguments: Any) -> Any:
        """Call a function in a thread; the result, or Unavailable."""
        trial = self.tripped
        if trial and not self.may_try():
            raise NotAsked("it has not answered, and is asked again soon")
        call = self.submit(function, *arguments)
        self.trial = call if trial else self.trial
        ended = asyncio.get_running_loop().create_future()
        call.add_done_callback(lambda call: self.wake(ended))
        try:
            await self.wait_for(call, ended)
        finally:
            if self.trial is call:
                self.trial = None
            left = not call.cancel() and not call.done()  # decided once: it may end meanwhile
            if left:
                ended.add_done_callback(lambda ended: self.come_late(call))
        if left:
            self.trip()
            raise Unavailable(f"no answer in {self.limit:g} seconds")
        return self.judge(call)

    def submit(self, function: Callable, *arguments: Any) -> Call:
        """Have a function called by the next free thread."""
        while len(self.workers) < self.threads:  # daemons: one that hangs does not keep the process
            worker = threading.Thread(target=self.work, name="store", daemon=True)
            self.workers.append(worker)
            worker.start()
        call = Call(function, arguments)
        self.unfinished.add(call)
        call.add_done_callback(self.unfinished.discard)
        self.queue.put(call)
        return call

    def work(self) -> None:
        """A thread's loop."""
        for call in iter(self.queue.get, None):
            call.carry_out(self.cancel_if_late)  # before this thread begins the next
            del call  # its result may be large

    async def wait_for(self, call: Call, ended: asyncio.Future) -> None:
        """Wait until a call has ended, or for `limit` seconds since a thread began it."""
        while not call.done() and (seconds := call.seconds()) < self.limit:
            late = seconds >= self.timeout
            if late:
                self.trip()
            await asyncio.wait({ended}, timeout=(self.limit if late else self.timeout) - seconds)

    def judge(self, call: Call) -> Any:
        """The result of a call that has ended; trips the breaker, or resets it."""
        if call.cancelled():
            raise NotAsked("another call has got no answer")
        if self.is_late(call, call.exception()):
            self.trip()
        else:
            self.reset()
        return call.result()

    def is_late(self, call: Call, error: BaseException | None) -> bool:
        """Whether a call has failed, and not soon."""
        return isinstance(error, Unavailable) and call.seconds() >= self.timeout / 2

    def cancel_if_late(self, call: Call, error: Exception) -> None:
        """Cancel what waits, in the thread of a call that has failed late."""
        if self.is_late(call, error):
            self.cancel_waiting()

    def cancel_waiting(self) -> None:
        """Cancel the calls that no thread has begun."""
        for call in [*self.unfinished]:
            call.cancel()  # does nothing to those that have begun

    def come_late(self, call: Call) -> None:
        """Take notice of the end of a call that nobody waits for."""
        error = call.exception()
        if error is None:
            self.on_late(call.result())
        if not isinstance(error, Unavailable):
            self.reset()

    @staticmethod
    def wake(ended: asyncio.Future) -> None:
        """Set a future of the event loop, from a thread."""

        def set_once() -> None:
            if not ended.done():
                ended.set_result(None)

        with contextlib.suppress(RuntimeError):  # the loop has ended
            ended.get_loop().call_soon_threadsafe(set_once)

    def may_try(self) -> bool:
        """Whether a tripped breaker lets a call through: one at a time, if a thread is free."""
        free = len(self.unfinished) < self.threads
        return free and not self.trial and time.monotonic() >= self.trial_at

    def trip(self) -> None:
        """Let calls fail at once, those that wait for a thread included."""
        if not self.tripped:
            logging.getLogger("serve").warning("the session store hangs: requests for it fail")
        self.tripped, self.trial_at = True, time.monotonic() + self.pause
        self.cancel_waiting()

    def reset(self) -> None:
        """Let all calls through."""
        if self.tripped:
            logging.getLogger("serve").warning("the session store answers again")
            self.tripped = False
            self.on_reset()

    def end(self) -> None:
        """End the threads, after what they have to do; those that hang are left."""
        deadline = time.monotonic() + self.timeout
        self.tripped, self.trial_at = True, math.inf
        for _ in self.workers:
            self.queue.put(None)
        for worker in self.workers:
            worker.join(max(0.0, deadline - time.monotonic()))
