"""The page's arithmetic, run under node: sampling and session files equal those of Python."""

import base64
import hashlib
import json
import math
import random
import re
import shutil
import struct
import subprocess
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import ROOT, free_copy, lacking, some_ids, wide

from streaming import StreamingConfig, StreamingServer, choose, draw, probabilities
from tinymamba.chat_session import ChatHistory
from tinymamba.checkpoint import order_notes, pack_tensors, read_notes
from tinymamba.cli import UserError
from tinymamba.tokenizer import SimpleTokenizer

IMPORTS = "".join(
    f"import * as {name} from {json.dumps((ROOT / 'tinymamba' / 'web' / file).as_uri())};\n"
    for name, file in (("sampling", "sampling.js"), ("files", "session_file.js"))
)
READ = """
import { readFileSync } from "node:fs";
const given = JSON.parse(readFileSync(0, "utf8"));
const bytes = (text) => new Uint8Array(Buffer.from(text, "base64"));
const base64 = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength)
  .toString("base64");
const told = (work) => { try { return work(); } catch (error) { return `${error.message}`; } };
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """Runs JavaScript, which returns a value made from `given`."""
    if not shutil.which("node"):
        lacking("node")
    folder = tmp_path_factory.mktemp("node")

    def run(body: str, given):
        script = folder / "run.mjs"
        work = f"const made = (() => {{{body}}})();\nconsole.log(JSON.stringify(made));\n"
        script.write_text(IMPORTS + READ + work)
        done = subprocess.run(
            ["node", script], input=json.dumps(given), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def base64_of(data: bytes | np.ndarray) -> str:
    return base64.b64encode(data).decode()


# ------------------------------------------------------------------------------------ hashes


def test_hashes_equal_those_of_hashlib(node):
    """Around the ends of blocks, with counters of all sizes."""
    data = random.Random(0).randbytes(5000)
    sizes = [*range(300), 511, 512, 513, 4095, 4096, 4097, 5000]
    got = node(
        """
        const data = bytes(given.data);
        return given.sizes.map((n) => [files.sha256(data.subarray(0, n)),
          base64(sampling.blake2b(data.subarray(0, n), 1 + n % 64))]);
        """,
        {"data": base64_of(data), "sizes": sizes},
    )
    for n, (sha, blake) in zip(sizes, got, strict=True):
        assert sha == hashlib.sha256(data[:n]).hexdigest()
        want = hashlib.blake2b(data[:n], digest_size=1 + n % 64).digest()
        assert blake == base64_of(want)


# ------------------------------------------------------------------------------------ sampling


def random_settings(rng: random.Random, size: int) -> dict:
    """Any settings of the sampling, each at its default in half of the cases."""
    maybe = {
        "temperature": rng.choice([0.0, 0.05, 0.3, 0.7, 1.0, 2.5]),
        "top_k": rng.choice([0, 1, 2, 5, size - 1, size, size + 1, 10**6]),
        "top_p": rng.choice([0.0, 1e-8, 0.1, 0.25, 0.5, 0.75, 0.9, 1 - 1e-12]),
        "min_p": rng.choice([0.01, 0.1, 0.5, 1.0]),
        "repetition_penalty": rng.choice([0.5, 1.1, 1.3, 3.0]),
        "repetition_window": rng.choice([0, 1, 3, 512]),
        "presence_penalty": rng.choice([-1.5, 0.4, 2.0]),
        "frequency_penalty": rng.choice([-0.3, 0.7]),
        "pad_token_id": rng.randrange(size),
        "logit_bias": {rng.randrange(size): rng.choice([1.5, -4, -math.inf]) for _ in range(3)},
        "seed": rng.choice([0, 7, 2**53 - 1, 2**53 + 1, 2**63 - 1, rng.randrange(2**63)]),
    }
    return {"seed": 3} | {name: value for name, value in maybe.items() if rng.random() < 0.5}


def random_case(rng: random.Random, size: int) -> dict:
    """Logits with and without ties, and a session that they follow."""
    numbers = np.random.default_rng(rng.randrange(2**32))
    spread = rng.choice([0.01, 1.0, 5.0, 40.0])
    logits = numbers.normal(0, spread, size).astype(np.float32)
    if rng.random() < 0.4:
        logits = np.round(logits)
    made = numbers.integers(0, size, rng.randrange(20)).tolist()
    return {
        "logits": logits,
        "recent": [*numbers.integers(0, size, rng.randrange(90)).tolist(), *made],
        "counts": Counter(made),
        "settings": random_settings(rng, size),
        "position": rng.choice([0, 1, 100, 2**40, rng.randrange(2**53)]),
    }


def for_node(case: dict) -> dict:
    counts, logits = [*case["counts"].items()], base64_of(case["logits"])
    return {**case, "settings": json.dumps(case["settings"]), "counts": counts, "logits": logits}


SAMPLE = """
  return given.map(({ logits, recent, counts, settings, position }) => {
    const config = files.parsePythonJson(settings);
    const values = [new Float32Array(bytes(logits).buffer), recent, config, new Map(counts)];
    return told(() => [sampling.choose(...values, position),
      base64(sampling.probabilities(...values))]);
  });
"""


def by_python(case: dict):
    """(id, probabilities) as streaming.py has them, or its error."""
    config = StreamingConfig(**case["settings"])
    begin = len(case["recent"]) - min(len(case["recent"]), config.repetition_window)
    values = case["logits"], case["recent"][begin:], config, case["counts"]
    try:
        return choose(*values, case["position"]), probabilities(*values)
    except UserError as e:
        return str(e)


def test_drawn_ids_and_probabilities_are_those_of_python(node):
    """Ids without exception; probabilities but for the last bits of the exponential."""
    rng = random.Random(0)
    sizes = [rng.choice([2, 3, 7, 8, 9, 40, 127, 128, 129, 257, 300]) for _ in range(4000)]
    cases = [random_case(rng, size) for size in [*sizes, *[32_000] * 8]]
    errors, drawn = 0, 0
    for case, got in zip(cases, node(SAMPLE, [for_node(case) for case in cases]), strict=True):
        want = by_python(case)
        if isinstance(want, str):
            errors += 1
            assert got == want
            continue
        drawn += want[1].max() < 1
        assert got[0] == want[0], case
        p = np.frombuffer(base64.b64decode(got[1]))
        assert np.array_equal(p > 0, want[1] > 0)
        np.testing.assert_allclose(p, want[1], rtol=1e-13, atol=0)
    assert errors > 10 and drawn > 1000


def test_a_draw_is_exact_to_the_last_bit(node):
    """The random number is the border between two ids, just below it, and just above it."""
    cases = []
    for seed in [*range(40), 2**53 + 1, 2**63 - 1]:
        hashed = hashlib.blake2b(b"%d 3" % seed, digest_size=8).digest()
        u = (int.from_bytes(hashed, "big") >> 11) / 2**53
        cases += [(seed, [x, 1 - x]) for x in (u, math.nextafter(u, 0), math.nextafter(u, 1))]
        cases += [(seed, [0.0, 5e-324, 0.0, 0.0])]
    got = node(
        "return given.map(([seed, p]) => sampling.draw(new Float64Array(p), BigInt(seed), 3));",
        [(str(seed), p) for seed, p in cases],
    )
    assert got == [draw(np.array(p), seed, 3) for seed, p in cases]
    assert got[:4] == [1, 1, 0, 1]


def test_seeds_that_are_no_whole_numbers_are_rejected(node):
    """2^53 as a number may have been another one."""
    got = node(
        """
        const seeds = [2 ** 53, -1, 0.5, "", "1e3", " 1", "0x1", null, undefined, NaN, true, -1n];
        return seeds.map((seed) => told(() => sampling.draw([1], seed, 0)));
        """,
        None,
    )
    assert all(re.match(r"seed: .* is invalid; pass a whole number", said) for said in got), got
    same = node("return [7, 7n, '7', '007'].map((s) => sampling.draw(given, s, 1));", [0.1] * 10)
    assert set(same) == {draw(np.full(10, 0.1), 7, 1)}


def test_sums_are_rounded_as_those_of_numpy(node):
    numbers = np.random.default_rng(0)
    arrays = [numbers.random(n) for n in [*range(1, 300), 1000, 1023, 1024, 4099, 32_000]]
    got = node(
        """
        const of = (text) => new Float64Array(bytes(text).buffer);
        return given.map(of).map((p) => sampling.pairwiseSum(p, 0, p.length));
        """,
        [base64_of(p) for p in arrays],
    )
    assert got == [float(p.sum()) for p in arrays]


# ------------------------------------------------------------------------------------ sessions

SCRIPTS = [
    "naïve Ωμέγα Привет",
    "日本語 한국어 العربية עברית हिन्दी",
    "😀👩\u200d👩\u200d👧 \U0010ffff",
    "lone \ud83d and \ude00",
    "'quotes' \"double\" \\ \x00\x07\x7f\u2028 \t\n\r\f\b",
    "",
]


def serve(**changes) -> StreamingServer:
    """A server of a small model over bytes."""
    model = free_copy(wide(**changes))
    config = StreamingConfig(temperature=1.0, max_new_tokens=12)
    return StreamingServer(model, config=config, tokenizer=SimpleTokenizer())


@pytest.fixture(scope="module")
def saved():
    """A server, and {name: bytes} of its sessions."""
    server = serve()
    server.create_session("new", seed=2**63 - 1)
    server.generate_text(
        some_ids(1, 700)[0].tolist(), server.create_session("long", seed=2**53 + 1)
    )
    server.generate_text("Hello", server.create_session("chat", seed=5))
    found = server.find("chat")
    messages = [{"role": "system", "content": SCRIPTS[0]}]
    messages += [
        {"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(SCRIPTS)
    ]
    found.chat = ChatHistory(tuple(messages), found.now.recent)
    config = StreamingConfig(
        temperature=1e-5,
        top_p=0.1 + 0.2,
        logit_bias={65: 1.5, 7: -2.0, 9: -math.inf, 200: 1e16, 3: 123456.0, 4: 5e-324},
        stop=[*SCRIPTS[:3], "1e5"],
        structured_outputs={"json": {"10": 1.0, "9": [2, 2.5e-7, None, True, 10**30]}},
    )
    server.insert(server.new_session("odd", found.now, config, 0, turns=2**60))
    return server, {name: server.pack_session(name) for name in ("new", "long", "chat", "odd")}


AGAIN = """
  return given.map((file) => {
    const { tensors, notes, about } = files.unpackSession(bytes(file));
    const fresh = { model: notes.model, session: files.pythonJson(about) };
    return [notes, fresh].map((notes) => base64(files.packSession({ tensors, notes })));
  });
"""


def test_a_session_of_python_is_the_same_bytes_again(node, saved):
    """With its notes as they were, and with new ones of the same values."""
    server, files = saved
    got = node(AGAIN, [base64_of(data) for data in files.values()])
    for (name, data), both in zip(files.items(), got, strict=True):
        assert [base64.b64decode(text) for text in both] == [data, data], name
        again = server.unpack_session(base64.b64decode(both[1]), name)
        assert again.chat == server.find(name).chat and again.config == server.find(name).config


def test_equal_sessions_are_equal_bytes(saved):
    """The library safetensors would write the notes in a random order."""
    server, files = saved
    assert {server.pack_session("chat") for _ in range(20)} == {files["chat"]}
    assert [*read_notes(files["chat"])] == ["format", "model", "session", "checksum"]


def test_notes_in_any_order_keep_it(node, saved):
    """As in the files of earlier versions."""
    data = saved[1]["chat"]
    notes = read_notes(data)
    orders = [random.Random(seed).sample([*notes], 4) for seed in range(8)]
    others = [b"".join(order_notes(data, {n: notes[n] for n in order})) for order in orders]
    got = node(AGAIN, [base64_of(other) for other in others])
    assert len({*others}) > 5
    assert [[base64.b64decode(text) for text in both] for both in got] == [
        [d, data] for d in others
    ]


OPEN = """
  const open = (file) => told(() => (files.unpackSession(bytes(file), given.wanted), "opened"));
  return given.files.map(open);
"""


def problems(node, files: list[bytes], **wanted) -> list[str]:
    """What is said of each file."""
    given = {"files": [base64_of(data) for data in files], "wanted": {"name": "a.file", **wanted}}
    return node(OPEN, given)


def test_damaged_files_are_rejected(node, saved):
    """A flipped bit in every byte of the header and at 300 places after it, and missing ends."""
    good, rng = saved[1]["chat"], random.Random(0)
    header = 8 + int.from_bytes(good[:8], "little")
    places = [*range(header), *(rng.randrange(header, len(good)) for _ in range(300))]
    sizes = [0, 1, 7, 8, 9, 500, header - 8, header - 1, header, header + 8, len(good) - 8]
    cut = [good[:size] for size in [*sizes, len(good) - 1]]
    cut += [good + b"\0", good + bytes(8), good[: header + 8] + good[header + 16 :]]
    flipped = node(
        """
        const file = bytes(given.file);
        return given.flips.map(([place, bit]) => {
          file[place] ^= bit;
          const said = told(() => (files.unpackSession(file, { name: "a.file" }), "opened"));
          file[place] ^= bit;
          return said;
        });
        """,
        {"file": base64_of(good), "flips": [(i, 1 << rng.randrange(8)) for i in places]},
    )
    kinds = Counter([*flipped, *problems(node, cut)])
    plain, damaged = "is not a session; choose another file", "is damaged; save it again"
    assert set(kinds) == {f"a.file: {plain}", f"a.file: {damaged}"}
    assert kinds[f"a.file: {plain}"] < 40
    assert problems(node, [good]) == ["opened"]


def test_other_files_are_named_as_what_they_are(node, saved):
    server, files = saved
    tensors = {name: t.clone() for name, t in server.tensors(server.initial[None]).items()}
    none = {"seed": 1, "turns": 0, "config": {}, "tokenizer": None, "chat": None}
    chat = {"messages": [{"role": "user", "content": ""}], "ids": []}
    read, one = tensors["recent"], tensors["position"] + 1
    last = {"recent": torch.cat([read[:, 1:], one[None] * 7], 1), "position": one * 2}

    def file(about=none, changes=(), **notes) -> bytes:
        notes = {"model": server.fingerprint, "session": json.dumps(about), **notes}
        return pack_tensors(tensors | dict(changes), notes)

    shapes = {
        name: {"type": str(t.dtype).removeprefix("torch."), "dims": [*t.shape]}
        for name, t in tensors.items()
    }
    sha = server.tokenizer.sha256
    wanted = {"model": server.fingerprint, "tokenizer": sha, "like": shapes}
    plain = "a.file: is not a session; choose another file"
    invalid = "a.file: is not a valid session; save it again"
    other = "a.file: is of another model; load the model that it belongs to"
    shaped = "a.file: has other tensors than this model; save it again"
    cases = [
        *[(data, "opened") for data in files.values()],
        *[(file(), "opened"), (file({**none, "tokenizer": sha}), "opened")],
        (file({"seed": 1, "turns": 0, "config": {}}), "opened"),  # as in earlier versions
        *[(b"", plain), (b"{}" * 99, plain), (random.Random(0).randbytes(999), plain)],
        (pack_tensors(tensors, {"model": server.fingerprint}), plain),
        (file(model="0" * 64), other),
        (file(format="tinymamba-state-1"), other),
        (file(changes={"more": torch.zeros(1)}), shaped),
        (file(changes={"logits": torch.zeros(1, 256)}), shaped),
        (file(changes={"logits": torch.zeros(1, 257, dtype=torch.int64)}), shaped),
        (file(changes={n: t.repeat(2, *[1] * (t.dim() - 1)) for n, t in tensors.items()}), shaped),
        (
            file({**none, "tokenizer": "1" * 64}),
            f"a.file: was saved with another tokenizer (111111111111) than this ({sha[:12]}); "
            "start with the tokenizer of the session",
        ),
        *[(file(changes={"logits": tensors["logits"] + x}), invalid) for x in (math.nan, math.inf)],
        (file(changes={"recent": read + 258, "position": one * 512}), invalid),
        (file(changes={"recent": read + 1, "position": one * 511}), invalid),
        (file(changes={"recent": read + 1, "position": one * 512}), "opened"),
        (file(changes={"position": tensors["position"] - 1}), invalid),
        (file(changes={"document_start": tensors["position"] + 1}), invalid),
        *[(file({**none, "seed": seed}), invalid) for seed in (-1, 2**63, 1.0, "1", None, True)],
        *[(file({**none, "turns": turns}), invalid) for turns in (-1, 0.5, [])],
        *[(file({**none, "config": config}), invalid) for config in (None, "x")],
        *[(file({**none, "chat": c}), invalid) for c in (1, {}, {**chat, "ids": [1]})],
        (file(changes={"logits": tensors["logits"][0]}), shaped),
        (
            file({**none, "chat": {"messages": [{"role": "boss", "content": ""}], "ids": []}}),
            invalid,
        ),
        (file({**none, "chat": chat}), "opened"),
        (file({**none, "chat": {**chat, "ids": [9, 7]}}, last), "opened"),
        *[
            (file({**none, "chat": {**chat, "ids": i}}, last), invalid)
            for i in ([7], [7, 9], [9.5, 7], ["9", 7], [2**60, 7])
        ],
        *[(file(about), invalid) for about in ([1, 2], None, "", {"10": 1})],
        *[(file(session=text), invalid) for text in ("[" * 100_000, "{", "nul", '{"seed": 1')],
    ]
    said = problems(node, [data for data, _ in cases], **wanted)
    assert said == [problem for _, problem in cases]


def with_header(data: bytes, change, skip: int = 0) -> bytes:
    """The file with another header, and without the first bytes of its data."""
    end = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(change(json.loads(data[8:end]))).encode()
    return len(text).to_bytes(8, "little") + text + data[end + skip :]


def test_headers_are_read_as_safetensors_reads_them(node):
    """The order of tensors is free, but they neither overlap nor leave gaps."""
    server = serve(window_size=1)
    good = server.pack_session(server.create_session(seed=1))

    def overlap(header: dict) -> dict:
        """Both are 8 bytes of zeros, so that the checksum is right."""
        for name, place in header.items():
            if name not in ("__metadata__", "document_start"):
                place["data_offsets"] = [offset - 8 for offset in place["data_offsets"]]
        return header

    changes = [
        (lambda h: dict(reversed(h.items())), 0),  # one tensor is empty
        (overlap, 8),
        (lambda h: {**h, "position": None}, 0),
        (lambda h: {**h, "position": {**h["position"], "data_offsets": 8}}, 0),
        (lambda h: {**h, "position": {**h["position"], "dtype": "U64"}}, 0),
        (lambda h: {**h, "position": {**h["position"], "shape": [-1]}}, 0),
        (lambda h: {**h, "__metadata__": {**h["__metadata__"], "more": 1}}, 0),
        (lambda h: {**h, "__metadata__": None}, 0),
    ]
    made = [with_header(good, *change) for change in changes]
    rows = {n: t.repeat(2, *[1] * (t.dim() - 1))
            for n, t in server.tensors(server.initial[None]).items()}  # fmt: skip
    made.append(pack_tensors(rows, {name: read_notes(good)[name] for name in ("model", "session")}))
    damaged, plain = "damaged; save it again", "not a session; choose another file"
    said = ["opened", *[f"a.file: is {damaged}"] * 5, *[f"a.file: is {plain}"] * 2]
    assert problems(node, made) == [*said, "a.file: is not a valid session; save it again"]
    server.unpack_session(made[0], "same")
    for data in made[1:]:
        with pytest.raises(UserError):
            server.unpack_session(data, "other")


# ------------------------------------------------------------------------------------ JSON


def random_value(rng: random.Random, depth: int = 0):
    """Any value that JSON of Python may hold."""
    kind = rng.randrange(8 if depth < 4 else 6)
    if kind < 2:
        return rng.choice([None, True, False, "", 0, -1, 1.0, -0.0, math.inf, -math.inf, 2**53])
    if kind == 2:
        return rng.randrange(-(2 ** rng.randrange(1, 200)), 2**70)
    if kind == 3:
        return struct.unpack("d", rng.randbytes(8))[0]
    if kind == 4:
        return rng.choice([float, int])(rng.randrange(1, 100)) * 10.0 ** rng.randrange(-9, 24)
    if kind == 5:
        return "".join(chr(rng.randrange(rng.choice([128, 2**16, 0x110000]))) for _ in range(6))
    if kind == 6:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    keys = rng.sample(["b", "a", "10", "9", "07", "é", "__proto__"], rng.randrange(5))
    return {key: random_value(rng, depth + 1) for key in keys}


def test_json_is_written_as_python_wrote_it(node):
    rng = random.Random(0)
    texts = [json.dumps(random_value(rng)) for _ in range(2000)]
    assert (
        node("return given.map((t) => files.pythonJson(files.parsePythonJson(t)));", texts) == texts
    )


def test_values_of_javascript_are_written_as_python_would(node):
    got = node(
        """
        const { pythonJson: text, PythonFloat } = files;
        const value = { a: [1, 0.5, -0, 2n ** 64n, new PythonFloat(3), true, null, "é"], 7: {} };
        const bad = [NaN, Infinity, 2 ** 53, undefined, () => 1, [1e300]];
        return [text(value), ...bad.map((value) => told(() => text(value)))];
        """,
        None,
    )
    value = {"7": {}, "a": [1, 0.5, 0, 2**64, 3.0, True, None, "é"]}
    assert got[0] == json.dumps(value)
    assert all(re.match(r"JSON: cannot hold .*; pass", text) for text in got[1:])


def test_text_that_is_no_json_is_rejected(node):
    texts = ["", "{", "[1,]", '{"a":1,}', '"a', '"\\', "01", "1 2", "[1 2]", "nul", '{"a" 1}', "-",
             '"\n"', "{1: 2}", "1.", ".5", "+1", "[]]", "'a'", "undefined", '"\\x"',
             "[" * 9999]  # fmt: skip
    for text in texts:
        with pytest.raises((ValueError, RecursionError)):
            json.loads(text)
    got = node("return given.map((t) => told(() => [files.parsePythonJson(t)]));", texts)
    assert all(type(said) is str for said in got)
