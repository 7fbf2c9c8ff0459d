"""Later code reads what the first release has written, and finds the same meaning in it.

The files lie in tests/artifacts. make.py there says what each one is, and how it was made. Those
of a later format lie in folders of their own; make_form.py, or a make.py with them, made them.
"""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call, run_main, tiny_config
from safetensors.torch import load_file

import peft
import testv2
from peft import load_adapter
from streaming import StreamingServer
from testv2 import (
    BEFORE,
    Config,
    ModelState,
    SimpleTokenizer,
    TinyMambaModel,
    load_checkpoint,
    load_model,
    save_checkpoint,
    save_folder,
)
from tinymamba.cli import UserError

ROOT = Path(__file__).resolve().parent.parent
OLD = Path(__file__).resolve().parent / "artifacts"
FOUND = json.loads((OLD / "expected.json").read_text(encoding="utf-8"))
LOGITS = load_file(OLD / "expected.safetensors")
IDS = torch.tensor([FOUND["ids"]])
# Where activations become bytes, one of them may come out a step away on another processor. To read
# the mode wrongly costs four times as much.
TOLERANCE = {"int8": 2e-3, "int4": 1e-4, "int4_lora": 1e-4}
SUMS = "".join(f"{a} plus {b} is {a + b}.\n" for a in range(11) for b in range(11))

pytestmark = [
    pytest.mark.filterwarnings("error::UserWarning"),
    pytest.mark.filterwarnings("error::RuntimeWarning"),
]


def assert_close(got, name):
    want, tolerance = LOGITS[name], TOLERANCE.get(name, 1e-5)
    assert got.shape == want.shape
    error, scale = (got - want).abs().max().item(), want.abs().max().item()
    assert error <= tolerance * scale, f"off by {error:.2g} at scale {scale:.2g}"


def resumed(main, name, place, **flags):
    """The last checkpoint of a run that goes on in a copy of the files."""
    shutil.copytree(OLD, place, dirs_exist_ok=True)
    file = next((place / name).glob("*_latest.pt"))
    before = load_checkpoint(file)
    words = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
    done = run_main(main, "--resume", *words, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower()
    after = load_checkpoint(file)
    assert before["global_step"] < after["global_step"]
    return after


def assert_same_run(saved, name):
    want, history = FOUND["runs"][name], saved["progress"]["history"]
    assert saved["global_step"] == want["global_step"]
    assert saved["tokens_seen"] == want["tokens_seen"]
    assert saved["data"]["samples"] == want["samples"]
    for kind in ("train", "val"):
        got, old = np.array(history[kind]), np.array(want["history"][kind])
        assert got[:, 0].tolist() == old[:, 0].tolist()
        assert np.abs(got[:, 1] - old[:, 1]).max() < 1e-4


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_checkpoint_of_the_first_release_resumes(name, tmp_path):
    path = FOUND["paths"][name]
    assert_same_run(resumed(testv2.main, name, tmp_path, checkpoint_path=path), name)


def test_an_adapter_run_of_the_first_release_resumes(tmp_path):
    flags = {"checkpoint": "folder", "output_dir": "lora_run"}
    assert_same_run(resumed(peft.main, "lora_run", tmp_path, **flags), "lora_run")
    load_adapter(load_model(OLD / "folder"), tmp_path / "lora_run")


@torch.no_grad()
@pytest.mark.parametrize("name", FOUND["paths"])
def test_a_model_of_the_first_release_is_the_same_model(name):
    model = load_model(OLD / FOUND["paths"][name])
    assert model.fingerprint() == FOUND["fingerprints"][name]
    assert_close(model(IDS)[0, FOUND["places"]], name)


@torch.no_grad()
@pytest.mark.parametrize("name", FOUND["bases"])
def test_an_adapter_of_the_first_release_serves_its_base(name):
    model = load_model(OLD / FOUND["bases"][name])
    load_adapter(model, OLD / name)
    logits, _ = model.advance(IDS, model.init_state(1))
    assert_close(logits[0, FOUND["places"]], name)


@torch.no_grad()
def test_a_state_of_the_first_release_goes_on():
    model = load_model(OLD / "folder")
    state = ModelState.load(OLD / "state.safetensors", model)
    assert state.position.tolist() == [IDS.shape[1]] * 2
    rows = torch.cat((IDS, IDS.flip(1)))[:, :5]
    assert_close(model.advance(rows, state)[0][:, -1], "state")


def tokens(server, prompt, session, **settings):
    with contextlib.closing(server.answer(prompt, session, as_ids=True, **settings)) as answer:
        return [token.id for chunk in answer for token in chunk.tokens]


@pytest.mark.parametrize("name", ["session", "adapter_session"])
def test_a_session_of_the_first_release_goes_on(name):
    adapters = {"lora": OLD / "lora", "prefix": OLD / "prefix"} if name != "session" else {}
    server = StreamingServer(OLD / "folder", device="cpu", adapters=adapters)
    want, session = FOUND[name], server.load_session(OLD / f"{name}.safetensors")
    about = server.get_session_info(session)
    assert {field: about[field] for field in want["about"]} == want["about"]
    forks = [server.fork_session(session) for _ in range(2)]
    changes = {"adapter": "lora"} if adapters else {}
    drawn = {"temperature": 0.7, "max_new_tokens": 16}
    assert tokens(server, " 9 plus", session) == want["greedy"]
    assert tokens(server, " 9 plus", forks[0], **drawn) == want["drawn"]
    assert tokens(server, " 1 minus", forks[1], **changes) == want["changed"]


@pytest.mark.parametrize("path", FOUND["tokens"])
def test_a_tokenizer_of_the_first_release_gives_the_same_ids(path):
    tokenizer, want, text = SimpleTokenizer(OLD / path), FOUND["tokens"][path], FOUND["text"]
    assert len(tokenizer) == want["size"]
    assert tokenizer.eos_token_id == want["eos"]
    assert tokenizer.encode(text) == want["ids"]
    assert tokenizer.encode(text, allow_special=True) == want["special"]
    assert tokenizer.decode(want["ids"]) == text


@pytest.mark.parametrize("folder", ["data", "words"])
def test_the_data_of_the_first_release_are_the_same_text(folder):
    tokenizer, text = SimpleTokenizer(OLD / folder / "tokenizer.json"), ""
    for part in ("train", "val"):
        about = json.loads((OLD / folder / f"{part}.json").read_text(encoding="utf-8"))
        ids = np.fromfile(OLD / folder / f"{part}.bin", about["dtype"])
        assert len(ids) == about["tokens"]
        assert about["vocab_size"] == len(tokenizer)
        assert ids[-1] == about["eos_id"] == tokenizer.eos_token_id
        text += tokenizer.decode(ids)
    assert text == SUMS


@torch.no_grad()
@pytest.mark.filterwarnings("default")
def test_a_hugging_face_folder_of_the_first_release_generates():
    transformers = pytest.importorskip("transformers")
    import hf_integration  # noqa: F401

    model = transformers.AutoModelForCausalLM.from_pretrained(OLD / "hf")
    assert_close(model(IDS).logits[0, FOUND["places"]], "hf")
    made = model.generate(IDS, max_new_tokens=len(FOUND["follow"]), do_sample=False)
    assert made[0, IDS.shape[1] :].tolist() == FOUND["follow"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(OLD / "hf")
    assert tokenizer.encode(FOUND["text"]) == FOUND["tokens"]["data/tokenizer.json"]["special"]


def test_onnx_graphs_of_the_first_release_generate():
    """They have a cosine in float64; the graphs of today do not need so new a version."""
    pytest.importorskip("onnxruntime", minversion="1.29")
    from onnx_generate import OnnxModel

    model = OnnxModel(OLD / "onnx", threads=1)
    logits, _ = model.advance(IDS.numpy())
    want = LOGITS["plain"][-1].numpy()
    assert np.abs(logits[0] - want).max() <= 1e-4 * np.abs(want).max()
    assert list(model.generate(FOUND["ids"], len(FOUND["follow"]))) == FOUND["follow"]


# ------------------------------------------------------------ fields that came later

WEIGHTLESS = {"memory_products", "min_decay", "state_noise"}  # no weights tell what they were
TODAY = {"bc_conv": True, "rotating": 0.25, "k_conv": True, "qv_conv": True, "memory": True,
    "memory_every": 4, "memory_products": 4, "min_decay": 0.05, "state_noise": 0.15}  # fmt: skip
KEYS_ONLY = {"rotating": 0.4, "qv_conv": False}
SINCE = {  # folders of files that were written when a field was new, and what it meant then
    "bc_conv": {**BEFORE, "bc_conv": True, "rotating": 0.4},
    "k_conv": {**BEFORE, "bc_conv": True, "rotating": 0.4, "k_conv": True},
    "memory": {**BEFORE, "bc_conv": True, "rotating": 0.4, "k_conv": True, "memory": True},
    "memory_products": {**TODAY, **KEYS_ONLY, "min_decay": 0.0, "state_noise": 0.0},
    "min_decay": {**TODAY, **KEYS_ONLY},
    "qv_conv": {**TODAY, "rotating": 0.4},
}


@pytest.mark.parametrize("name", ["plain.pt", "folder"])
def test_a_model_from_before_a_field_has_the_value_of_then(name):
    config = load_model(OLD / name).config
    assert {field: getattr(config, field) for field in BEFORE} == BEFORE
    assert {field: getattr(Config(), field) for field in BEFORE} == TODAY
    assert {field for field, value in BEFORE.items() if TODAY[field] == value} == set()


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain.pt", "folder"])
@pytest.mark.parametrize("since", SINCE)
def test_a_model_of_a_later_form_is_the_same_model(since, name):
    place = OLD / since
    model, expected = load_model(place / name), load_file(place / "expected.safetensors")
    assert {field: getattr(model.config, field) for field in BEFORE} == SINCE[since]
    ids = torch.arange(40)[None] * 7 % 24
    torch.testing.assert_close(model(ids), expected["first"], atol=1e-4, rtol=1e-4)
    state = ModelState.load(place / "state.safetensors", model)
    logits, _ = model.advance(ids, state)
    torch.testing.assert_close(logits, expected["again"], atol=1e-4, rtol=1e-4)


def test_a_folder_whose_fields_are_lost_does_not_fit(tmp_path):
    model = TinyMambaModel(tiny_config(state_noise=0.15))
    save_folder(tmp_path, model)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    assert {field: config[field] for field in BEFORE} == TODAY
    assert load_model(tmp_path).fingerprint() == model.fingerprint()
    for field in BEFORE.keys() - WEIGHTLESS:
        kept = {name: value for name, value in config.items() if name != field}
        path.write_text(json.dumps(kept), encoding="utf-8")
        with pytest.raises(UserError, match="does not fit its config.json"):
            load_model(tmp_path)


def test_a_checkpoint_whose_fields_are_lost_does_not_fit(tmp_path):
    model = TinyMambaModel(tiny_config())
    config = model.config.to_dict()
    for field in BEFORE.keys() - WEIGHTLESS:
        kept = {name: value for name, value in config.items() if name != field}
        save_checkpoint(tmp_path / "a.pt", {"config": kept, "model": model.state_dict()})
        with pytest.raises(UserError, match=r"a\.pt: .*does not fit"):
            load_model(tmp_path / "a.pt")


# ------------------------------------------------------------------ files that hold a tokenizer

OWN = OLD / "own_tokenizer"
HELD = json.loads((OWN / "expected.json").read_text(encoding="utf-8"))


def answer(path, **changes):
    server = StreamingServer(OWN / path, device="cpu", **changes)
    assert server.encode(HELD["text"]) == HELD["ids"]
    return server.generate_text(HELD["text"], max_new_tokens=12, temperature=0.0)


def test_files_that_hold_a_tokenizer_give_its_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert SimpleTokenizer(OWN / "data" / "tokenizer.json").sha256 == HELD["sha256"]
    for path, want in HELD["answers"].items():
        assert answer(path) == want
        held = load_model(OWN / path).tokenizer
        assert (held["sha256"], held["chat_template"]) == (HELD["sha256"], HELD["template"])
        assert held["special_tokens"] == {"eos_token": "<|endoftext|>"}
    assert answer("folder", adapters={"adapter": OWN / "adapter"}) == HELD["adapted"]
    server = StreamingServer(OWN / "folder", device="cpu")
    session = server.load_session(OWN / "session.safetensors")
    said = server.generate_text("7 plus", session, max_new_tokens=12, temperature=0.0)
    assert said == HELD["session"]
    note = {"class": "Letters", "vocab_size": len(server.tokenizer), "sha256": HELD["sha256"]}
    assert load_model(OWN / "custom.pt").tokenizer == note


def test_a_run_that_holds_a_tokenizer_resumes(tmp_path, monkeypatch):
    shutil.copytree(OWN, tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")
    done = call("--resume", "--checkpoint_path", "run_latest.pt")
    assert done.returncode == 0, done.stderr
    after = load_checkpoint("run_latest.pt")
    assert after["global_step"] == 130 and after["tokenizer"]["sha256"] == HELD["sha256"]
