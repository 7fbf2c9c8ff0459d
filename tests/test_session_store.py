"""Sessions in a store: leases and fencing, several servers, kills, and a store that fails."""

import asyncio
import concurrent.futures
import contextlib
import http.server
import json
import os
import random
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import httpx
import pytest
import torch
from helpers import ROOT, assert_refused, free_copy, free_port, run_main, wide
from serve_helpers import (
    BYTES,
    CHAT,
    COMPLETIONS,
    PLAIN,
    UPLOAD,
    Running,
    assert_error,
    running,
    session,
    wait_until,
)

import serve
from streaming import StreamingConfig, StreamingServer
from testv2 import save_folder
from tinymamba import session_store, shared_sessions
from tinymamba.breaker import Breaker
from tinymamba.checkpoint import pack_tensors, read_notes
from tinymamba.openai_api import ApiError
from tinymamba.session_store import (
    PREFIX,
    FolderStore,
    Full,
    RedisStore,
    Refused,
    Taken,
    Unavailable,
    open_store,
)
from tinymamba.tokenizer import EOS_TOKEN, byte_alphabet

FAKE = "from fakeredis import TcpFakeServer as S; S(('127.0.0.1', {}), server_type='redis')"
REDIS = shutil.which("valkey-server") or shutil.which("redis-server")
TTL, LEASE = 1000.0, 10.0


@contextlib.contextmanager
def redis_server(folder: Path):
    """A Redis-compatible server, the system's or else fakeredis; gives its port and its process."""
    port = free_port()
    words = [sys.executable, "-c", FAKE.format(port) + ".serve_forever()"]
    if REDIS:
        words = [REDIS, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL) as child:
        try:
            wait_until(lambda: accepts(port))
            yield port, child
        finally:
            child.kill()


@pytest.fixture(scope="module")
def redis_port(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as (port, _):
        yield port


def accepts(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def redis_url(redis_port):
    """The address of an empty database."""
    url = f"redis://127.0.0.1:{redis_port}/0"
    open_store(url, TTL, LEASE).client.flushdb()
    return url


@pytest.fixture(params=["folder", "redis"])
def place(request, tmp_path) -> str:
    """Where sessions are stored, as --session_store names it."""
    if request.param == "folder":
        return str(tmp_path / "sessions")
    return request.getfixturevalue("redis_url")


class Store:
    """A store for tests, whose leases end when they are told to."""

    def __init__(self, place: str):
        self.now = 1e9
        if "://" in place:
            self.it = RedisStore(place, TTL, LEASE)
        else:
            self.it = FolderStore(Path(place), TTL, LEASE, lambda: self.now)

    def end_lease(self, name: str) -> None:
        """What time does."""
        self.now += LEASE + 1
        if isinstance(self.it, RedisStore):
            self.it.client.delete(f"{PREFIX}lease:{name}")

    def expire(self, name: str) -> None:
        """What more time does to one session."""
        if isinstance(self.it, RedisStore):
            self.it.client.delete(f"{PREFIX}session:{name}")
            self.it.client.zadd(f"{PREFIX}sessions", {name: 1})
            return
        old = self.now - TTL - 1
        os.utime(self.it.kept / f"{name}.safetensors", (old, old))


@pytest.fixture
def store(place):
    return Store(place)


# ------------------------------------------------------------------------------------- stores


def put(store, lease, text: str, most: int = 9) -> None:
    """Store something with a text in place of a session."""
    store.put(lease, pack_tensors({}, {"stamp": lease.stamp, "text": text}), most)


def word(lease) -> str | None:
    """The text of what a lease has found."""
    return lease.value and read_notes(lease.value)["text"]


def test_a_lease_has_one_holder_and_what_is_stored_has_its_stamp(store):
    s = store.it
    first = s.lease("talk", "a")
    assert (first.found, first.value) == ("", None) and s.lease("talk", "b") is None
    put(s, first, "one", 9)
    second = s.lease("talk", "b")
    assert (second.found, word(second)) == (first.stamp, "one")
    assert s.lease("talk", "c") is None and s.find("talk").leased
    s.release(second)
    third = s.lease("talk", "c", known=first.stamp)
    assert third.found == first.stamp and third.value is None, "what is known is not sent"
    numbers = [int(lease.stamp.partition("-")[0]) for lease in (first, second, third)]
    assert numbers == sorted({*numbers})


def test_a_paused_writer_is_refused(store):
    s = store.it
    put(s, s.lease("talk", "x"), "zero", 9)
    paused = s.lease("talk", "a")
    store.end_lease("talk")
    heir = s.lease("talk", "b")
    assert word(heir) == "zero" and s.renew(paused) == "lost"
    with pytest.raises(Refused):
        put(s, paused, "old", 9)
    s.release(paused)
    assert s.lease("talk", "c") is None, "the heir still holds it"
    put(s, heir, "new", 9)
    with pytest.raises(Refused):
        put(s, paused, "old", 9)
    assert word(s.lease("talk", "c")) == "new"


def test_a_lease_that_nobody_took_over_may_be_used_late(store):
    s = store.it
    late = s.lease("talk", "a")
    store.end_lease("talk")
    assert s.renew(late) == "held" and s.lease("talk", "b") is None
    store.end_lease("talk")
    put(s, late, "one", 9)
    assert word(s.lease("talk", "b")) == "one"


def test_a_put_that_is_repeated_is_one(store):
    s = store.it
    lease = s.lease("talk", "a")
    for _ in range(2):
        put(s, lease, "one", 1)
    heir = s.lease("talk", "b")
    assert heir.found == lease.stamp
    put(s, lease, "one", 1)
    assert s.lease("talk", "c") is None, "the heir still holds it"
    put(s, heir, "two", 1)
    with pytest.raises(Refused):
        put(s, lease, "one", 1)


def test_a_renewal_that_comes_late_does_not_begin_a_lease_again(store):
    s = store.it
    for end in (lambda lease: put(s, lease, "one"), s.release):
        lease = s.lease("talk", "a")
        end(lease)
        assert s.renew(lease) == "lost" and s.lease("talk", "b")
        store.end_lease("talk")


def test_a_deleted_session_stays_deleted(store):
    s = store.it
    put(s, s.lease("talk", "a"), "one", 9)
    lease = s.lease("talk", "b")
    assert s.delete("talk") and not s.delete("talk") and s.find("talk") is None
    with pytest.raises(Refused):
        put(s, lease, "two", 9)
    put(s, s.lease("talk", "c"), "three", 9)
    with pytest.raises(Refused):
        put(s, lease, "two", 9)
    assert word(s.lease("talk", "d")) == "three"


def test_names_that_do_not_exist_leave_nothing_behind(store, place):
    s = store.it
    s.release(s.lease("nobody", "a"))
    assert s.entries() == {}
    if isinstance(s, RedisStore):
        assert {*s.client.keys()} == {f"{PREFIX}leases".encode()}
    else:
        assert not any(s.kept.iterdir())


def test_the_number_of_sessions_is_limited_and_expiry_makes_room(store):
    s = store.it
    for name in "ab":
        put(s, s.lease(name, "x"), "one", 2)
    lease = s.lease("c", "x")
    with pytest.raises(Full):
        put(s, lease, "one", 2)
    put(s, s.lease("a", "y"), "two", 2)
    store.expire("b")
    put(s, lease, "one", 2)
    assert {*s.entries()} == {"a", "c"}


def test_a_session_that_is_in_use_when_its_time_is_over_is_kept(store):
    s = store.it
    put(s, s.lease("talk", "a"), "one", 1)
    held = s.lease("talk", "b")
    store.expire("talk")
    s.entries()
    put(s, held, "two", 1)
    late = s.lease("talk", "c")
    store.expire("talk")
    store.end_lease("talk")
    put(s, late, "three", 1)
    assert word(s.lease("talk", "d")) == "three"


def test_who_holds_a_lease_hears_that_it_should_stop(store):
    s = store.it
    lease = s.lease("talk", "a")
    s.stop("talk")
    assert [s.renew(lease) for _ in range(2)] == ["stop", "held"]
    s.stop("talk")
    put(s, lease, "one", 9)
    assert s.renew(s.lease("talk", "b")) == "held", "the stop was meant for another answer"


def test_saved_sessions_have_names_of_their_own(store):
    s = store.it
    data = pack_tensors({}, {"session": "{}"})
    s.save("talk", data, False, 1)
    for name, error in (("talk", Taken), ("other", Full)):
        with pytest.raises(error):
            s.save(name, data, False, 1)
    s.save("talk", data, True, 1)
    assert s.load("talk") == data and s.load("other") is None and s.entries() == {}


class Reference:
    """A store as slow and obvious as possible; a lease is its owner."""

    def __init__(self):
        self.values, self.writer, self.last, self.holder = {}, {}, {}, {}

    def lease(self, name, owner):
        if name in self.holder:
            return "held"
        self.last[name] = self.holder[name] = owner
        return self.values.get(name)

    def put(self, name, owner, value):
        if owner not in (self.last.get(name), self.writer.get(name)):
            return "refused"
        if self.writer.get(name) != owner:
            self.values[name], self.writer[name] = value, owner
        self.release(name, owner)
        return "stored"

    def renew(self, name, owner):
        if self.last.get(name) != owner:
            return "lost"
        self.holder[name] = owner
        return "held"

    def release(self, name, owner):
        if self.last.get(name) == owner:
            self.holder.pop(name, None)
            del self.last[name]

    def delete(self, name):
        for known in (self.writer, self.last, self.holder):
            known.pop(name, None)
        return self.values.pop(name, None) is not None


def test_any_order_of_calls_equals_a_reference(store):
    chance, s, slow, leases = random.Random(3), store.it, Reference(), []
    seen = set()
    for step in range(400):
        kind = chance.choice(("lease", "lease", "put", "put", "end", "release", "renew", "delete"))
        name, owner, value = chance.choice("ab"), f"o{step}", f"{step}"
        lease = chance.choice(leases[-4:] or [None])
        if kind == "lease":
            got = s.lease(name, owner)
            want = slow.lease(name, owner)
            assert (word(got) if got else "held") == want
            leases += [got] if got else []
            seen.add("held" if want == "held" else "granted")
        elif kind == "end":
            store.end_lease(name)
            slow.holder.pop(name, None)
            if isinstance(s, FolderStore):  # its clock is that of all leases
                slow.holder.clear()
        elif kind == "delete" and step % 3 == 0:
            assert s.delete(name) == slow.delete(name)
        elif kind == "put" and lease:
            want = slow.put(lease.session_id, lease.owner, value)
            with contextlib.nullcontext() if want == "stored" else pytest.raises(Refused):
                put(s, lease, value)
            seen.add(want)
        elif kind == "renew" and lease:
            want = slow.renew(lease.session_id, lease.owner)
            assert s.renew(lease) == want
            seen.add(want)
        elif kind == "release" and lease:
            s.release(lease)
            slow.release(lease.session_id, lease.owner)
        assert {*s.entries()} == {*slow.values}
    assert seen == {"held", "granted", "stored", "refused", "lost"}


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["http://127.0.0.1:1"], ["--session_store", "http:// is no session store", "redis://"]),
        (["redis://"], ["--session_store", "REDIS_URL, which is not set"]),
        (["redis://:secret@127.0.0.1:1/0"], ["redis://127.0.0.1:1 does not answer", "start"]),
        (["redis://127.0.0.1:x/0"], ["--session_store", "is no address", "redis://HOST:PORT/DB"]),
        (["here", "--session_dir", "there"], ["--session_store", "leave one of them out"]),
    ],
)
def test_a_wrong_address_is_one_line_without_the_password(model, monkeypatch, words, fragments):
    monkeypatch.delenv("REDIS_URL", raising=False)
    command = ["--checkpoint", "tiny", "--port", "0", "--session_store", *words]
    done = run_main(serve.main, *command, cwd=model)
    assert_refused(done, *fragments)
    assert "secret" not in done.stderr


def test_the_address_may_come_from_the_environment(redis_url, monkeypatch):
    monkeypatch.setenv("REDIS_URL", redis_url)
    there = open_store("redis://", TTL, LEASE)
    put(there, there.lease("talk", "a"), "one")
    assert word(open_store(redis_url, TTL, LEASE).lease("talk", "b")) == "one"


def test_a_store_that_deletes_what_is_needed_is_a_warning(redis_url, monkeypatch, capsys):
    store = open_store(redis_url, TTL, LEASE)
    said = {"maxmemory": 1000, "maxmemory_policy": "allkeys-lru"}
    monkeypatch.setattr(store.client, "info", lambda section: said)
    store.check_memory()
    assert "allkeys-lru" in capsys.readouterr().out
    said["maxmemory_policy"] = "noeviction"
    store.check_memory()
    assert capsys.readouterr().out == ""


def test_open_connections_to_a_server_that_only_reads_are_closed(redis_url, monkeypatch):
    """After a fail-over, the address leads elsewhere, but connections stay where they were."""
    store, closed = open_store(redis_url, TTL, LEASE), []
    monkeypatch.setattr(store.client.connection_pool, "disconnect", lambda: closed.append(1))
    with pytest.raises(Unavailable), store.answering():
        raise store.errors.ReadOnlyError("You can't write against a read only replica.")
    assert closed


def test_a_time_limit_closes_the_idle_connections_too(redis_url, monkeypatch):
    """Who has dropped one that was idle has dropped all."""
    store, closed = open_store(redis_url, TTL, LEASE), []
    pool = store.client.connection_pool
    monkeypatch.setattr(pool, "disconnect", lambda inuse_connections: closed.append(1))
    with pytest.raises(Unavailable), store.answering():
        raise store.errors.TimeoutError("Timeout reading from socket")
    assert closed


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_does_not_answer(tmp_path):
    store = FolderStore(tmp_path, TTL, LEASE)
    store.ping()
    (tmp_path / ".ping").symlink_to("/dev/full")
    with pytest.raises(Unavailable, match="No space left"):
        store.ping()


def test_a_folder_that_was_not_served_has_not_aged(tmp_path):
    now = [1e9]
    first = FolderStore(tmp_path, TTL, LEASE, lambda: now[0])
    put(first, first.lease("talk", "a"), "one")
    now[0] += TTL + 1
    again = FolderStore(tmp_path, TTL, LEASE, lambda: now[0])
    assert word(again.lease("talk", "b")) == "one"
    now[0] += TTL + 1
    assert again.lease("talk", "c").value is None and again.entries() == {}


# ---------------------------------------------------------------------------- several servers


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model on disk, with its tokenizer."""
    place = tmp_path_factory.mktemp("model")
    (place / "tiny").mkdir()
    save_folder(place / "tiny", free_copy(wide()))
    (place / "tiny" / "vocab.txt").write_text("\n".join([*byte_alphabet(), EOS_TOKEN]) + "\n")
    return place


@pytest.fixture(scope="module")
def undisturbed_server() -> StreamingServer:
    config = StreamingConfig(batch_size=1)
    return StreamingServer(free_copy(wide()), tokenizer=BYTES, config=config)


@pytest.fixture
def alone(undisturbed_server):
    """The same model, undisturbed."""
    yield undisturbed_server
    undisturbed_server.sessions.clear()


@pytest.fixture(scope="module", params=["folder", "redis"])
def both(request, tmp_path_factory):
    """Two servers with one store."""
    place = str(tmp_path_factory.mktemp("sessions"))
    if request.param == "redis":
        place = f"redis://127.0.0.1:{request.getfixturevalue('redis_port')}/1"
    options = {"session_store": place, "session_lease": 0.4, "prefix_cache": 0}
    with contextlib.ExitStack() as stack:
        servers = []
        for _ in range(2):
            servers.append(Running(**options))
            stack.callback(servers[-1].end)
        yield servers


@pytest.fixture
def pair(both):
    """The same, without sessions."""
    yield both
    for name in both[0].api.store.entries():
        both[0].api.store.delete(name)


GREEDY = {"temperature": 0.0, "max_tokens": 12}
ENDLESS = {"max_tokens": 4096, "logit_bias": {"256": -100, "97": 100}}
TALK = "/v1/sessions/talk"


def turn(server, prompt: str, key: str = "", **body) -> httpx.Response:
    headers = {"Idempotency-Key": key} if key else {}
    body = {"prompt": prompt, **GREEDY, **body}
    return server.http.post(f"{TALK}/completions", json=body, headers=headers)


def undisturbed(alone, name: str, prompt: str, **settings) -> str:
    """A turn of the library, after which the session is packed as a store's is."""
    settings = {"max_new_tokens": 12, **PLAIN, "temperature": 0.0, **settings}
    text = alone.generate_text(prompt, name, **settings)
    alone.pack_session(name, "")
    return text


def stored(server, name: str = "talk") -> dict[str, torch.Tensor]:
    """The tensors of a session in the store."""
    from safetensors.torch import load

    lease = server.api.store.lease(name, uuid.uuid4().hex)
    server.api.store.release(lease)
    return load(lease.value)


def assert_same_bits(server, alone, name: str = "talk") -> None:
    """The session in the store has the bits of the undisturbed one."""
    from safetensors.torch import load

    want, got = load(alone.pack_session(name, "")), stored(server, name)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[n], got[n]) for n in want)


def test_any_server_continues_any_session(pair, alone):
    pair[0].post("/v1/sessions", id="talk", seed=7)
    alone.create_session("talk", seed=7)
    for i, prompt in enumerate(("Once upon", " a time", " there", " was", "")):
        said = turn(pair[i % 2], prompt).json()
        assert said["choices"][0]["text"] == undisturbed(alone, "talk", prompt)
        assert said["session"]["turns"] == i + 1
        assert_same_bits(pair[0], alone)
    infos = [server.http.get(TALK).json() for server in pair]
    assert infos[0] == infos[1] and infos[0]["turns"] == 5 and not infos[0]["answering"]
    assert infos[0]["undo"] == 1
    lists = [server.http.get("/v1/sessions").json()["data"] for server in pair]
    assert lists == [[infos[0]]] * 2


def test_what_is_done_to_a_session_is_done_on_all_servers(pair, alone):
    one, other = pair
    one.post("/v1/sessions", id="talk", seed=7)
    alone.create_session("talk", seed=7)
    texts = [undisturbed(alone, "talk", prompt) for prompt in ("abc", "def")]
    assert [turn(one, p).json()["choices"][0]["text"] for p in ("abc", "def")] == texts
    assert other.post(f"{TALK}/rollback")["turns"] == 1
    assert_error(one.http.post(f"{TALK}/rollback"), 409, "session_id")
    assert turn(one, "def").json()["choices"][0]["text"] == texts[1]
    assert_error(other.http.post("/v1/sessions", json={"id": "talk"}), 409, "id")
    assert_error(other.http.post(f"{TALK}/fork", json={"id": "talk"}), 409, "id")
    assert other.post(f"{TALK}/fork", id="fork")["turns"] == 2
    assert one.post("/v1/sessions/fork/rollback")["turns"] == 1
    assert other.post(f"{TALK}/save", name="kept")["turns"] == 2
    assert one.post("/v1/sessions", load="kept", id="again")["turns"] == 2
    data = other.http.get(f"{TALK}/file").content
    assert one.http.post(UPLOAD, content=data, params={"id": "file"}).json()["turns"] == 2
    assert_error(other.http.post(UPLOAD, content=data, params={"id": "file"}), 409, "id")
    want = undisturbed(alone, "talk", "x")
    assert [session(other, name, "x", **GREEDY) for name in ("again", "file")] == [want] * 2
    assert one.post(f"{TALK}/reset")["tokens"] == 0
    assert turn(other, "abc").json()["choices"][0]["text"] == texts[0]
    assert one.http.delete(TALK).json()["deleted"]
    for server in pair:
        assert_error(server.http.get(TALK), 404, "session_id")
        assert_error(turn(server, "x"), 404, "session_id")
        assert_error(server.http.delete(TALK), 404, "session_id")
    other.post("/v1/sessions", id="talk", seed=7)
    assert turn(one, "abc").json()["choices"][0]["text"] == texts[0], "not the deleted one"


def test_the_memory_of_a_server_is_a_cache(place, alone):
    with contextlib.ExitStack() as stack:
        small = Running(session_store=place, max_sessions=3, session_lease=0.4)
        stack.callback(small.end)
        for name in "abc":
            small.post("/v1/sessions", id=name, seed=1)
            alone.create_session(name, seed=1)
            assert session(small, name, name, **GREEDY) == undisturbed(alone, name, name)
        assert assert_error(small.http.post("/v1/sessions"), 429)["code"] == "too_many_sessions"
        small.api.options.max_sessions = 2
        small.http.delete("/v1/sessions/c")
        for name in "abab":
            assert session(small, name, "x", **GREEDY) == undisturbed(alone, name, "x")
            assert len(small.api.server.sessions) <= 2
    with contextlib.ExitStack() as stack:
        again = Running(session_store=place)
        stack.callback(again.end)
        assert session(again, "b", "y", **GREEDY) == undisturbed(alone, "b", "y")


def test_a_turn_is_answered_again_by_its_key(pair):
    one, other = pair
    one.post("/v1/sessions", id="talk", seed=7)
    first = turn(one, "abc", "k1", gates=True, logprobs=2).json()
    again = turn(other, "abc", "k1", gates=True, logprobs=2)
    assert again.json() == first and again.headers["Idempotency-Replayed"] == "true"
    stream = turn(other, "abc", "k1", gates=True, logprobs=2, stream=True)
    events = [json.loads(x[6:]) for x in stream.text.splitlines() if x.startswith("data: {")]
    assert events[0]["choices"] == first["choices"] and events[-1]["usage"] == first["usage"]
    assert stream.text.endswith("data: [DONE]\n\n") and events[-1]["session"] == first["session"]
    assert one.http.get(TALK).json()["turns"] == 1
    error = assert_error(turn(other, "other", "k1"), 422, "Idempotency-Key")
    assert error["code"] == "idempotency_key_reused"
    streamed = turn(other, "def", "k2", stream=True).text
    texts = [json.loads(x[6:]) for x in streamed.splitlines() if x.startswith("data: {")]
    text = "".join(c["text"] for event in texts for c in event["choices"])
    assert turn(one, "def", "k2").json()["choices"][0]["text"] == text
    error = assert_error(turn(one, "abc", "k1", gates=True, logprobs=2), 409, "Idempotency-Key")
    assert error["code"] == "turn_superseded"
    turn(one, "ghi")
    assert_error(turn(other, "def", "k2"), 409, "Idempotency-Key")
    other.post(f"{TALK}/rollback")
    assert_error(turn(one, "def", "k2"), 409, "Idempotency-Key")
    assert turn(one, "jkl", "k3").status_code == 200
    other.post(f"{TALK}/rollback")
    assert "Idempotency-Replayed" not in turn(one, "jkl", "k3").headers, "it was undone"
    assert one.http.get(TALK).json()["turns"] == 3
    fork = other.post(f"{TALK}/fork", id="fork")
    path = "/v1/sessions/fork/completions"
    body = {"prompt": "jkl", **GREEDY}
    said = one.http.post(path, json=body, headers={"Idempotency-Key": "k3"}).json()
    assert said["session"]["turns"] == fork["turns"] + 1, "a fork has turns of its own"


def test_keys_work_without_a_store():
    with contextlib.ExitStack() as stack:
        server = Running()
        stack.callback(server.end)
        server.post("/v1/sessions", id="talk")
        answers = [turn(server, "abc", "k").json() for _ in range(2)]
        assert answers[0] == answers[1] and answers[0]["session"]["turns"] == 1


def test_a_turn_with_a_key_may_have_any_body(pair):
    """JSON can spell half of a surrogate pair, which is not a character."""
    one = pair[0]
    one.post("/v1/sessions", id="talk")
    body = {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {}}}
    body["response_format"]["json_schema"] = {"name": "x", "schema": {"enum": ["\ud800"]}}
    headers = {"Idempotency-Key": "k", "Content-Type": "application/json"}
    for _ in range(2):
        said = one.http.post(f"{TALK}/completions", content=json.dumps(body), headers=headers)
        assert said.status_code == 400, said.text
    assert one.api.pending == 0


def test_an_answer_that_is_too_long_is_not_kept(monkeypatch):
    server = StreamingServer(free_copy(wide()), tokenizer=BYTES)
    server.create_session("talk")
    monkeypatch.setattr(shared_sessions, "MOST_REPLY", 20)
    for key, text in (("a", "short"), ("b", "x" * 20)):
        server.generate_text("abc", "talk", max_new_tokens=1)
        shared_sessions.record_reply(server.find("talk"), key, "body", {"of": text})
    copy = server.unpack_session(server.pack_session("talk", "1-x"), "talk")
    with pytest.raises(ApiError, match="is not kept"):
        shared_sessions.find_reply(copy, "b", "body")
    server.rollback("talk")
    assert shared_sessions.find_reply(server.find("talk"), "b", "body") is None, "it was undone"


def test_only_so_many_keys_are_kept(monkeypatch):
    monkeypatch.setattr(shared_sessions, "MOST_KEYS", 2)
    server = StreamingServer(free_copy(wide()), tokenizer=BYTES)
    it = server.find(server.create_session("talk"))
    for key in "abc":
        shared_sessions.record_reply(it, key, "body", {"of": key})
    assert len(it.keys) == 2
    copy = server.unpack_session(server.pack_session("talk", "1-x"), "talk")
    assert shared_sessions.find_reply(copy, "c", "body") == {"of": "c"}
    assert shared_sessions.find_reply(copy, "a", "body") is None


@contextlib.contextmanager
def endless(server, **body):
    """An answer that goes on; gives its lines."""
    asked = {"prompt": "abc", "stream": True, **ENDLESS, **body}
    with server.http.stream("POST", f"{TALK}/completions", json=asked) as answer:
        lines = answer.iter_lines()
        next(lines)
        yield (line for line in lines if line)


def test_a_session_that_another_server_continues_is_busy(pair):
    one, other = pair
    one.post("/v1/sessions", id="talk")
    with endless(one) as lines:
        answers = [turn(other, "x"), other.http.post(f"{TALK}/rollback"), turn(one, "x")]
        for answer in (*answers, other.http.get(f"{TALK}/file")):
            assert assert_error(answer, 409, "session_id")["code"] == "session_busy"
            assert answer.headers["Retry-After"] == "1"
        assert other.http.get(TALK).json()["answering"]
        other.post(f"{TALK}/stop")
        assert [*lines][-1] == "data: [DONE]"
    info = other.http.get(TALK).json()
    assert info["turns"] == 1 and info["tokens"] > 3 and not info["answering"]
    with endless(one) as lines:
        other.http.delete(TALK)
        assert "deleted" in json.loads([*lines][-1][6:])["error"]["message"]
    assert_error(turn(one, "x"), 404, "session_id")


def test_a_file_is_stored_as_a_session_under_its_lease(pair, monkeypatch):
    one, other = pair
    store, leases = one.api.store, []

    def noted(lease, *more):
        leases.append((lease.session_id, other.api.store.lease(lease.session_id, "another")))
        put(lease, *more)

    one.post("/v1/sessions", id="talk", seed=7)
    data, put = one.http.get(f"{TALK}/file").content, store.put
    monkeypatch.setattr(store, "put", noted)
    monkeypatch.setattr(one.api.options, "max_sessions", 2)
    assert one.http.post(UPLOAD, content=data, params={"id": "new"}).status_code == 201
    assert leases == [("new", None)], "nobody else can have it"
    assert_same_bits(other, one.api.server, "new")
    full = assert_error(one.http.post(UPLOAD, content=data), 429)
    assert full["code"] == "too_many_sessions" and len(store.entries()) == 2


def test_a_client_that_disconnects_frees_the_session_for_all(pair):
    one, other = pair
    one.post("/v1/sessions", id="talk")
    turn(one, "abc")
    before = one.http.get(TALK).json()
    with endless(one):
        pass
    wait_until(lambda: not one.busy())
    assert other.http.get(TALK).json()["tokens"] == before["tokens"]
    assert turn(other, "x").json()["session"]["turns"] == 2


@pytest.mark.parametrize("kept", [True, False])
def test_a_client_that_leaves_as_its_turn_ends_may_send_it_again(tmp_path, monkeypatch, kept):
    """The engine has completed it, but the handler hears first that the client has gone."""
    called, note = [], serve.SessionCall.note

    async def leaving(call, event):
        if event.kind == "done" and not called:
            called.append(call)
            raise serve.ClientDisconnected
        await note(call, event)

    monkeypatch.setattr(serve.SessionCall, "note", leaving)
    with contextlib.ExitStack() as stack:
        server = Running(session_store=str(tmp_path) if kept else "")
        stack.callback(server.end)
        server.post("/v1/sessions", id="talk", seed=7)
        assert turn(server, "abc", "k").status_code == 499
        assert turn(server, "abc", "k").json()["session"]["turns"] == 1


def test_a_server_that_was_paused_overwrites_nothing(pair, alone, monkeypatch):
    """Its lease ends, another goes on, and then it wakes up in the middle of its turn."""
    one, other = pair
    one.post("/v1/sessions", id="talk", seed=7)
    alone.create_session("talk", seed=7)
    go_on, usual = threading.Event(), one.api.store.put

    def late(*arguments):
        go_on.wait(30)
        usual(*arguments)

    def paused(lease):
        raise Unavailable("asleep")

    monkeypatch.setattr(one.api.store, "renew", paused)
    monkeypatch.setattr(one.api.store, "put", late)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        sleeper = pool.submit(turn, one, "lost", "k")
        wait_until(lambda: one.api.sessions.held.get("talk"))
        said = turn(other, "abc")
        go_on.set()
        error = assert_error(sleeper.result(), 409, "session_id")
    assert error["code"] == "session_lost"
    assert said.json()["choices"][0]["text"] == undisturbed(alone, "talk", "abc")
    assert_same_bits(other, alone)
    monkeypatch.undo()
    assert turn(one, "lost", "k").json()["choices"][0]["text"] == undisturbed(alone, "talk", "lost")


def test_a_server_that_is_stopped_frees_its_sessions(tmp_path):
    """At once: nobody waits until the lease has ended."""
    with contextlib.ExitStack() as stack:
        server = Running(session_store=str(tmp_path), session_lease=600.0)
        stack.callback(server.end)
        store = FolderStore(tmp_path, TTL, LEASE)
        server.post("/v1/sessions", id="talk")
        with endless(server) as lines:
            assert store.find("talk").leased
            server.server.should_exit = True
            assert json.loads([*lines][-1][6:])["error"]["code"] == "shutting_down"
        wait_until(lambda: not store.find("talk").leased)


def test_a_server_that_has_lost_a_session_ends_its_answer(pair):
    one, other = pair
    one.post("/v1/sessions", id="talk")
    with endless(one) as lines:
        store = one.api.store
        if isinstance(store, RedisStore):  # at once: the server may renew its lease meanwhile
            store.client.set(f"{PREFIX}fence:talk", "999-another", px=1000)
        else:
            with store.alone():
                store.write_lease("talk", {**store.read_lease("talk"), "owner": "another"})
        assert json.loads([*lines][-1][6:])["error"]["code"] == "session_lost"
    wait_until(lambda: not one.busy())


@pytest.mark.parametrize("done", [True, False])
def test_a_turn_whose_storing_is_in_doubt_is_neither_lost_nor_doubled(pair, monkeypatch, done):
    one, other = pair
    one.post("/v1/sessions", id="talk", seed=7)
    usual = one.api.store.put

    def doubtful(*arguments):
        if done:
            usual(*arguments)
        raise Unavailable("the connection was closed")

    monkeypatch.setattr(one.api.store, "put", doubtful)
    error = assert_error(turn(one, "abc", "k"), 503)
    assert error["code"] == "store_unavailable" and "Idempotency-Key" in error["message"]
    stream = turn(one, "abc", "other", stream=True)
    if not done:
        assert "store_unavailable" in stream.text and "[DONE]" not in stream.text
        assert other.http.get(TALK).json()["turns"] == 0
    monkeypatch.undo()
    before = other.http.get(TALK).json()["turns"]
    for server in pair:
        assert turn(server, "abc", "other" if done else "k").status_code == 200
    assert one.http.get(TALK).json()["turns"] == max(before, 1)


def test_a_change_that_was_not_stored_is_not_in_memory_either(pair, monkeypatch):
    one, _ = pair
    one.post("/v1/sessions", id="talk")
    turn(one, "abc")

    async def fails(held):
        raise RuntimeError("before it is stored")

    monkeypatch.setattr(shared_sessions.Held, "commit", fails)
    assert_error(one.http.post(f"{TALK}/reset"), 500)
    monkeypatch.undo()
    assert turn(one, "def").json()["session"]["turns"] == 2


def test_a_renewal_between_storing_and_its_end_does_no_harm(pair, monkeypatch):
    store = pair[0].api.store
    put, renew, stored, seen = store.put, store.renew, threading.Event(), threading.Event()

    def slow_put(*arguments):
        put(*arguments)
        stored.set()
        assert seen.wait(30)

    def late_renew(lease):
        said = renew(lease)
        if stored.is_set():
            assert said == "lost"
            seen.set()
        return said

    pair[0].post("/v1/sessions", id="talk")
    monkeypatch.setattr(store, "put", slow_put)
    monkeypatch.setattr(store, "renew", late_renew)
    answer = turn(pair[0], "abc", stream=True)
    assert answer.text.endswith("data: [DONE]\n\n") and "session_lost" not in answer.text


class Wire(socketserver.ThreadingTCPServer):
    """A way to the Redis server that can be cut."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, port: int, to: int):
        self.to, self.ends = to, []
        super().__init__(("127.0.0.1", port), None)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def finish_request(self, request, address):
        with socket.create_connection(("127.0.0.1", self.to)) as far:
            self.ends += [request, far]
            back = threading.Thread(target=self.carry, args=(far, request))
            back.start()
            self.carry(request, far)
            back.join()

    @staticmethod
    def carry(a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(2**16):
                b.sendall(data)
        for end in (a, b):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self.shutdown()
        self.server_close()
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_who_asks_whether_the_store_answers_shares_one_question(pair, monkeypatch):
    """Else health checks would take all threads of a store that hangs."""
    one, go_on, asked = pair[0], threading.Event(), []
    monkeypatch.setattr(one.api.store, "ping", lambda: asked.append(go_on.wait(30)))
    one.post("/v1/sessions", id="talk")
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        said = [pool.submit(one.http.get, "/ready") for _ in range(12)]
        try:
            wait_until(lambda: one.api.sessions.pinging)
            assert turn(one, "abc").status_code == 200
        finally:
            go_on.set()
        assert {answer.result().status_code for answer in said} == {200}
    assert len(asked) < 8
    assert one.http.get("/ready").status_code == 200


def test_a_session_that_was_stored_long_ago_is_loaded_and_kept(pair, alone, monkeypatch):
    server, store = pair[0].api.server, pair[0].api.store
    alone.find(alone.create_session("talk", seed=7)).used = 1e9
    lease = store.lease("talk", "x")
    store.put(lease, alone.pack_session("talk", lease.stamp), 9)
    insert = server.insert

    def insert_and_clean(*args, **named):
        insert(*args, **named)
        server.cleanup_old_sessions(3600)

    monkeypatch.setattr(server, "insert", insert_and_clean)
    assert turn(pair[0], "abc").json()["session"]["turns"] == 1


def test_nothing_is_lost_while_the_store_is_down(redis_url, redis_port, alone):
    port = free_port()
    wire = Wire(port, redis_port)
    options = {"session_store": f"redis://127.0.0.1:{port}/0", "session_lease": 0.4}
    with contextlib.ExitStack() as stack:
        server = Running(**options)
        stack.callback(server.end)
        server.post("/v1/sessions", id="talk", seed=7)
        alone.create_session("talk", seed=7)
        assert turn(server, "abc").json()["choices"][0]["text"] == undisturbed(alone, "talk", "abc")
        assert server.http.get("/ready").status_code == 200
        with endless(server) as lines:
            wire.cut()
            server.api.engine.enqueue(lambda: server.api.engine.stop("talk"))
            assert json.loads([*lines][-1][6:])["error"]["code"] == "store_unavailable"
        for answer in (turn(server, "x"), server.http.get(TALK), server.http.get("/v1/sessions")):
            error = assert_error(answer, 503)
            assert error["code"] == "store_unavailable" and answer.headers["Retry-After"] == "1"
        assert server.http.get("/health").status_code == 200
        assert server.http.get("/ready").json() == {"status": "no session store"}
        assert server.http.get("/ready").status_code == 503
        assert server.post(COMPLETIONS, prompt="a", max_tokens=3)["choices"]
        assert 'failures_total{kind="unavailable"}' in server.http.get("/metrics").text
        stack.callback(Wire(port, redis_port).cut)
        assert server.http.get("/ready").status_code == 200
        assert turn(server, "def").json()["choices"][0]["text"] == undisturbed(alone, "talk", "def")
        assert_same_bits(server, alone)


def test_a_damaged_or_foreign_session_is_refused(pair):
    one, other = pair
    store = one.api.store
    for name in ("flipped", "foreign", "fine"):
        one.post("/v1/sessions", id=name, seed=7)
        session(one, name, "abc", **GREEDY)
    stranger = StreamingServer(free_copy(wide(d_state=4)), tokenizer=BYTES)
    stranger.create_session("foreign")
    damaged = bytearray(store.lease("flipped", "x").value)
    damaged[-9] ^= 1
    for name, value in (("flipped", bytes(damaged)), ("foreign", stranger.pack_session("foreign"))):
        if isinstance(store, RedisStore):
            store.client.delete(f"{PREFIX}lease:{name}")
            store.client.hset(f"{PREFIX}session:{name}", mapping={"value": value, "stamp": "9-x"})
        else:
            (store.kept / f"{name}.lease").unlink()
            (store.kept / f"{name}.safetensors").write_bytes(value)
        path = f"/v1/sessions/{name}/completions"
        error = assert_error(other.http.post(path, json={"prompt": "x"}), 409, "session_id")
        assert error["code"] == "session_unusable"
        assert ("is damaged" if name == "flipped" else "of this model") in error["message"]
    assert "fine" in {s["id"] for s in other.http.get("/v1/sessions").json()["data"]}
    assert session(other, "fine", "x", **GREEDY)
    assert other.http.delete("/v1/sessions/flipped").status_code == 200


def test_sessions_of_earlier_versions_are_continued(tmp_path, alone):
    """They kept sessions in --session_dir/kept, as files of save_session."""
    alone.create_session("talk", seed=7)
    alone.generate_text("abc", "talk", max_new_tokens=12, **PLAIN)
    alone.save_session("talk", tmp_path / "kept" / "talk.safetensors")
    assert "stamp" not in read_notes((tmp_path / "kept" / "talk.safetensors").read_bytes())
    with contextlib.ExitStack() as stack:
        server = Running(session_dir=str(tmp_path), keep_sessions=True)
        stack.callback(server.end)
        (info,) = server.http.get("/v1/sessions").json()["data"]
        assert info["turns"] == 1 and info["seed"] == 7
        assert turn(server, "x").json()["choices"][0]["text"] == undisturbed(alone, "talk", "x")
        assert server.http.get(TALK).json()["turns"] == 2
    alone.load_session(tmp_path / "kept" / "talk.safetensors", "again")
    assert undisturbed(alone, "again", "y") == undisturbed(alone, "talk", "y")


# ------------------------------------------------------------------------- a store that hangs

SHORT = 1.0  # seconds in place of TIMEOUT
SMALL = {"batch_size": 2, "max_queue": 1, "session_lease": 600.0}
needs_redis = pytest.mark.skipif(not REDIS, reason="needs a server other than fakeredis")
needs_fifo = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")


@pytest.fixture
def soon(monkeypatch):
    """Time limits that are not worth waiting for."""
    monkeypatch.setattr(session_store, "TIMEOUT", SHORT)
    monkeypatch.setattr(Breaker, "timeout", SHORT)
    monkeypatch.setattr(Breaker, "limit", 5 * SHORT)
    monkeypatch.setattr(Breaker, "pause", 1000.0)


@pytest.fixture
def paused(soon, tmp_path):
    """The address of a Redis server, and functions that pause it and let it go on."""
    if not hasattr(signal, "SIGSTOP"):
        pytest.skip("needs signals that pause a process")
    with redis_server(tmp_path) as (port, child):
        place = f"redis://127.0.0.1:{port}/0"
        yield place, *(lambda s=s: child.send_signal(s) for s in (signal.SIGSTOP, signal.SIGCONT))


@needs_redis
def test_a_lease_that_a_paused_server_grants_to_nobody_is_found_again(paused):
    """It reads what lies in its sockets, also what nobody waits for any more."""
    place, pause, resume = paused
    store = open_store(place, TTL, LEASE)
    put(store, store.lease("talk", "x"), "one")
    pause()
    try:
        with pytest.raises(Unavailable):
            store.lease("talk", "a")
    finally:
        resume()
    wait_until(lambda: store.client.get(f"{PREFIX}lease:talk") == b"a")
    found = store.lease("talk", "b")
    assert word(found) == "one" and store.renew(found) == "held"
    put(store, found, "two")
    assert word(store.lease("talk", "c")) == "two" and not store.doubtful


@needs_redis
def test_a_server_without_memory_is_not_ready(redis_port):
    store = open_store(f"redis://127.0.0.1:{redis_port}/2", TTL, LEASE)
    store.ping()
    assert not store.client.keys(), "it writes nothing"
    store.client.config_set("maxmemory", 1)
    try:
        with pytest.raises(Unavailable, match="OOM|memory"):
            store.ping()
        open_store(f"redis://127.0.0.1:{redis_port}/2", TTL, LEASE)  # which may delete sessions
    finally:
        store.client.config_set("maxmemory", 0)
    store.ping()


@needs_fifo
def test_of_the_threads_that_use_a_folder_that_hangs_one_hangs(tmp_path, soon, monkeypatch):
    monkeypatch.setattr(session_store, "TIMEOUT", 0.05)
    store = FolderStore(tmp_path, TTL, LEASE)
    os.mkfifo(store.kept / "stuck.lease")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(store.lease, "stuck", "a")
        wait_until(store.mutex.locked)
        try:
            for ask in (store.ping, store.entries, lambda: store.lease("talk", "b")):
                with pytest.raises(Unavailable, match="has not answered"):
                    ask()
        finally:
            free_the_fifo(store)
        assert stuck.result().found == ""
    assert store.lease("talk", "b") and not store.entries()


def free_the_fifo(store: FolderStore) -> None:
    """Let go on who reads the lease of the session `stuck`."""
    (store.kept / "stuck.lease").write_bytes(b"{")


def test_a_clock_that_is_set_back_keeps_no_session_for_long(tmp_path):
    now = [1e9]
    store = FolderStore(tmp_path, TTL, LEASE, lambda: now[0])
    other = FolderStore(tmp_path, TTL, LEASE / 10, lambda: now[0])
    lease = store.lease("talk", "a")
    now[0] -= 3600
    assert other.lease("talk", "b") is None
    now[0] += LEASE - 1
    assert other.lease("talk", "b") is None and store.renew(lease) == "held"
    now[0] -= 3600
    assert other.lease("talk", "b") is None
    now[0] += LEASE + 1
    assert other.lease("talk", "b")
    with pytest.raises(Refused):
        put(store, lease, "old")


async def ask_at_once(url: str, paths: list[str]) -> list[httpx.Response]:
    """POST to all these paths at once."""
    limits = httpx.Limits(max_connections=None)
    body = {"prompt": "x", **GREEDY}
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
        return await asyncio.gather(*(http.post(path, json=body) for path in paths))


def path_of(name: str) -> str:
    return f"/v1/sessions/{name}/completions"


def turn_of(server, name: str) -> httpx.Response:
    return server.http.post(path_of(name), json={"prompt": "x", **GREEDY})


def assert_unavailable(answer: httpx.Response) -> None:
    error = assert_error(answer, 503)
    assert error["code"] == "store_unavailable" and answer.headers["Retry-After"] == "1"


def assert_only_sessions_wait(server, monkeypatch) -> list[str]:
    """100 turns at once fail soon, and what needs no store is answered; the sessions asked for."""
    asked, lease = [], server.api.store.lease
    monkeypatch.setattr(server.api.store, "lease", lambda *a: (asked.append(a[0]), lease(*a))[1])
    turns, began = [path_of(f"s{i}") for i in range(100)], time.monotonic()
    said = asyncio.run(ask_at_once(server.url, turns + [COMPLETIONS] * 3))
    assert time.monotonic() - began < 20 * SHORT, "a time limit of the store, and the work"
    for answer in said[:100]:
        assert_unavailable(answer)
    assert [answer.status_code for answer in said[100:]] == [200] * 3
    names = [*asked]
    assert len(names) <= Breaker.threads
    for answer in (*asyncio.run(ask_at_once(server.url, turns[:9])), server.http.get(TALK)):
        assert_unavailable(answer)
    assert server.http.get("/ready").json() == {"status": "no session store"}
    assert server.http.get("/health").status_code == 200
    assert asked == names, "it is not asked again at once"
    return names


@pytest.fixture
def silent(soon, redis_url, redis_port):
    """The same of a server that accepts connections while it is silent, and never answers."""
    wire = Wire(free_port(), redis_port)
    address = wire.server_address
    with contextlib.ExitStack() as stack:

        def silence() -> None:
            wire.cut()
            stack.enter_context(socket.create_server(address, backlog=128))

        def resume() -> None:
            stack.close()
            stack.callback(Wire(address[1], redis_port).cut)

        yield f"redis://127.0.0.1:{address[1]}/0", silence, resume


@pytest.fixture(params=["paused", "silent"])
def hanging(request):
    """The address of a store, and functions that make it hang and let it go on."""
    return request.getfixturevalue(request.param)


def test_a_store_that_hangs_holds_up_sessions_only_and_they_go_on(hanging, alone, monkeypatch):
    place, hang, resume = hanging
    with running(session_store=place, **SMALL) as server:
        server.post("/v1/sessions", id="talk", seed=7)
        alone.create_session("talk", seed=7)
        assert turn(server, "x").json()["choices"][0]["text"] == undisturbed(alone, "talk", "x")
        hang()
        try:
            names = assert_only_sessions_wait(server, monkeypatch)
        finally:
            resume()
        assert_unavailable(turn_of(server, "talk"))
        server.api.sessions.breaker.trial_at = 0.0
        assert turn(server, "abc").json()["choices"][0]["text"] == undisturbed(alone, "talk", "abc")
        assert server.http.get("/ready").status_code == 200
        assert_same_bits(server, alone)
        for name in names:  # at once: no lease is left that nobody holds
            assert_error(turn_of(server, name), 404, "session_id")


@needs_redis
def test_a_turn_that_is_stored_when_a_paused_server_goes_on_is_not_doubled(paused, monkeypatch):
    place, pause, resume = paused
    with running(session_store=place, **SMALL) as server:
        server.post("/v1/sessions", id="talk", seed=7)
        turn(server, "abc")
        store, put_now = server.api.store, server.api.store.put
        monkeypatch.setattr(store, "put", lambda *a: (pause(), put_now(*a)))
        try:
            error = assert_error(turn(server, "def", "k"), 503)
        finally:
            resume()
        assert "may be stored or not" in error["message"]
        monkeypatch.setattr(store, "put", put_now)
        server.api.sessions.breaker.trial_at = 0.0
        again = turn(server, "def", "k")
        assert again.headers["Idempotency-Replayed"] == "true"
        assert again.json()["session"]["turns"] == server.http.get(TALK).json()["turns"] == 2


@needs_fifo
def test_a_folder_that_hangs_holds_up_sessions_only_and_they_go_on(soon, tmp_path, monkeypatch):
    monkeypatch.setattr(Breaker, "limit", 2 * SHORT)
    with running(session_store=str(tmp_path), **SMALL) as server:
        store = server.api.store
        server.post("/v1/sessions", id="talk", seed=7)
        os.mkfifo(store.kept / "stuck.lease")
        try:
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                stuck = pool.submit(turn_of, server, "stuck")
                wait_until(store.mutex.locked)
                assert_only_sessions_wait(server, monkeypatch)
                assert_unavailable(stuck.result())
        finally:
            free_the_fifo(store)
        wait_until(lambda: not server.api.sessions.breaker.tripped)
        assert turn(server, "abc").json()["session"]["turns"] == 1
        assert_error(turn_of(server, "stuck"), 404, "session_id")  # at once: its lease has ended


@needs_fifo
def test_a_server_ends_although_its_folder_hangs(soon, tmp_path):
    with running(session_store=str(tmp_path), **SMALL) as server:
        store = server.api.store
        server.post("/v1/sessions", id="talk")
        os.mkfifo(store.kept / "stuck.lease")
        with endless(server):
            server.api.sessions.breaker.submit(store.lease, "stuck", "a")
            wait_until(store.mutex.locked)
    assert store.mutex.locked()
    assert all(worker.daemon for worker in server.api.sessions.breaker.workers), "or Python waits"
    free_the_fifo(store)


@pytest.mark.parametrize("method", ["lease", "put"])
def test_a_turn_that_waits_for_the_store_has_no_place_in_the_queue(tmp_path, monkeypatch, method):
    with running(session_store=str(tmp_path), batch_size=1, max_queue=0) as server:
        server.post("/v1/sessions", id="talk")
        store, may_go, asked = server.api.store, threading.Event(), threading.Event()
        usual = getattr(store, method)

        def late(*arguments):
            asked.set()
            may_go.wait(30)
            return usual(*arguments)

        monkeypatch.setattr(store, method, late)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(turn, server, "abc")
            try:
                assert asked.wait(30)
                assert server.post(COMPLETIONS, prompt="a", max_tokens=3)["choices"]
            finally:
                may_go.set()
            assert waiting.result().json()["session"]["turns"] == 1
        assert server.api.pending == 0


def test_a_turn_that_finds_the_queue_full_gives_its_session_back(tmp_path):
    with running(session_store=str(tmp_path), batch_size=1, max_queue=0) as server:
        server.post("/v1/sessions", id="talk")
        usual = server.api.sessions.hold

        async def filled(session_id):
            held = await usual(session_id)
            server.api.pending += 1  # another request takes the last place meanwhile
            return held

        server.api.sessions.hold = filled
        assert assert_error(turn(server, "abc"), 429)["code"] == "queue_full"
        server.api.sessions.hold = usual
        server.api.pending -= 1
        assert turn(server, "abc").json()["session"]["turns"] == 1
        assert server.api.pending == 0


def test_a_turn_that_cannot_be_stored_gives_its_lease_back_later(soon, place):
    """The store is not asked: nothing is in doubt."""
    with running(session_store=place, **SMALL) as server:
        server.post("/v1/sessions", id="talk")
        sessions, breaker = server.api.sessions, server.api.sessions.breaker
        update = sessions.update

        async def last(lease):
            await update(lease)
            breaker.trip()

        sessions.update = last
        error = assert_error(turn(server, "abc"), 503)
        assert "nothing was changed" in error["message"]
        sessions.update = update
        assert_unavailable(turn(server, "abc"))
        breaker.trial_at = 0.0
        assert turn(server, "abc").json()["session"]["turns"] == 1


# -------------------------------------------------------------------------------------- kills


class Replica:
    """serve.py as a process of its own, at the same address after every kill."""

    def __init__(self, model: Path, store: str, forked: bool):
        self.model, self.forked, self.port = model, forked, free_port()
        self.words = ["--checkpoint", "tiny", "--port", str(self.port), "--session_store", store]
        self.words += ["--session_lease", "1", "--batch_size", "1", "--prefix_cache", "0"]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        if not self.forked:
            command = [sys.executable, str(ROOT / "serve.py"), *self.words]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            quiet = subprocess.DEVNULL
            child = subprocess.Popen(command, cwd=self.model, env=env, stdout=quiet, stderr=quiet)
            self.pid = child.pid
            return
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.chdir(self.model)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(1, 2)
                serve.main(self.words)
            finally:
                os._exit(1)

    def wait(self) -> None:
        wait_until(lambda: accepts(self.port))

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


class Client:
    """Sends turns to any of the servers until each is answered, always with the turn's key."""

    def __init__(self, replicas: list[Replica], seed: int):
        self.replicas, self.chance = replicas, random.Random(seed)
        self.http = httpx.Client(timeout=60)

    def send(self, path: str, body: dict, key: str = "") -> dict:
        while True:
            url = self.chance.choice(self.replicas).url + path
            with contextlib.suppress(httpx.TransportError):
                answer = self.http.post(url, json=body, headers={"Idempotency-Key": key or "none"})
                if answer.status_code in (200, 201):
                    return answer.json()
                code = answer.json()["error"]["code"]
                if code == "id_taken":
                    return {}
                assert code in ("session_busy", "session_lost", "shutting_down"), answer.text
            threading.Event().wait(0.05)


def count_kills(replicas: list[Replica], done: list, total: int, kills: int) -> int:
    """Kill replicas with -9 at random points of the work, and start them again."""
    chance = random.Random(0)
    points = sorted(chance.sample(range(1, total), kills))
    for point in points:
        wait_until(lambda point=point: len(done) >= point, 600)
        threading.Event().wait(chance.random() * 0.02)  # anywhere in the turns that run
        victim = chance.choice(replicas)
        victim.kill()
        victim.start()
        victim.wait()
    return len(points)


def survive_kills(model: Path, url: str, sessions: int, kills: int, forked: bool) -> None:
    """Talk in many sessions at once while servers are killed; then compare with no disturbance."""
    turns, done = 3, []
    replicas = [Replica(model, url, forked) for _ in range(2)]
    said: dict[str, list[str]] = {f"s{i}": [] for i in range(sessions)}

    def talk(worker: int) -> None:
        client = Client(replicas, worker)
        for name in [*said][worker::5]:
            client.send("/v1/sessions", {"id": name, "seed": 1})
        for number in range(turns):
            for name in [*said][worker::5]:
                body = {"prompt": f"{name} {number} ", **GREEDY}
                path = f"/v1/sessions/{name}/completions"
                answer = client.send(path, body, f"{name}-{number}")
                assert answer["session"]["turns"] == number + 1
                said[name].append(answer["choices"][0]["text"])
                done.append(name)

    try:
        for replica in replicas:
            replica.wait()
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            killer = pool.submit(count_kills, replicas, done, sessions * turns, kills)
            for worker in [pool.submit(talk, i) for i in range(5)]:
                worker.result()
            assert killer.result() == kills
    finally:
        for replica in replicas:
            replica.kill()
    store = open_store(url, TTL, LEASE)
    alone = StreamingServer(model / "tiny", "cpu", StreamingConfig(batch_size=1))
    for name, texts in said.items():
        alone.create_session(name, seed=1)
        assert texts == [undisturbed(alone, name, f"{name} {n} ") for n in range(turns)]
        value = store.lease(name, "judge").value
        assert json.loads(read_notes(value)["info"])["turns"] == turns
        found = alone.unpack_session(value, name)
        want = alone.find(name)
        for a, b in ((found.now, want.now), (found.before, want.before)):
            assert a.recent == b.recent and (a.logits == b.logits).all()
            mine, its = a.state.tensors(), b.state.tensors()
            assert all(torch.equal(mine[n], its[n]) for n in its)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_kills_lose_and_double_no_turn(model, redis_url):
    survive_kills(model, redis_url, sessions=10, kills=2, forked=True)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_kills_lose_and_double_no_turn_in_a_folder(model, tmp_path):
    survive_kills(model, str(tmp_path), sessions=40, kills=10, forked=True)


class Named(http.server.BaseHTTPRequestHandler):
    """Answers with the port of its server."""

    def do_GET(self):
        port = str(self.server.server_address[1]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(port)))
        self.end_headers()
        self.wfile.write(port)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def proxy_of(addresses: list[str], folder: Path):
    """The proxy of compose.yaml before other replicas; gives its address."""
    port, config = free_port(), (ROOT / "examples" / "haproxy.cfg").read_text()
    for number, address in enumerate(addresses, 1):
        config = config.replace(f"replica{number}:8000", address)
    (folder / "cfg").write_text(config.replace("bind :8000", f"bind 127.0.0.1:{port}"))
    with subprocess.Popen(["haproxy", "-db", "-f", folder / "cfg"]) as proxy:
        try:
            wait_until(lambda: accepts(port))
            yield f"http://127.0.0.1:{port}"
        finally:
            proxy.kill()


@pytest.mark.skipif(not shutil.which("haproxy"), reason="haproxy is not here")
def test_the_proxy_keeps_sessions_together_and_divides_the_rest(tmp_path):
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Named) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    addresses = [f"127.0.0.1:{server.server_address[1]}" for server in servers]
    with proxy_of(addresses, tmp_path) as url:

        def found(*paths: str) -> set[str]:
            return {httpx.get(url + path).text for path in paths}

        for path in (COMPLETIONS, CHAT, "/v1/responses", "/v1/embeddings", "/v1/sessions"):
            assert len(found(*[path] * 4)) == 2, path
        homes = [found(f"/v1/sessions/{n}", f"/v1/sessions/{n}/completions") for n in range(9)]
        assert {len(home) for home in homes} == {1} and len(set.union(*homes)) == 2
    for server in servers:
        server.shutdown()
        server.server_close()


class Dying(Named):
    """Ends each POST without an answer."""

    def do_POST(self):
        self.close_connection = True


@pytest.mark.skipif(not shutil.which("haproxy"), reason="haproxy is not here")
def test_errors_of_the_proxy_have_the_form_of_the_server(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dying) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"127.0.0.1:{server.server_address[1]}"
        with proxy_of([address, address], tmp_path) as url:
            assert assert_error(httpx.post(url + COMPLETIONS), 502)["code"] == "bad_gateway"
        server.shutdown()
    with proxy_of([address, address], tmp_path) as url:
        answer = httpx.post(url + COMPLETIONS)
        assert assert_error(answer, 503)["code"] == "no_server"
        assert answer.headers["Retry-After"] == "1"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("haproxy"), reason="haproxy is not here")
def test_the_proxy_of_compose_hides_a_kill(model, redis_url, redis_port, tmp_path):
    """Its configuration, with other addresses."""
    wire = Wire(free_port(), redis_port)
    url = f"redis://127.0.0.1:{wire.server_address[1]}/0"
    replicas = [Replica(model, url, forked=True) for _ in range(2)]
    addresses = [replica.url.removeprefix("http://") for replica in replicas]
    with proxy_of(addresses, tmp_path) as proxy, httpx.Client(base_url=proxy, timeout=60) as http:
        try:
            wait_until(lambda: http.get("/ready").status_code == 200)
            for name in "abcd":
                http.post("/v1/sessions", json={"id": name, "seed": 1})
            for number in range(6):
                if number == 3:
                    replicas[0].kill()
                for name in "abcd":
                    path, key = f"/v1/sessions/{name}/completions", f"{name}{number}"
                    said = httpx.Response(503)
                    while said.status_code in (502, 503):  # until the check has seen the kill
                        headers = {"Idempotency-Key": key}
                        said = http.post(path, json={"prompt": "x", **GREEDY}, headers=headers)
                    assert said.json()["session"]["turns"] == number + 1
            assert http.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200
            wire.cut()
            wait_until(lambda: http.get("/ready").status_code == 503)
            wait_until(lambda: http.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200)
            error = assert_error(http.get("/v1/sessions/a"), 503)
            assert error["code"] == "store_unavailable"
        finally:
            replicas[1].kill()


@pytest.mark.slow
def test_twenty_kills_among_two_hundred_sessions(model, redis_url):
    survive_kills(model, redis_url, sessions=200, kills=20, forked=False)
