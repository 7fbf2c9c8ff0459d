"""A server for tests, in a thread of the test's process, with clients."""

import contextlib
import json
import socket
import threading
import time

import httpx
import openai
from helpers import free_copy, wide

from serve import Api, HttpServer, Options
from streaming import StreamingConfig, StreamingServer
from tinymamba.tokenizer import SimpleTokenizer

BYTES = SimpleTokenizer()
PLAIN = {"temperature": 1.0, "top_k": 0}  # OpenAI's own defaults
NAME = "tiny"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
UPLOAD = "/v1/sessions/file"
HELLO = {"messages": [{"role": "user", "content": "hi"}]}


class Running:
    """A server on a free port, in a thread of this process."""

    def __init__(self, adapters=None, tokenizer=BYTES, vocab_size=257, library=None, **options):
        library = library or StreamingServer(
            free_copy(wide(vocab_size=vocab_size)),
            tokenizer=tokenizer,
            adapters=adapters,
            config=StreamingConfig(batch_size=options.get("batch_size", 64)),
            cache_bytes=options.get("prefix_cache", 512) * 2**20,
        )
        self.api = Api(library, Options(**{"model_name": NAME, "grace": 0, **options}))
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = HttpServer(self.api)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=30)
        wait_until(lambda: self.server.started)
        self.ai = openai.OpenAI(
            base_url=self.url + "/v1",
            api_key=options.get("api_key") or "none",
            max_retries=0,
            timeout=30,
        )

    def end(self) -> None:
        self.http.close()
        self.ai.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def post(self, path: str, **body) -> dict:
        answer = self.http.post(path, json=body)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()

    def busy(self) -> int:
        """The number of answers in the decoder."""
        return len(self.api.server.decoder.answers)


def wait_until(holds, seconds: float = 60) -> None:
    """Wait until another thread has made this true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "timed out"
        threading.Event().wait(0.002)


@contextlib.contextmanager
def running(**options):
    server = Running(**options)
    try:
        yield server
    finally:
        server.end()


def assert_error(answer: httpx.Response, status: int, param: str | None = None) -> dict:
    """Check the response for an error in OpenAI's form about this field; the error."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert error["param"] == param, error
    return error


def events_of(server: Running, path: str, **body) -> list[dict]:
    """The events of a streamed answer."""
    with server.http.stream("POST", path, json={**body, "stream": True}) as answer:
        return [json.loads(x[6:]) for x in answer.iter_lines() if x.startswith("data: {")]


def session(server: Running, name: str, prompt: str = "", **body) -> str:
    """Continue a session; the text of its answer."""
    return server.post(f"/v1/sessions/{name}/completions", prompt=prompt, **body)["choices"][0][
        "text"
    ]
