"""Calls that hang: for whom they are waited for, and how the store is found to answer again."""

import asyncio
import threading
import time

import pytest

from tinymamba.breaker import Breaker, NotAsked
from tinymamba.session_store import Refused, Unavailable


class Trials:
    """A breaker, and what it has told."""

    def __init__(self):
        self.late, self.resets = [], 0
        self.it = Breaker(self.count, self.late.append)
        self.it.timeout, self.it.limit, self.it.pause = 0.05, 0.1, 1000.0

    def count(self) -> None:
        self.resets += 1

    async def fails(self, error: type, function, *arguments) -> None:
        with pytest.raises(error):
            await self.it.run(function, *arguments)


def raising(error: Exception):
    def function():
        raise error

    return function


async def until(holds) -> None:
    """As wait_until, on the event loop."""
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "timed out"
        await asyncio.sleep(0.002)


def with_breaker(check) -> None:
    trials = Trials()
    try:
        asyncio.run(check(trials, trials.it))
    finally:
        trials.it.end()


def test_an_answer_does_not_trip_it_nor_does_an_error_that_comes_soon():
    async def check(trials, breaker):
        breaker.timeout = 60.0
        for error in (Refused(), Unavailable("refused"), KeyError("x")):
            await trials.fails(type(error), raising(error))
            assert not breaker.tripped
        assert await breaker.run(max, 1, 2) == 2

    with_breaker(check)


def test_an_error_that_comes_late_trips_it_and_one_trial_is_let_through():
    async def check(trials, breaker):
        def slow_error():
            ended.wait(10)
            raise Unavailable("timed out")

        ended = threading.Event()
        breaker.limit = 60.0
        first = asyncio.ensure_future(breaker.run(slow_error))
        await until(lambda: breaker.tripped)
        assert not first.done(), "it trips before the call has ended"
        await trials.fails(NotAsked, print)
        ended.set()
        with pytest.raises(Unavailable):
            await first
        await trials.fails(NotAsked, print)
        breaker.trial_at, ended = 0.0, threading.Event()
        trial = asyncio.ensure_future(breaker.run(ended.wait, 10))
        await until(lambda: breaker.unfinished)
        for _ in range(3):
            breaker.trial_at = 0.0
            await trials.fails(NotAsked, print)
        assert trials.resets == 0
        ended.set()
        assert await trial and trials.resets == 1
        assert await breaker.run(max, 1, 2) == 2

    with_breaker(check)


def test_a_trial_that_fails_late_trips_it_again_and_one_that_fails_soon_does_not():
    async def check(trials, breaker):
        breaker.trip()
        breaker.trial_at = 0.0
        await trials.fails(Unavailable, lambda: (time.sleep(0.06), raising(Unavailable())()))
        await trials.fails(NotAsked, print)
        breaker.timeout, breaker.trial_at = 60.0, 0.0
        await trials.fails(Unavailable, raising(Unavailable("refused")))
        assert not breaker.tripped, "nobody waits for a store that refuses"

    with_breaker(check)


def test_calls_that_wait_for_a_thread_fail_with_those_that_hang():
    async def check(trials, breaker):
        go_on, begun = threading.Event(), []
        breaker.timeout, breaker.limit = 1.0, 1.2

        def hang():
            begun.append(1)
            return go_on.wait(10)

        calls = [asyncio.ensure_future(breaker.run(hang)) for _ in range(40)]
        said = await asyncio.gather(*calls, return_exceptions=True)
        assert len(begun) == breaker.threads == 8
        assert sum(type(error) is Unavailable for error in said) == 8
        assert sum(type(error) is NotAsked for error in said) == 32
        breaker.trial_at = 0.0
        await trials.fails(NotAsked, print)  # no thread is free for a trial
        go_on.set()
        await until(lambda: len(trials.late) == 8)
        assert trials.resets == 1 and await breaker.run(max, 1, 2) == 2

    with_breaker(check)


def test_a_long_queue_is_not_a_store_that_hangs():
    """Time in the queue does not count, only that in a thread."""

    async def check(trials, breaker):
        breaker.threads = 1
        breaker.timeout, breaker.limit = 1.0, 1.2
        calls = [breaker.run(time.sleep, 0.03) for _ in range(50)]
        assert await asyncio.gather(*calls) == [None] * 50
        assert not breaker.tripped

    with_breaker(check)


def test_a_result_that_comes_after_its_caller_has_left_is_not_lost():
    async def check(trials, breaker):
        breaker.timeout = breaker.limit = 60.0
        go_on = threading.Event()
        call = asyncio.ensure_future(breaker.run(lambda: go_on.wait(10) and "granted"))
        await until(lambda: any(call.running() for call in breaker.unfinished))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        go_on.set()
        await until(lambda: trials.late == ["granted"])

    with_breaker(check)


def test_a_thread_without_an_answer_begins_no_call_that_waited():
    breaker, waits, begun = Breaker(lambda: None, lambda _: None), threading.Event(), []
    breaker.threads, breaker.timeout = 1, 0.0

    def hang():
        waits.wait(60)
        raise Unavailable("no answer")

    late, waiting = breaker.submit(hang), breaker.submit(begun.append, "x")
    waits.set()  # no event loop runs that could cancel anything
    assert isinstance(late.exception(60), Unavailable)
    breaker.end()
    breaker.workers[0].join(60)
    assert waiting.cancelled() and not begun
