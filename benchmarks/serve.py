"""The server under load: many streams at once against one, clients that disconnect, memory.

    python -m benchmarks.serve --checkpoint tinymamba_model_latest.pt --streams 64 --seconds 120

It starts serve.py as a process and talks to it over HTTP, in this order:

one: one stream after another, for a sixth of --seconds.
load: --streams at a time for --seconds. Each is a request for --tokens tokens after a prompt of
random length, and is followed at once by the next.
gone: --disconnects clients that continue one of 16 sessions and disconnect at a random moment,
beside half of the load. Afterwards each session must be at its old position and answer, token for
token, as a session that nobody disconnected from.
prefix: the time to the first event of chats with a long system message that is new, with one that
is known, and with none. Then --chats conversations: all first turns, then all second turns. `found`
is the share of the second turns whose conversation was still in the prefix cache.

Rates count the tokens that reached the client. Memory is the server's, as the system counts it.
The row is appended to --output. Exits with 1 if a request failed or a session changed.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

from benchmark import append_row
from tinymamba.cli import parse_flags, require, run_cli

ROOT = Path(__file__).resolve().parent.parent
TEXT = "import os\n\nclass Reader:\n    def read(self, path):\n        return open(path).read()\n"
TEXT *= 8


@dataclass
class Options:
    """The command line."""

    # Server
    checkpoint: str = "tinymamba_model_latest.pt"  # what to serve
    tokenizer: str | None = None  # tokenizer.json or vocab.txt; else the checkpoint's
    dtype: str = "float32"  # dtype of the weights

    # Load
    streams: int = 64  # streams at one time
    seconds: float = 120.0  # seconds of load
    tokens: int = 128  # tokens of an answer
    disconnects: int = 200  # clients that disconnect
    words: int = 1800  # words of a long system message: about 4,000 tokens
    chats: int = 1000  # conversations of two turns
    output: str = "serve.jsonl"  # file of rows

    LIMITS: ClassVar = {
        **dict.fromkeys(("streams", "tokens", "words", "chats"), (1, math.inf)),
        "seconds": (0.1, math.inf),
    }


# ------------------------------------------------------------------------------------ client


class Client:
    """HTTP over plain sockets: a client that is slow to read would hide the server's cost."""

    def __init__(self, port: int):
        self.port = port
        self.errors: list[str] = []

    async def send(self, method: str, path: str, body: dict | None) -> tuple:
        """Send a request and read the headers: status, reader, writer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = b"" if body is None else json.dumps(body).encode()
        writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        status = int((await reader.readline()).split()[1])
        while await reader.readline() != b"\r\n":
            pass
        return status, reader, writer

    async def call(self, method: str, path: str, body: dict | None = None) -> dict:
        """The JSON that a request returns."""
        status, reader, writer = await self.send(method, path, body)
        data = await reader.read()
        writer.close()
        require(status < 300, path, f"status {status}", data.decode())
        return json.loads(data)

    async def stream(
        self, path: str, body: dict, limit: float = math.inf
    ) -> tuple[list[float], int, bool]:
        """Read at most `limit` events, then disconnect.

        Gives the times of the events, the number of tokens, and whether the answer ended. An event
        carries one token, or several that form one character; `usage` has the exact number.
        """
        begin, tokens, ended = time.perf_counter(), 0, False
        times: list[float] = []
        try:
            status, reader, writer = await self.send("POST", path, {**body, "stream": True})
            if status != 200:
                self.errors.append(f"{path}: {status} {(await reader.read()).decode()[-200:]}")
            while len(times) < limit and (line := await reader.readline()):
                if line.startswith(b'data: {"error"'):
                    self.errors.append(line.decode())
                elif count := re.search(rb'"completion_tokens":(\d+)', line):
                    tokens = int(count[1])
                elif b'"finish_reason":null' in line:
                    times.append(time.perf_counter() - begin)
                ended = ended or line.startswith(b"data: [DONE]")
            writer.transport.abort() if not ended else writer.close()
            if not ended and limit == math.inf:
                self.errors.append(f"{path}: ended early")
        except OSError as e:
            self.errors.append(f"{path}: {e}")
        return times, tokens or len(times), ended


class Load:
    """Clients in parallel, each with one request after another."""

    def __init__(self, client: Client, tokens: int):
        self.client, self.tokens, self.random = client, tokens, random.Random(0)
        self.count, self.requests = 0, 0
        self.first: list[float] = []  # seconds to the first event of each answer
        self.gaps: list[float] = []  # seconds between events

    async def repeat(self, until: float) -> None:
        """One client: requests until the time `until`."""
        while time.perf_counter() < until:
            body = {
                "prompt": self.prompt(),
                "max_tokens": self.tokens,
                "temperature": 0.8,
                "seed": self.random.randrange(2**31),
                "logit_bias": {},
                "stream_options": {"include_usage": True},
            }
            times, tokens, _ = await self.client.stream("/v1/completions", body)
            self.requests += 1
            self.count += tokens
            self.first += times[:1]
            self.gaps += [b - a for a, b in zip(times, times[1:], strict=False)]

    def prompt(self) -> str:
        """Up to the whole of TEXT, from anywhere, so that few prompts begin alike."""
        at = self.random.randrange(len(TEXT))
        return (TEXT[at:] + TEXT[:at])[: self.random.randrange(8, len(TEXT))]

    async def run(self, streams: int, seconds: float) -> dict:
        """So many clients for so many seconds; what was measured."""
        begin = time.perf_counter()
        await asyncio.gather(*(self.repeat(begin + seconds) for _ in range(streams)))
        spent = time.perf_counter() - begin
        return {
            "streams": streams,
            "seconds": spent,
            "requests": self.requests,
            "tokens_per_second": self.count / spent,
            **percentiles("first", self.first),
            **percentiles("gap", self.gaps),
        }


def percentiles(name: str, values: list[float]) -> dict:
    """The median and the 95th percentile, by name."""
    cuts = statistics.quantiles(values, n=100) if len(values) > 1 else [math.nan] * 99
    return {f"{name}_p50": cuts[49], f"{name}_p95": cuts[94]}


def memory(process: subprocess.Popen) -> float:
    """MB that the process holds."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


# ------------------------------------------------------------------------------- disconnects


async def make_sessions(client: Client) -> list[str]:
    """16 sessions, each with a reference session that has read the same."""
    sessions = [f"s{i}" for i in range(16)]
    for i, name in enumerate(sessions):
        for each in (name, f"{name}-reference"):
            await client.call("POST", "/v1/sessions", {"id": each, "seed": i})
            body = {"prompt": TEXT[: 50 + i], "max_tokens": 5}
            await client.call("POST", f"/v1/sessions/{each}/completions", body)
    return sessions


async def compare_sessions(client: Client, sessions: list[str]) -> None:
    """Note as an error if a session answers differently from its reference."""
    for name in sessions:
        texts = []
        for each in (name, f"{name}-reference"):
            body = {"prompt": "\n", "max_tokens": 20}
            answer = await client.call("POST", f"/v1/sessions/{each}/completions", body)
            texts.append(answer["choices"][0]["text"])
        if texts[0] != texts[1]:
            client.errors.append(f"{name} says {texts[0]!r}, its reference {texts[1]!r}")


async def disconnect(client: Client, count: int, streams: int, tokens: int) -> dict:
    """Clients that disconnect at random: how many, and seconds until their session is free."""
    chance, sessions = random.Random(1), await make_sessions(client)
    loads = [asyncio.create_task(Load(client, tokens).repeat(math.inf)) for _ in range(streams)]
    waits: list[float] = []
    left = [*range(count)]

    async def repeat(name: str) -> None:
        path = f"/v1/sessions/{name}"
        before = (await client.call("GET", path))["tokens"]
        while left:
            left.pop()
            body = {"prompt": "import ", "max_tokens": 4000}
            _, _, ended = await client.stream(f"{path}/completions", body, chance.randrange(20))
            begin = time.perf_counter()
            while (now := await client.call("GET", path))["answering"]:
                late = time.perf_counter() >= begin + 30
                require(not late, name, "still answers after 30 s", "fix the server")
            waits.append(time.perf_counter() - begin)
            if now["tokens"] != before or ended:
                client.errors.append(f"{name} moved from {before} to {now['tokens']}")

    await asyncio.gather(*map(repeat, sessions))
    for task in loads:
        task.cancel()
    await asyncio.gather(*loads, return_exceptions=True)
    await compare_sessions(client, sessions)
    return {"disconnects": len(waits), "beside_streams": streams, **percentiles("free", waits)}


# ------------------------------------------------------------------------------------ prefix

CHAT = "/v1/chat/completions"


def message(role: str, content: str) -> dict:
    """A message of a chat."""
    return {"role": role, "content": content}


async def first_texts(client: Client, count: int) -> dict:
    """Seconds to the first event after a new, a known and no system message: medians."""
    chance = random.Random(2)
    times: dict[str, list[float]] = {"new": [], "known": [], "none": []}

    def words(count: int) -> str:
        return " ".join(chance.choice(TEXT.split()) for _ in range(count))

    async def ask(messages: list[dict]) -> float:
        body = {"messages": [*messages, message("user", words(8))], "max_tokens": 4}
        return (await client.stream(CHAT, body))[0][0]  # it is sent once the prompt is read

    known = [message("system", words(count))]
    answer = await client.call("POST", CHAT, {"messages": known, "max_tokens": 1})
    await ask(known)  # the prompt of the call before ends like no other
    for turn in range(30):
        if turn < 3:
            times["new"].append(await ask([message("system", words(count))]))
        times["known"].append(await ask(known))
        times["none"].append(await ask([]))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    seconds["prompt_tokens"] = answer["usage"]["prompt_tokens"]
    return {**seconds, "known_to_none": seconds["known"] / seconds["none"]}


async def two_turns(client: Client, chats: int) -> dict:
    """The share of conversations whose first turn the prefix cache has at their second."""
    found, talks = 0, []
    for number in range(chats):
        messages = [message("user", f"{number}: {TEXT[: 200 + number % 100]}")]
        body = {"messages": messages, "max_tokens": 16}
        answer = await client.call("POST", CHAT, body)
        talks.append([*messages, answer["choices"][0]["message"], message("user", "Go on.")])
    for messages in talks:
        answer = await client.call("POST", CHAT, {"messages": messages, "max_tokens": 1})
        usage = answer["usage"]
        found += usage["prompt_tokens_details"]["cached_tokens"] > 0
    _, reader, writer = await client.send("GET", "/metrics", None)
    metrics = (await reader.read()).decode()
    writer.close()
    [nbytes] = re.findall(r"^tinymamba_prefix_cache_bytes (\S+)", metrics, re.MULTILINE)
    return {"chats": chats, "found": found / chats, "cache_mb": float(nbytes) / 2**20}


# ------------------------------------------------------------------------------------ main


async def measure(options: Options, process: subprocess.Popen, port: int) -> dict:
    """All measurements of a running server; returns the row."""
    client = Client(port)
    await Load(client, options.tokens).run(min(8, options.streams), 2)  # warm-up
    one = await Load(client, options.tokens).run(1, options.seconds / 6)
    start = memory(process)
    load = Load(client, options.tokens)
    running, marks = asyncio.create_task(load.run(options.streams, options.seconds)), []
    while not running.done():
        await asyncio.wait([running], timeout=options.seconds / 6)
        marks.append(memory(process))
    many = await running
    gone = await disconnect(client, options.disconnects, options.streams // 2, options.tokens)
    marks.append(memory(process))
    prefix = await first_texts(client, options.words)
    prefix |= await two_turns(client, options.chats)
    return {
        "one": one,
        "load": many,
        "gone": gone,
        "prefix": prefix,
        "errors": client.errors,
        "times_one": many["tokens_per_second"] / one["tokens_per_second"],
        "memory_mb": [start, *marks, memory(process)],
    }


def start_server(options: Options) -> subprocess.Popen:
    """serve.py on a free port, which it prints."""
    command = [sys.executable, str(ROOT / "serve.py"), "--checkpoint", options.checkpoint]
    command += ["--dtype", options.dtype]
    command += ["--port", "0", "--batch_size", str(max(64, options.streams))]
    command += ["--max_body", str(2**24)]
    command += ["--tokenizer", options.tokenizer] if options.tokenizer else []
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def report(row: dict[str, Any]) -> None:
    """Print the numbers, and the first errors to stderr."""
    for name in ("one", "load", "gone", "prefix"):
        print(name, " ".join(f"{k} {v:.4g}" for k, v in row[name].items()))
    memory_mb = " ".join(f"{m:.0f}" for m in row["memory_mb"])
    times, errors = row["times_one"], row["errors"]
    print(f"times one stream {times:.2f}, errors {len(errors)}, memory in MB {memory_mb}")
    for error in errors[:10]:
        print(error, file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    usage = "python -m benchmarks.serve --checkpoint FILE [--FLAG VALUE ...]"
    options = parse_flags(Options, argv, usage, __doc__)
    process = start_server(options)
    try:
        line = process.stdout.readline() if process.stdout else ""
        require(line, "serve.py", "did not start", "see its error above")
        row = asyncio.run(measure(options, process, int(line.rsplit(":", 1)[1])))
    finally:
        process.terminate()
        process.wait()
    report(row)
    append_row(options.output, row)
    return 1 if row["errors"] else 0


if __name__ == "__main__":
    run_cli(main)
