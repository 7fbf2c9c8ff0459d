"""ONNX Runtime as the decoder of sessions and of the server: all is the same as by PyTorch."""

import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import assert_refused, close, free_copy, run_main, some_ids, wide
from serve_helpers import CHAT, COMPLETIONS, HELLO, running, session

import export_model
import serve
import streaming
from benchmarks import streaming as benchmark
from export_model import EngineGraph, hash_files, open_engine, with_onnx_layers
from peft import AdapterConfig, attach
from quantize import quantize_model
from streaming import StreamingConfig, StreamingServer
from testv2 import save_folder
from tinymamba.cli import UserError
from tinymamba.lock import hold_lock
from tinymamba.tokenizer import SimpleTokenizer, byte_tokenizer

SHAPE = {"n_layer": 1, "memory": False}  # small, as an export takes seconds
TEMPLATE = """{%- for tool in tools or [] %}{{- tool | tojson }}{%- endfor %}
{%- for m in messages %}{{- m.role + ': ' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\\n</tool_call>' }}{%- endfor %}
{{- '\\n' }}{%- endfor %}{{- 'assistant: ' }}"""
RECORD = {"name": "tokenizer.json", "content": byte_tokenizer().to_str(), "special_tokens": {}}
TOKENIZER = SimpleTokenizer.from_dict({**RECORD, "chat_template": TEMPLATE})
TOOL = {"name": "rain", "parameters": {"type": "object", "properties": {"at": {"enum": [1, 22]}}}}
SAMPLED = {"temperature": 0.9, "top_k": 0, "seed": 3}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A folder with the exported graphs of the small model."""
    folder = tmp_path_factory.mktemp("onnx")
    open_engine(free_copy(wide(**SHAPE)).requires_grad_(False), folder)
    return folder


@pytest.fixture
def no_export(monkeypatch):
    """From here on, an export is an error."""

    def fail(*_):
        raise AssertionError("the model is exported again")

    monkeypatch.setattr(export_model, "write_engine", fail)


class Pair(NamedTuple):
    """The same server with both engines."""

    torch: StreamingServer
    onnx: StreamingServer


def serve_with(engine: str, cache: Path, **arguments) -> StreamingServer:
    config = StreamingConfig(temperature=0.0, max_new_tokens=30)
    folder = cache if engine == "onnx" else None
    given = {"config": config, "tokenizer": TOKENIZER, "engine": engine, "onnx_folder": folder}
    return StreamingServer(free_copy(wide(**SHAPE)), **{**given, **arguments})


@pytest.fixture
def pair(cache, no_export) -> Pair:
    return Pair(serve_with("torch", cache), serve_with("onnx", cache))


def assert_equal_tokens(got: list, want: list) -> None:
    """Tokens of both engines: the same ids, and numbers up to rounding."""
    assert [t.id for t in got] == [t.id for t in want]
    for g, w in zip(got, want, strict=True):
        assert [i for i, _ in g.top] == [i for i, _ in w.top]
        assert g.logprob == (w.logprob and pytest.approx(w.logprob, abs=1e-4))
        if w.gates is not None:
            np.testing.assert_allclose(g.gates, w.gates, atol=1e-5)
        assert (g.norms is None) == (w.norms is None)
        for got, want in zip(g.norms or (), w.norms or (), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4)


# ------------------------------------------------------------------------------------- answers


def test_many_answers_as_one_batch_are_the_same(pair):
    """32 rows, which begin and end at different steps; greedy and by seeds; with all numbers."""
    made = []
    for server in pair:
        answers = [
            server.answer(
                f"Text {i}: " + "abc " * (i % 5),
                max_new_tokens=3 + i,
                temperature=0.0 if i % 2 else 0.8,
                seed=i,
                logprobs=3,
                prompt_logprobs=2 if i % 3 == 0 else None,
                norms=i % 2 == 0,
            )
            for i in range(32)
        ]
        chunks = [list(answer) for answer in answers]
        tokens = [[t for chunk in each for t in chunk.tokens] for each in chunks]
        texts = ["".join(chunk.text for chunk in each) for each in chunks]
        scores = [answer.scores for answer in answers]
        made.append((tokens, texts, scores))
    (tokens, texts, scores), others = made[1], made[0]
    assert texts == others[1]
    for got, want in zip(tokens + scores, others[0] + others[2], strict=True):
        assert_equal_tokens(got, want)
    assert len(scores[0]) > 5 and all(t.gates.shape == (1, 3) for t in tokens[0])
    assert all((t.norms is None) == bool(i % 2) for i, each in enumerate(tokens) for t in each)


def test_a_long_prompt_in_pieces_is_read_the_same(pair):
    """Of 4,096 and of one token; what follows shows in every logprob."""
    ids = some_ids(1, 4097)[0].tolist()
    made = []
    for server in pair:
        answer = server.answer(ids, as_ids=True, prompt_logprobs=0, max_new_tokens=3)
        tokens = [t for chunk in answer for t in chunk.tokens]
        made.append(answer.scores + tokens)
    assert len(made[0]) == 4100
    assert_equal_tokens(made[1], made[0])


def test_forms_of_answers_and_embeddings_are_the_same(pair):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 10**6}}}
    for form in ({"regex": "[a-f]{4,20}"}, {"json": {**schema, "required": ["n"]}}):
        made = [s.generate_text("Now: ", structured_outputs=form, **SAMPLED) for s in pair]
        assert made[0] == made[1] != ""
    vectors = [torch.from_numpy(server.embed("many words " * 60)) for server in pair]
    close(vectors[1], vectors[0], 1e-5)


# ------------------------------------------------------------------------------------- sessions


@pytest.mark.parametrize("first", [0, 1])
def test_a_session_of_one_engine_goes_on_in_the_other(pair, tmp_path, first):
    one, other = pair[first], pair[1 - first]
    own = one.create_session(seed=5)
    one.generate_text("Once upon a time", own, **SAMPLED)
    one.save_session(own, tmp_path / "talk")
    moved = other.load_session(tmp_path / "talk")
    for prompt in ("and then", " the end"):
        texts = [s.generate_text(prompt, i, **SAMPLED) for s, i in ((one, own), (other, moved))]
        assert texts[0] == texts[1] != ""


def test_forks_and_rollbacks_are_the_same(pair):
    made = []
    for server in pair:
        begun = server.create_session(seed=1)
        texts = [server.generate_text("Hello", begun, **SAMPLED)]
        fork = server.fork_session(begun, seed=2)
        texts.append(server.generate_text(" you", fork, temperature=1.0))
        server.rollback(fork)
        texts.append(server.generate_text(" you", fork, temperature=1.0))
        stream = server.generate_stream("!", begun, **SAMPLED)  # closed early: it reads again
        texts.append(next(stream))
        stream.close()
        made.append([*texts, server.generate_text("?", begun, **SAMPLED)])
    assert made[0] == made[1] and made[0][1] == made[0][2]


def test_known_prefixes_are_found_and_answers_stay_the_same(cache, no_export):
    made = []
    for engine in Pair._fields:
        server = serve_with(engine, cache, cache_bytes=2**24)
        texts, common = [], "the same long beginning of all of these texts " * 4
        for end in ("one", "two", "two", "three"):
            answer = server.answer(common + end)
            texts.append(("".join(c.text for c in answer), answer.cached_tokens))
        made.append(texts)
    assert made[0] == made[1]
    assert [cached > 100 for _, cached in made[0]] == [False, False, True, True]


# --------------------------------------------------------------------------------- the server


def test_the_http_server_gives_the_same(pair):
    """Texts, several answers, chats with tools, sessions."""
    pytest.importorskip("llguidance")
    pytest.importorskip("transformers")
    tools = {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"}
    made = []
    for library in pair:
        with running(library=library) as server:
            body = {"prompt": ["a", "bc"], "n": 3, "seed": 1, "logprobs": 2, "max_tokens": 9}
            many = server.post(COMPLETIONS, **body)["choices"]
            chat = server.post(CHAT, **HELLO, **tools, seed=11, max_tokens=99)["choices"][0]
            server.post("/v1/sessions", id="s", seed=8)
            talk = [session(server, "s", prompt, max_tokens=9) for prompt in ("hi", "there")]
            made.append((many, chat, talk))
    for got, want in zip(made[1][0], made[0][0], strict=True):
        assert got["text"] == want["text"]
        logprobs = got["logprobs"]["token_logprobs"], want["logprobs"]["token_logprobs"]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
    calls = [chat["message"]["tool_calls"][0]["function"] for _, chat, _ in made]
    assert calls[0] == calls[1] and calls[0]["name"] == "rain"
    assert made[0][2] == made[1][2]


@pytest.mark.usefixtures("no_export")
def test_the_command_takes_the_engine(cache, tmp_path):
    save_folder(tmp_path / "model", wide(**SHAPE))
    byte_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    words = ["--checkpoint", tmp_path / "model", "--prompt", "abc", "--seed", 1, "--gates"]
    done = run_main(streaming.main, *words)
    onnx = run_main(streaming.main, *words, "--engine", "onnx", "--onnx_folder", cache)
    assert (onnx.stdout, onnx.stderr) == (done.stdout, "") and len(done.stdout) > 99
    options = serve.parse(["--engine", "onnx", "--onnx_folder", str(cache)])
    assert (options.engine, options.onnx_folder) == ("onnx", str(cache))


@pytest.mark.usefixtures("no_export")
def test_the_benchmark_has_both_engines(cache, tmp_path):
    save_folder(tmp_path / "model", wide(**SHAPE))
    model = str(tmp_path / "model")
    options = benchmark.Options(model, engine="onnx", onnx_folder=str(cache))
    servers = benchmark.make_servers(options, torch.device("cpu"))
    assert {name: s.decoder.engine is None for name, s in servers.items()} == {
        "tinymamba": True,
        "tinymamba onnx": False,
    }
    assert all(benchmark.token_run(s, 5, 2)() > 0 for s in servers.values())


# --------------------------------------------------------------------------------- the graphs


def test_a_step_copies_no_state_and_changes_none(pair):
    """ONNX Runtime reads the memory of PyTorch's tensors, and PyTorch what it has written."""
    engine, seen = pair.onnx.decoder.engine, []

    class Spy:
        def run(self, names, inputs):
            outputs = step.run(names, inputs)
            seen.extend(({n: a.ctypes.data for n, a in inputs.items()}, outputs))
            return outputs

    step, engine.step = engine.step, Spy()
    state = pair.torch.model.init_state(2)
    before = state.clone()
    *_, after = engine.run(some_ids(2, 1), state)
    given, outputs = seen
    assert {n: t.data_ptr() for n, t in state.tensors().items()}.items() <= given.items()
    places = [t.data_ptr() for t in after.tensors().values()]
    assert places == [a.ctypes.data for a in outputs[3:]]
    pairs = zip(before.tensors().values(), state.tensors().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_it_has_as_many_threads_as_pytorch(cache, no_export, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    engine = serve_with("onnx", cache).decoder.engine
    for graph in (engine.prefill, engine.step):
        assert graph.get_session_options().intra_op_num_threads == 3


def test_damaged_graphs_and_those_of_another_model_are_not_used(cache, tmp_path, monkeypatch):
    """They are exported again; if that does not help, it is an error."""
    exports = []
    monkeypatch.setattr(export_model, "write_engine", lambda folder, _: exports.append(folder))
    model = free_copy(wide(**SHAPE)).requires_grad_(False)
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    open_engine(model, tmp_path)
    assert not exports
    rest = tmp_path / f"{folder.name}.half"  # of an export that was killed
    rest.mkdir()
    good = (folder / "weights.data").read_bytes()
    for content in (good[:-9] + bytes([good[-9] ^ 1]) + good[-8:], good[:-64], None):
        (folder / "weights.data").unlink()
        if content is not None:
            (folder / "weights.data").write_bytes(content)
        with pytest.raises(UserError, match=f"{folder.name}: is damaged; use the engine torch"):
            open_engine(model, tmp_path)
        (folder / "weights.data").write_bytes(good)
        assert exports == [folder]
        exports.clear()
    assert not rest.exists()
    model.blocks[0].residual_scale.mul_(1.5)
    with pytest.raises(UserError, match="damaged"):
        open_engine(model, tmp_path)
    folder.rename(exports[0])
    with pytest.raises(UserError, match="differs by .* at length 9; use the engine torch"):
        open_engine(model, tmp_path)
    assert len(exports) == 2
    (exports[0] / "step.onnx").write_text("no graph")
    (exports[0] / "config.json").write_text(json.dumps({"files": hash_files(exports[0])}))
    with pytest.raises(UserError, match="ONNX Runtime cannot read it .*delete the folder") as e:
        open_engine(model, tmp_path)
    assert "\n" not in str(e.value)


def test_a_second_process_waits_for_the_export(tmp_path):
    """As replicas of a server do that are started at one time."""
    events = []

    def wait():
        with hold_lock(tmp_path / "lock", "field", "remedy", wait=True):
            events.append("second")

    second = threading.Thread(target=wait)
    with hold_lock(tmp_path / "lock", "field", "remedy", wait=True):
        second.start()
        second.join(0.05)
        events.append("first")
    second.join()
    assert events == ["first", "second"]


def test_quantized_layers_become_those_of_onnx_runtime():
    graph = EngineGraph(quantize_model(wide(**SHAPE), 8, "dynamic"))
    assert type(with_onnx_layers(graph)) is EngineGraph


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"gate": "top_k", "document_mask": True, "eos_id": 0}, {"bits": 8}], ids=str
)
def test_other_models_are_the_same_too(tmp_path, changes):
    """With a memory, sparse gates and documents; and quantized, up to rounding of activations."""
    changes = dict(changes)
    bits = changes.pop("bits", None)
    model = wide(scan="sequential", **changes)
    model = quantize_model(model, bits, "dynamic") if bits else model
    servers = [
        StreamingServer(free_copy(model), tokenizer=TOKENIZER, engine=engine, onnx_folder=folder)
        for engine, folder in (("torch", None), ("onnx", tmp_path))
    ]
    texts = [s.generate_text("some text \0 and more", **SAMPLED) for s in servers]
    assert texts[0] == texts[1]


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("words, fragment", [
    (["--compile"], "compile: is of no use to the engine onnx"),
    (["--adapter", "folder"], "adapter: the engine onnx takes none"),
    (["--dtype", "bfloat16"], "dtype: the engine onnx computes in float32"),
    (["--engine", "tensorrt"], "--engine"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("main", [streaming.main, serve.main], ids=["streaming", "serve"])
def test_what_it_cannot_do_is_refused_before_anything_is_loaded(tmp_path, main, words, fragment):
    """So before the checkpoint is found to be missing."""
    port = ["--port", 0] if main is serve.main else []
    done = run_main(main, "--checkpoint", "none.pt", "--engine", "onnx", *words, *port)
    assert_refused(done, fragment)


@pytest.mark.usefixtures("elsewhere")
def test_other_devices_and_attached_adapters_are_refused(cache, monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    with monkeypatch.context() as patch:  # a machine with a GPU, which "auto" takes
        patch.setattr(streaming, "pick_device", lambda n: cpu if n == "cpu" else cuda)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        problem = "device: the engine onnx runs on the CPU, not on cuda:0; pass cpu"
        with pytest.raises(UserError, match=problem):
            serve_with("onnx", cache, device="cuda")
        assert serve_with("onnx", cache, device="auto").decoder.device.type == "cpu"
    adapted = attach(free_copy(wide(**SHAPE)), AdapterConfig("lora"), "a")
    with pytest.raises(UserError, match="adapter: the engine onnx takes none"):
        StreamingServer(adapted, engine="onnx", onnx_folder=cache)
    with pytest.raises(UserError, match="engine: there is no 'tf'; use torch or onnx"):
        serve_with("tf", cache)


def test_an_onnx_folder_of_export_model_is_no_checkpoint(tmp_path):
    (tmp_path / "step.onnx").touch()
    done = run_main(streaming.main, "--checkpoint", tmp_path, "--engine", "onnx")
    assert_refused(done, "has neither gates nor hidden states; pass the checkpoint")


def test_a_missing_package_is_named(cache, tmp_path, monkeypatch):
    """What only exports need is not needed where the graphs are kept."""
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    serve_with("onnx", cache)
    with pytest.raises(UserError, match="onnxscript: is not installed; pip install onnxscript"):
        serve_with("onnx", tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = run_main(streaming.main, "--checkpoint", "none.pt", "--engine", "onnx")
    assert_refused(done, "onnxruntime: is not installed")


def test_graphs_are_kept_in_the_users_cache(cache, tmp_path, monkeypatch, no_export):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shutil.copytree(cache, tmp_path / "tinymamba" / "onnx")
    serve_with("onnx", cache, onnx_folder=None)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UserError, match="onnx_folder: this user has no home folder"):
        serve_with("onnx", cache, onnx_folder=None)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="onnx_folder: .*file cannot be created"):
        serve_with("onnx", tmp_path / "file")


def test_the_kept_files_are_named_with_their_hashes(cache):
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    files = json.loads((folder / "config.json").read_text())["files"]
    assert {*files} | {"config.json"} == {path.name for path in folder.iterdir()}
