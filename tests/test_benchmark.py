"""benchmark.py: peers of equal size, interleaved timing, results, plots, failures, bad flags."""

import copy
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ROOT,
    assert_refused,
    files_below,
    flags,
    run_main,
    run_script,
    tiny_config,
    write_tokens,
)

import benchmark
from testv2 import PRESETS, Config, TinyMambaModel, load_model
from tinymamba.checkpoint import save_checkpoint
from tinymamba.cli import UserError

SMALL = {"d_model": 32, "n_layer": 2, "vocab_size": 257}
QUICK = {"sequence_lengths": 16, "batch_sizes": 2, "warmup_iterations": 0, "test_iterations": 2,
         "device": "cpu", "output_dir": "out"}  # fmt: skip
PEERS = ["llama", "gpt2", "mamba2"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def setup(**changes) -> benchmark.Setup:
    """A tiny model on the CPU in float32."""
    values = {"options": benchmark.Options(), "device": torch.device("cpu"), "dtype": torch.float32,
              "config": tiny_config(), "benchmarks": [], "lengths": [16], "peers": []}  # fmt: skip
    return benchmark.Setup(**{**values, **changes})


def run(*words) -> int:
    return benchmark.main([str(word) for word in words])


def read(folder="out") -> dict:
    return json.loads(Path(folder, "results.json").read_text())


def write_checkpoint(folder: Path) -> None:
    """model.pt with dropout, val.bin with its sidecar."""
    config = tiny_config(dropout=0.2)
    weights = TinyMambaModel(config).state_dict()
    save_checkpoint(folder / "model.pt", {"config": config.to_dict(), "model": weights})
    text = "".join(f"{n} squared is {n * n}.\n" for n in range(40))
    write_tokens(folder / "val.bin", text)
    facts = {"dtype": "int32", "tokens": len(text), "bytes": 2 * len(text)}
    (folder / "val.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The folder in which the command measured everything, and what it printed."""
    folder = tmp_path_factory.mktemp("all")
    write_checkpoint(folder)
    words = flags(**QUICK, tinymamba_checkpoint="model.pt", models_to_compare="llama")
    words += [*flags(eval_dataset="val.bin"), "--generate_plots"]
    done = run_main(benchmark.main, *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


# ------------------------------------------------------------------------------------ peers


@pytest.mark.parametrize("values", [
    benchmark.DEFAULT, {**SMALL, "num_heads": 1}, {"d_model": 768, "n_layer": 2,
    "tie_embeddings": False}, PRESETS["base"],
    *(pytest.param(values, marks=pytest.mark.slow) for values in (
        PRESETS["demo"], PRESETS["small"],
        {"d_model": 128, "n_layer": 24, "num_heads": 2, "bias": False})),
], ids=["default", "tiny", "untied", "base", "demo", "small", "deep"])  # fmt: skip
@pytest.mark.parametrize("name", [*PEERS, "mambapy"])
def test_peers_have_as_many_parameters(name, values):
    config = Config(**values)
    target = benchmark.count(TinyMambaModel, config)
    facts = benchmark.fit(name, config, 80, target)
    assert abs(facts["parameters"] / target - 1) <= 0.02
    shape = (facts["layers"], facts["width"])
    assert benchmark.count(benchmark.PEERS[name].make, config, 80, *shape) == facts["parameters"]


def test_parameters_are_counted_as_pytorch_does():
    model = TinyMambaModel(tiny_config())
    assert benchmark.count(TinyMambaModel, tiny_config()) == sum(
        p.numel() for p in model.parameters()
    )


def test_default_is_of_about_ten_million():
    assert 8e6 < benchmark.count(TinyMambaModel, Config(**benchmark.DEFAULT)) < 12e6


def test_peer_that_cannot_be_as_small_is_named():
    with pytest.raises(UserError, match=r"--models_to_compare: gpt2 cannot have 45,000 parameters"):
        benchmark.fit("gpt2", tiny_config(), positions=5000, target=45_000)


@pytest.mark.parametrize("name", ["tinymamba", *PEERS, "mambapy"])
def test_a_step_trains_every_parameter_and_decoding_starts_at_the_prompt(name):
    runner = benchmark.make_runner(name, setup())
    ids = benchmark.random_ids(setup(), 2, 16)
    step = benchmark.make_run("training", runner, False, ids, setup())
    before = copy.deepcopy(runner.model.state_dict())
    losses = [runner.loss(runner.model, ids).item()]
    assert all(step() > 0 for _ in range(3))
    losses.append(runner.loss(runner.model, ids).item())
    assert losses[1] < losses[0] < 2 * math.log(257)
    after = runner.model.state_dict()
    same = {key for key in before if key in dict(runner.model.named_parameters())
            and torch.equal(before[key], after[key])}  # fmt: skip
    assert not same
    assert runner.logits(runner.model, ids).shape == (2, 16, 257)
    decode = benchmark.make_run("decode", runner, False, ids, setup())
    assert decode() > 0 and decode() > 0
    assert not runner.model.training


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba2"])
def test_cache_goes_on_as_the_whole_text_would(name):
    """Reading a prompt, then tokens, gives the state that reading all of them at once gives."""
    runner = benchmark.make_runner(name, setup())
    model, ids = runner.model.eval(), benchmark.random_ids(setup(), 2, 16)
    with torch.no_grad():
        cache = runner.step(ids[:, 14:15], runner.read(ids[:, :14]))
        key = "cache_params" if name == "mamba2" else "past_key_values"
        last = model(input_ids=ids[:, 15:], use_cache=True, **{key: cache}).logits[:, 0]
        torch.testing.assert_close(last, runner.logits(model, ids)[:, 15], atol=1e-3, rtol=0)


# ------------------------------------------------------------------------------------ timing


def test_models_run_in_turn_and_warm_up_does_not_count():
    order = []

    def make(name):
        def run_once():
            order.append(name)
            return float(len(order))

        return lambda: run_once

    timings = benchmark.interleave({"a": make("a"), "b": make("b"), "c": make("c")}, 1, 2)
    assert order == ["a", "b", "c"] * 3
    assert timings["b"].first == 2 and timings["b"].seconds == [5, 8]


def test_one_that_fails_drops_out_and_the_others_go_on():
    rounds = iter([1.0, 1.0])

    def broken():
        raise ValueError("no\n  such\tthing")

    def dies_later():
        return next(rounds)

    timings = benchmark.interleave(
        {"built": lambda: broken(), "first": lambda: broken, "later": lambda: dies_later,
         "good": lambda: lambda: 2.0}, 1, 3)  # fmt: skip
    assert timings["built"].reason == timings["first"].reason == "ValueError: no such thing"
    assert timings["later"].reason.startswith("StopIteration")
    assert timings["good"].seconds == [2.0] * 3 and timings["good"].reason is None


@pytest.mark.parametrize("name", ["tinymamba", "llama"])
def test_plain_runs_of_a_compiled_model_run_no_compiled_code(name, monkeypatch):
    calls = []

    def backend(graph, inputs):
        return lambda *args: calls.append(graph) or graph(*args)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    runner, ids = benchmark.make_runner(name, setup()), benchmark.random_ids(setup(), 2, 16)
    compiled, plain = (
        benchmark.make_run("training", runner, form, ids, setup()) for form in (True, False)
    )
    assert compiled() > 0 and calls
    before = len(calls)
    assert plain() > 0 and benchmark.make_run("decode", runner, False, ids, setup())() > 0
    assert len(calls) == before
    runner.model.train()
    assert compiled() > 0 and len(calls) > before
    torch.compiler.reset()


def test_each_decoding_run_starts_from_the_prompt():
    seen = []

    class Appending:
        def read(self, ids):
            return ["prompt"]

        def step(self, token, state):
            seen.append(len(state))
            state.append(token)
            return state

    once = benchmark.decode_run(Appending(), None, torch.zeros(1, 4, dtype=torch.int64), setup())
    once(), once()
    assert seen == [*range(1, benchmark.DECODE_TOKENS + 1)] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_peak_memory_is_seen_after_it_was_freed():
    """In a new process, as benchmark.py measures it: a long one may keep what it has freed."""
    code = """
import torch
from benchmark import peak_bytes
cpu = torch.device("cpu")
before = peak_bytes(cpu, reset=True)
torch.ones(16 << 20)  # 64 MiB of float32
assert 60 << 20 < peak_bytes(cpu) - before < 80 << 20
assert peak_bytes(cpu, reset=True) - before < 20 << 20
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------ results


def test_everything_is_measured_and_written(everything):
    folder, shown = everything
    results = read(folder / "out")
    found = [(r["benchmark"], r["model"], r["batch"], r["length"]) for r in results["rows"]]
    both = [(kind, name, 2, 16) for kind in ("memory", "training", "prefill", "decode")
            for name in ("tinymamba", "llama")]  # fmt: skip
    assert found == [*both, ("perplexity", "tinymamba", 2, 16)]
    for row in results["rows"]:
        assert row["status"] == "ok" and row["reason"] is None and not row["compiled"]
        assert row["parameters"] == results["models"][row["model"]]["parameters"]
    machine = results["machine"]
    assert machine["torch"] == torch.__version__ and machine["dtype"] in ("bfloat16", "float32")
    assert machine["transformers"] and machine["cpu"] and machine["cores"] >= 1
    assert machine["command"].endswith("--generate_plots")
    text = (folder / "out" / "results.md").read_text()
    assert text in shown
    for title in ("Training", "Prefill", "Decoding", "Peak memory", "Loss"):
        assert f"\n## {title}, " in text or f"\n## {title} of" in text
    assert text.count("\n| length (batch) |") == 5 and text.count("\n| llama ") == 5
    assert "note: perplexity is measured for TinyMamba only" in shown


def test_ratios_are_those_of_the_medians(everything):
    rows = read(everything[0] / "out")["rows"]
    for row in rows:
        if row["benchmark"] == "perplexity":
            continue
        key = "bytes_per_token" if row["benchmark"] == "memory" else "median"
        llama = next(r for r in rows if r["benchmark"] == row["benchmark"]
                     and r["model"] == "llama")  # fmt: skip
        assert row["ratio_to_llama"] == pytest.approx(row[key] / llama[key])
        if key == "median":
            assert row["min"] <= row["median"] <= row["max"] and len(row["seconds"]) == 2
            tokens = 2 if row["benchmark"] == "decode" else 32
            assert row["max"] == pytest.approx(tokens / min(row["seconds"]))
        else:
            assert row["bytes_per_token"] * 32 == row["bytes"] > 4 * row["parameters"]


@pytest.mark.parametrize("name", ["training", "prefill", "decode", "memory"])
def test_plots_are_pictures(everything, name):
    from matplotlib.image import imread

    picture = imread(everything[0] / "out" / f"{name}.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 600
    assert len({tuple(pixel) for pixel in picture[::2, ::2, :3].reshape(-1, 3)}) > 10


def test_perplexity_is_the_models_own(tmp_path, capsys):
    write_checkpoint(tmp_path)
    words = flags(
        **{**QUICK, "sequence_lengths": [16, 24]},
        benchmark_type="perplexity",
        tinymamba_checkpoint="model.pt",
        eval_dataset="val.bin",
        dtype="float32",
    )
    assert run(*words) == 0
    model = load_model("model.pt")
    ids = torch.from_numpy(np.fromfile("val.bin", np.int32)).long()
    rows = read()["rows"]
    assert [r["length"] for r in rows] == [16, 24]
    for row in rows:
        length, blocks = row["length"], (len(ids) - 1) // row["length"]
        x = ids[: blocks * length].view(blocks, length)
        y = ids[1 : blocks * length + 1].view(blocks, length)
        with torch.no_grad():
            nats = F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
        assert row["tokens"] == blocks * length
        assert row["nats_per_token"] == pytest.approx(nats, abs=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / 2, abs=1e-5)
    assert list(read()["models"]) == ["tinymamba"]
    Path("val.json").unlink()
    assert run(*words, "--force") == 0
    assert read()["rows"][0]["bits_per_byte"] is None
    capsys.readouterr()


def test_failing_model_is_named_and_the_others_have_numbers(monkeypatch, capsys):
    peer = benchmark.PEERS["gpt2"]

    def broken(*shape):
        if torch.empty(0).device.type != "meta":
            raise RuntimeError("out of |memory|\nand more")
        return peer.make(*shape)

    monkeypatch.setitem(benchmark.PEERS, "gpt2", peer._replace(make=broken))
    words = flags(**SMALL, **QUICK, benchmark_type="inference")
    assert run(*words) == 1
    rows = read()["rows"]
    assert [r["model"] for r in rows] == ["tinymamba", *PEERS] * 2
    for row in rows:
        failed = row["model"] == "gpt2"
        assert row["status"] == ("failed" if failed else "ok")
        assert (row.get("median", 0) > 0) != failed
    assert rows[2]["reason"] == "RuntimeError: out of |memory| and more"
    assert "| failed: RuntimeError: out of /memory/ and more |" in capsys.readouterr().out


def test_old_results_are_kept_unless_forced(capsys):
    Path("out").mkdir()
    Path("out/results.json").write_text("old")
    Path("out/training.png").write_text("old plot")
    words = flags(**SMALL, **QUICK, benchmark_type="training", models_to_compare="tinymamba")
    before = files_below(Path("out"))
    with pytest.raises(UserError, match=r"--output_dir: out holds results.json, training.png; "):
        run(*words)
    assert files_below(Path("out")) == before
    assert run(*words, "--force") == 0
    assert len(read()["rows"]) == 1 and read()["rows"][0]["ratio_to_llama"] is None
    assert not Path("out/training.png").exists()
    capsys.readouterr()


def test_batches_follow_the_tokens_per_step():
    options = benchmark.Options(tokens_per_step=64)
    assert benchmark.cases(options, [16, 48, 100]) == [(4, 16), (1, 48), (1, 100)]
    options.batch_sizes = [1, 3]
    assert benchmark.cases(options, [16, 32]) == [(1, 16), (3, 16), (1, 32), (3, 32)]


# ------------------------------------------------------------------------------------ bad input


BAD = [
    ({"batch_sizes": 0}, "--batch_sizes: 0 is out of range; it must be at least 1"),
    ({"test_iterations": "x"}, "--test_iterations: 'x' is invalid; pass int"),
    ({"warmup_iterations": -1}, "--warmup_iterations: -1 is out of range"),
    ({"models_to_compare": "bert"}, "--models_to_compare: bert is not a choice"),
    ({"benchmark_type": "speed"}, "--benchmark_type: speed is not a choice"),
    ({"batch_size": 1}, "--batch_size: unknown flag; did you mean --batch_sizes?"),
    ({"d_model": 40}, "--d_model: 40 is not a multiple of 32"),
    ({"device": "tpu"}, "device: tpu is not available"),
    ({"benchmark_type": "perplexity"}, "--benchmark_type: perplexity needs --tinymamba_checkpoint"),
    ({"tinymamba_checkpoint": "none.pt"}, "none.pt: no such checkpoint"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), BAD, ids=[next(iter(w)) for w, _ in BAD])
def test_bad_flags_are_refused_in_one_line(words, message):
    assert_refused(run_main(benchmark.main, *flags(**words)), message)
    assert not list(Path().iterdir())


def test_checkpoint_says_its_own_size_and_needs_its_data(tmp_path):
    write_checkpoint(tmp_path)
    words = flags(tinymamba_checkpoint="model.pt")
    assert_refused(
        run_main(benchmark.main, *words, *flags(n_layer=3)), "--n_layer: is set by the checkpoint"
    )
    done = run_main(
        benchmark.main, *words, *flags(benchmark_type="perplexity", eval_dataset="no.bin")
    )
    assert_refused(done, "no.bin: no such file")


@pytest.mark.parametrize(("module", "model"), [("transformers", "llama"), ("mambapy", "mambapy")])
def test_missing_package_is_named(monkeypatch, module, model):
    for name in [module, f"{module}.mamba"]:
        monkeypatch.setitem(sys.modules, name, None)
    done = run_main(
        benchmark.main, *flags(**SMALL, models_to_compare=model, benchmark_type="training")
    )
    assert_refused(done, f"{module}: is not installed; pip install {module}")


def test_program_refuses_in_one_line(tmp_path):
    done = run_script("benchmark.py", "--sequence_lengths", "none", cwd=tmp_path)
    assert_refused(done, "--sequence_lengths: 'none' is invalid; pass int")


def test_help_shows_the_flags():
    asked = """tinymamba_checkpoint models_to_compare benchmark_type batch_sizes sequence_lengths
        warmup_iterations test_iterations eval_dataset output_dir device generate_plots"""
    done = run_main(benchmark.main, "--help")
    assert done.returncode == 0 and all(f"\n  --{name} " in done.stdout for name in asked.split())
