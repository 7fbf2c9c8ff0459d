"""Work that is done in several processes, with its results in order.

A process has one piece of work at a time, and a pipe to it that closes when it ends, however that
happens: nothing can wait for one that was killed. The pool of the standard library has a queue and
a thread in between; with it CPython 3.11.2 waits for ever if a process is killed while the queue is
written (python/cpython#94777).
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeVar

from tinymamba.cli import UserError

Item = TypeVar("Item")

MOST = 16  # more than one process can give work to
AT_FIRST = 1 << 22  # characters that take no longer than it takes to start processes
CLOSED = (EOFError, OSError)  # of a pipe to an ended process; OSError if it ended in a message


def available_cores() -> int:
    """How many cores this process may use, or MOST."""
    affinity: Callable | None = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count()
    return min(count or 1, MOST)


class Batching(NamedTuple):
    """How items are put together in lists, which are worked on at once."""

    length: Callable[[Any], int]  # of an item, in characters
    here: int  # characters of a list in this process
    there: int  # in another one

    def lists(self, items: Iterable[Item], longest: int) -> Iterator[list[Item]]:
        """Items in lists of about `longest` characters."""
        batch: list[Item] = []
        chars = 0
        for item in items:
            batch.append(item)
            chars += self.length(item) + 100  # of overhead
            if chars >= longest:
                yield batch
                batch, chars = [], 0
        if batch:
            yield batch

    def first(self, items: Iterator[Item], chars: float) -> Iterator[Item]:
        """The items that begin in the first so many characters."""
        while chars > 0 and (item := next(items, None)) is not None:
            chars -= self.length(item)
            yield item


class Crew:
    """Processes that work for one function after another, and end with the crew."""

    def __init__(self) -> None:
        self.idle: list[tuple[Connection, contextlib.ExitStack]] = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        for _, stack in self.idle:
            stack.close()

    def map(
        self, function: Callable[[Any], Any], stream: Iterable[Any], count: int
    ) -> Iterator[Any]:
        """What a function returns for each item, in order, from `count` processes."""
        busy: deque[Connection] = deque()
        stacks: dict[Connection, contextlib.ExitStack] = {}
        with contextlib.ExitStack() as unfinished:
            for item in stream:
                if len(busy) < count:
                    free, stack = self.idle.pop() if self.idle else started()
                    stacks[free] = unfinished.enter_context(stack)
                    send(free, (function, item))
                    busy.append(free)
                else:
                    yield receive(busy[0])
                    send(busy[0], (None, item))
                    busy.rotate(-1)
            while busy:
                yield receive(busy.popleft())
            unfinished.pop_all()
            self.idle += stacks.items()


def started() -> tuple[Connection, contextlib.ExitStack]:
    """A pipe to a new process, and what ends it."""
    stack = contextlib.ExitStack()
    return stack.enter_context(process()), stack


def map_in_order(
    function: Callable[[list], Any],
    items: Iterable[Any],
    batching: Batching,
    workers: int,
    crew: Crew | None = None,
) -> Generator[Any]:
    """What a function returns for each list of items, in this process, or in so many others.

    With 0 `workers` there is one for each core, but none for the first AT_FIRST characters. They
    are of the crew, or end with the iterator.
    """
    count, rest = workers or available_cores(), iter(items)
    first = batching.first(rest, math.inf if count == 1 else 0 if workers else AT_FIRST)
    yield from map(function, batching.lists(first, batching.here))
    lists = batching.lists(rest, batching.there)
    yield from (
        crew.map(function, lists, count) if crew else map_in_processes(function, lists, count)
    )


def map_in_processes(
    function: Callable[[Any], Any], stream: Iterable[Any], count: int
) -> Iterator[Any]:
    """The same in `count` processes, which start for the first items and end with the iterator."""
    with Crew() as crew:
        yield from crew.map(function, stream, count)


@contextlib.contextmanager
def process() -> Iterator[Connection]:
    """A process that works, as a pipe to it."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    child = context.Process(target=work, args=(theirs,), daemon=True)
    try:
        child.start()
        theirs.close()
        yield pipe
    finally:
        pipe.close()
        if child.pid:
            child.kill()
            child.join()


def work(pipe: Connection) -> None:
    """Answer what comes through a pipe, until the other end is closed.

    A message is an item for the function that came last, or also a new function.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # sent to the whole group; the other process ends
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    function: Any = None
    with contextlib.suppress(*CLOSED):
        while True:
            new, item = pipe.recv()
            function = function if new is None else new
            answer: Any = None
            error: Exception | None = None
            try:
                answer = function(item)
            except Exception as raised:  # again where the answer is awaited
                error = raised
            pipe.send((answer, error))


def send(pipe: Connection, item: Any) -> None:
    """Give work to a process."""
    try:
        pipe.send(item)
    except CLOSED:
        raise ended() from None


def receive(pipe: Connection) -> Any:
    """The answer of a process."""
    try:
        answer, error = pipe.recv()
    except CLOSED:
        raise ended() from None
    if error is not None:
        raise error
    return answer


def ended() -> UserError:
    """The error for a process that is no more."""
    problem = "a process that works was ended, perhaps for lack of memory"
    return UserError("--workers", problem, "pass fewer")
