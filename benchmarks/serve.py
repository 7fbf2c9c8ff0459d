"""The server under load: many streams at once against one, clients that go away, memory.

    python benchmarks/serve.py --checkpoint tinymamba_model_latest.pt --streams 64 --seconds 120

It starts serve.py as a process of its own and talks to it over HTTP, in this order:

one: one stream after another, for a sixth of --seconds.
load: --streams at a time, each a request for --tokens tokens after a prompt of its own length, and
a new one as soon as it is done, for --seconds.
gone: --disconnects clients that go on in one of 16 sessions while half of the load goes on, and
hang up at a random moment. Then each session must stand where it stood, and answer, token for
token, as a twin that nobody hung up on.

Rates are of tokens that reached the client. Memory is the server's, as the system counts it.
Exits with 1 if any request failed or any session moved.
"""

import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark import append_row  # noqa: E402
from tinymamba.cli import CliParser, require, run_cli  # noqa: E402

TEXT = "import os\n\nclass Reader:\n    def read(self, path):\n        return open(path).read()\n"
TEXT *= 8


class Client:
    """HTTP over plain sockets: what it costs to read an event must not hide the server's cost."""

    def __init__(self, port: int):
        self.port, self.errors = port, []

    async def send(self, method: str, path: str, body: dict | None):
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
        status, reader, writer = await self.send(method, path, body)
        data = await reader.read()
        writer.close()
        require(status < 300, path, f"status {status}", data.decode())
        return json.loads(data)

    async def stream(self, path: str, body: dict, most: float = float("inf")):
        """Read events, `most` at most, and hang up; times of text, tokens, if it came to its end.

        An event carries a token, but for a character of several; so usage has the last word.
        """
        begin, times, tokens, ended = time.perf_counter(), [], 0, False
        try:
            status, reader, writer = await self.send("POST", path, {**body, "stream": True})
            if status != 200:
                self.errors.append(f"{path}: {status} {(await reader.read()).decode()[-200:]}")
            while len(times) < most and (line := await reader.readline()):
                if line.startswith(b'data: {"error"'):
                    self.errors.append(line.decode())
                elif b'"completion_tokens"' in line:
                    tokens = int(re.search(rb'"completion_tokens":(\d+)', line)[1])
                elif b'"finish_reason":null' in line:
                    times.append(time.perf_counter() - begin)
                ended = ended or line.startswith(b"data: [DONE]")
            writer.transport.abort() if not ended else writer.close()
            if not ended and most == float("inf"):
                self.errors.append(f"{path}: ended early")
        except OSError as e:
            self.errors.append(f"{path}: {e}")
        return times, tokens or len(times), ended


class Load:
    """Requests, one after another, in so many lanes."""

    def __init__(self, client: Client, tokens: int):
        self.client, self.tokens, self.random = client, tokens, random.Random(0)
        self.first, self.gaps, self.count, self.requests = [], [], 0, 0

    async def lane(self, until: float) -> None:
        while time.perf_counter() < until:
            prompt = TEXT[: self.random.randrange(8, len(TEXT))]
            times, tokens, _ = await self.client.stream(
                "/v1/completions",
                {
                    "prompt": prompt,
                    "max_tokens": self.tokens,
                    "temperature": 0.8,
                    "seed": self.random.randrange(2**31),
                    "logit_bias": {},
                    "stream_options": {"include_usage": True},
                },
            )
            self.requests += 1
            self.count += tokens
            self.first += times[:1]
            self.gaps += [b - a for a, b in zip(times, times[1:], strict=False)]

    async def run(self, lanes: int, seconds: float) -> dict:
        begin = time.perf_counter()
        await asyncio.gather(*(self.lane(begin + seconds) for _ in range(lanes)))
        spent = time.perf_counter() - begin
        return {
            "streams": lanes,
            "seconds": spent,
            "requests": self.requests,
            "tokens_per_second": self.count / spent,
            **spread("first", self.first),
            **spread("gap", self.gaps),
        }


def spread(name: str, values: list[float]) -> dict:
    cuts = statistics.quantiles(values, n=100) if len(values) > 1 else [float("nan")] * 99
    return {f"{name}_p50": cuts[49], f"{name}_p95": cuts[94]}


def memory(process: subprocess.Popen) -> float:
    """MB that the process holds."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


async def hang_up(client: Client, count: int, lanes: int, tokens: int) -> dict:
    """Clients that go away at random; how many, and sessions that are not where they were."""
    chance, sessions = random.Random(1), [f"s{i}" for i in range(16)]
    for i, name in enumerate(sessions):
        for one in (name, f"{name}-twin"):
            await client.call("POST", "/v1/sessions", {"id": one, "seed": i})
            await client.call(
                "POST",
                f"/v1/sessions/{one}/completions",
                {"prompt": TEXT[: 50 + i], "max_tokens": 5},
            )
    loads = [asyncio.create_task(Load(client, tokens).lane(float("inf"))) for _ in range(lanes)]
    waits, left = [], list(range(count))

    async def one_by_one(name: str) -> None:
        path = f"/v1/sessions/{name}"
        before = (await client.call("GET", path))["tokens"]
        while left:
            left.pop()
            _, _, ended = await client.stream(
                f"{path}/completions",
                {"prompt": "import ", "max_tokens": 4000},
                chance.randrange(20),
            )
            begin = time.perf_counter()
            while (now := await client.call("GET", path))["answering"]:
                require(time.perf_counter() < begin + 30, name, "still answers", "mend the server")
            waits.append(time.perf_counter() - begin)
            if now["tokens"] != before or ended:
                client.errors.append(f"{name} moved from {before} to {now['tokens']}")

    await asyncio.gather(*map(one_by_one, sessions))
    for task in loads:
        task.cancel()
    await asyncio.gather(*loads, return_exceptions=True)
    for name in sessions:
        said = [
            (
                await client.call(
                    "POST", f"/v1/sessions/{one}/completions", {"prompt": "\n", "max_tokens": 20}
                )
            )["choices"][0]["text"]
            for one in (name, f"{name}-twin")
        ]
        if said[0] != said[1]:
            client.errors.append(f"{name} says {said[0]!r}, its twin {said[1]!r}")
    return {"disconnects": len(waits), "beside_streams": lanes, **spread("free", waits)}


async def measure(args, process: subprocess.Popen, port: int) -> dict:
    client = Client(port)
    await Load(client, args.tokens).run(min(8, args.streams), 2)  # warm
    one = await Load(client, args.tokens).run(1, args.seconds / 6)
    start = memory(process)
    load = Load(client, args.tokens)
    running, marks = asyncio.create_task(load.run(args.streams, args.seconds)), []
    while not running.done():
        await asyncio.wait([running], timeout=args.seconds / 6)
        marks.append(memory(process))
    many = await running
    gone = await hang_up(client, args.disconnects, args.streams // 2, args.tokens)
    return {
        "one": one,
        "load": many,
        "gone": gone,
        "errors": client.errors,
        "times_one": many["tokens_per_second"] / one["tokens_per_second"],
        "memory_mb": [start, *marks, memory(process)],
    }


def parse(argv: list[str] | None):
    parser = CliParser(
        usage="python benchmarks/serve.py --checkpoint FILE [--FLAG VALUE ...]", description=__doc__
    )
    for flag, kind, default, text in (
        ("--checkpoint", str, "tinymamba_model_latest.pt", "what to serve"),
        ("--tokenizer", str, None, "tokenizer.json or vocab.txt; else beside the training data"),
        ("--streams", int, 64, "at one time"),
        ("--seconds", float, 120.0, "of load"),
        ("--tokens", int, 128, "of an answer"),
        ("--disconnects", int, 200, "clients that hang up"),
        ("--output", str, "serve.jsonl", "a line is added to it"),
    ):
        parser.add_argument(
            flag,
            type=kind,
            default=default,
            metavar=kind.__name__.upper(),
            help=text + ("" if default is None else f" [{default}]"),
        )
    args = parser.parse_args(argv)
    for name in ("streams", "seconds", "tokens"):
        require(getattr(args, name) > 0, f"--{name}", "is not above 0", "pass more")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    words = ["--tokenizer", args.tokenizer] if args.tokenizer else []
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "serve.py"),
            "--checkpoint",
            args.checkpoint,
            "--port",
            "0",
            "--batch_size",
            str(max(64, args.streams)),
            *words,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        said = process.stdout.readline()
        require(said, "serve.py", "did not start", "its error is above")
        row = asyncio.run(measure(args, process, int(said.rsplit(":", 1)[1])))
    finally:
        process.terminate()
        process.wait()
    for name in ("one", "load", "gone"):
        print(name, " ".join(f"{k} {v:.4g}" for k, v in row[name].items()))
    print(
        f"times one stream {row['times_one']:.2f}, errors {len(row['errors'])}, memory in MB",
        " ".join(f"{m:.0f}" for m in row["memory_mb"]),
    )
    for error in row["errors"][:10]:
        print(error, file=sys.stderr)
    append_row(args.output, row)
    return 1 if row["errors"] else 0


if __name__ == "__main__":
    run_cli(main)
