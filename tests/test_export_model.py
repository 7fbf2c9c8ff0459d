"""Models outside of training: folders of plain tensors, and graphs that fit every length."""

import copy
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import (
    DOCUMENTS,
    FIRST_FORM,
    POSIX,
    ROOT,
    assert_refused,
    close,
    close_angles,
    files_below,
    flags,
    run_main,
    run_script,
    some_ids,
    wide,
    write_tokens,
)
from safetensors.torch import load_file, save_file

import export_model
import streaming
from export_model import (
    EXACT,
    FORMATS,
    Comparison,
    Graph,
    Mismatch,
    OnnxEmbedding,
    OnnxLinear,
    Options,
    with_onnx_layers,
    write_torch_export,
    write_torchscript,
)
from onnx_generate import OnnxModel
from quantize import quantize_model
from testv2 import generate, load_model, save_folder
from tinymamba.checkpoint import new_folder
from tinymamba.cli import UserError
from tinymamba.kernels import QuantizedLinear
from tinymamba.tokenizer import SimpleTokenizer, byte_tokenizer, find_tokenizer

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 513)


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_gives_back_the_very_model(tmp_path, tied):
    model = wide(tie_embeddings=tied, **DOCUMENTS)
    save_folder(tmp_path, model)
    again = load_model(tmp_path)
    assert again.fingerprint() == model.fingerprint() and not again.training
    assert again.config.eos_id == model.config.eos_id
    ids = some_ids(2, 40)
    assert torch.equal(again(ids), model(ids))


def test_a_damaged_or_foreign_folder_is_refused(tmp_path):
    save_folder(tmp_path, wide())
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good, about = weights.read_bytes(), json.loads(config.read_text())

    def refused(fragment: str):
        with pytest.raises(UserError, match=fragment):
            load_model(tmp_path)

    for at in range(len(good) // 2, len(good), len(good) // 9):
        weights.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        refused("model.safetensors: is damaged")
    weights.write_bytes(good[: len(good) // 2])
    refused("model.safetensors: cannot be read")
    weights.write_bytes(good)
    save_file(load_file(weights), weights)  # without the checksum
    refused("model.safetensors: is damaged")
    weights.write_bytes(good)
    for other in (
        {**about, "n_layer": about["n_layer"] + 1},
        {**about, "format_version": 99},
        {**about, "model_type": "llama"},
        {"model_type": "tinymamba"},
        [],
    ):
        config.write_text(json.dumps(other))
        refused(
            "does not fit"
            if other and other.get("n_layer", 0) > about["n_layer"]
            else "config.json"
        )
    config.unlink()
    refused("config.json: cannot be read")


# ------------------------------------------------------------------------------------- graphs


def settings(**changes) -> Options:
    return Options(batch_size=2, seq_length=37, **changes)


def graph_of(**changes) -> Graph:
    return Graph(copy.deepcopy(wide(**changes)).requires_grad_(False))


@torch.no_grad()
def assert_fits_every_length(prefill, step, graph, lengths=LENGTHS):
    model = graph.model
    for batch in (1, 3):
        _, state = model.advance(some_ids(batch, 70), model.init_state(batch))
        inputs = [t.contiguous() for t in state.tensors().values()]
        for length in lengths:
            ids = some_ids(batch, length, seed=length)
            got = (step if length == 1 else prefill)(ids, *inputs)
            logits, after = model.advance(ids, state, last_only=True)
            close(got[0], logits[:, -1], 1e-4)
            for (name, want), tensor in zip(after.tensors().items(), got[1:], strict=True):
                if name.endswith("phase"):
                    close_angles(tensor, want, 1e-4)
                else:
                    close(tensor, want, 1e-4, scale=1.0)


@pytest.mark.parametrize(
    "changes",
    [{"gate": "top_k", **FIRST_FORM}, {"gate": "sparsemax", "low_rank": 4, "memory_every": 1}],
    ids=str,
)
def test_torchscript_fits_every_length(tmp_path, changes):
    graph = graph_of(**changes)
    write_torchscript(tmp_path, graph, settings())
    module = torch.jit.load(tmp_path / "model.pt")
    assert_fits_every_length(module.prefill, module.step, graph)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, Graph]:
    """A folder of all formats, as the command makes it, and the graph that they were made from."""
    folder = tmp_path_factory.mktemp("exported")
    save_folder(folder / "model", wide(n_layer=1, **DOCUMENTS))
    byte_tokenizer().save(str(folder / "model" / "tokenizer.json"))
    words = ["--format", "all", "--optimize", "--output_dir", str(folder / "made")]
    assert export_model.main(["--checkpoint", str(folder / "model"), *words]) == 0
    return folder / "made", graph_of(n_layer=1, **DOCUMENTS)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_fits_every_length(exported, name):
    folder, graph = exported
    assert_fits_every_length(*FORMATS[name].open(folder / name, settings()), graph)


@pytest.fixture(scope="module")
def onnx_folder(exported) -> tuple[Path, Graph]:
    return exported[0] / "onnx", exported[1]


@torch.no_grad()
def test_onnx_streams_what_the_model_does(onnx_folder):
    folder, graph = onnx_folder
    prompt = some_ids(1, 20)
    made = list(OnnxModel(folder).generate(prompt[0].tolist(), 2000))
    whole = torch.cat((prompt, torch.tensor([made])), dim=1)
    assert graph.model(whole[:, :-1]).argmax(-1)[0, 19:].tolist() == made


def test_both_onnx_graphs_share_their_weights(onnx_folder):
    folder, graph = onnx_folder
    size = 4 * sum(p.numel() for p in graph.model.parameters())
    assert (folder / "weights.data").stat().st_size < 1.5 * size
    for name in ("prefill.onnx", "step.onnx"):
        assert str(ROOT).encode() not in (folder / name).read_bytes()  # nor where it was made


def test_an_onnx_folder_works_alone(onnx_folder, tmp_path):
    """Elsewhere, where there is neither PyTorch nor this repository."""
    folder, graph = onnx_folder
    shutil.copytree(folder, tmp_path / "moved")
    (tmp_path / "torch.py").write_text("raise ImportError('no PyTorch here')")
    words = [sys.executable, "moved/onnx_generate.py", "--prompt", "abc", "--max_tokens", "40"]
    done = subprocess.run(
        words,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    tokenizer = SimpleTokenizer(folder / "tokenizer.json")
    ids = generate(graph.model, torch.tensor([tokenizer.encode("abc")]), 40, 0.0)[0, 3:].tolist()
    assert done.stdout == "abc" + tokenizer.decode(ids) + "\n"
    (tmp_path / "moved" / "weights.data").unlink()
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert_refused(done, "weights.data: no such file")
    shutil.copy(folder / "weights.data", tmp_path / "moved")
    done = subprocess.run([*words, "--prompt", ""], cwd=tmp_path, capture_output=True, text=True)
    assert_refused(done, "--prompt: holds no token")


def test_onnx_takes_integers_of_any_kind(onnx_folder):
    model = OnnxModel(onnx_folder[0])
    want, state = model.advance(np.array([[7, 200, 3], [1, 2, 5]], np.int64))
    for kind in (np.int32, np.uint16, np.uint8, list):
        ids = [[7, 200, 3], [1, 2, 5]] if kind is list else np.array([[7, 200, 3], [1, 2, 5]], kind)
        logits, after = model.advance(ids)
        assert np.array_equal(logits, want)
        assert all(np.array_equal(after[name], t) for name, t in state.items())
    follow = list(model.generate([7, 200], 5))
    assert follow == list(model.generate(np.array([7, 200], np.uint16), 5))
    for wrong in ([[1.5]], [["a"]], [[True]], [1, 2], [[]], [[[1]]]):
        with pytest.raises(ValueError, match=r"ids must be integers \(b, l\), l >= 1"):
            model.advance(wrong)


@POSIX
def test_an_onnx_folder_of_links_works(onnx_folder, tmp_path):
    """As a cache of downloads has it: the files lie elsewhere, under other names."""
    (tmp_path / "files").mkdir()
    (tmp_path / "links").mkdir()
    for i, path in enumerate(onnx_folder[0].iterdir()):
        shutil.copy(path, tmp_path / "files" / str(i))
        (tmp_path / "links" / path.name).symlink_to(f"../files/{i}")
    words = [sys.executable, "links/onnx_generate.py", "--max_tokens", "3", "--prompt", b"a\xffb"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a?b") and len(done.stdout) > 4


def test_onnx_draws_by_the_seed(onnx_folder):
    model = OnnxModel(onnx_folder[0])
    draws = [list(model.generate([1, 2], 30, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, DOCUMENTS, {"gate": "top_k"}], ids=str)
def test_compiled_ahead_of_time_fits_every_length(tmp_path, changes):
    graph, asked = graph_of(n_layer=1, **changes), settings(aoti=True)
    write_torch_export(tmp_path, graph, asked)
    assert_fits_every_length(*FORMATS["torch_export"].open(tmp_path, asked), graph)


# ------------------------------------------------------------------------------ quantized models


def quantized_layer(bits: int, mode: str) -> QuantizedLinear:
    layer = QuantizedLinear(96, 24, True, bits, mode, 32)
    layer.codes.copy_(torch.randint(-127, 128, layer.codes.shape))
    layer.scale.uniform_(0.001, 0.01)
    if bits == 4:
        layer.factors.copy_(torch.randint(1, 16, layer.factors.shape))
        numbers = torch.randint(-8, 8, (24, 3, 32))
        layer.codes.copy_((numbers * layer.factors[..., None]).flatten(1))
    layer.bias.data.normal_()
    return layer


class Layers(torch.nn.Module):
    """Several layers with one input each."""

    def __init__(self, layers: list[torch.nn.Module]):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, *inputs):
        return tuple(layer(x) for layer, x in zip(self.layers, inputs, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_layer_gives_the_same_in_onnx():
    """4 bits with float32 activations exactly; other layers round activations."""
    schemes = [(8, "dynamic"), (8, "weight_only"), (4, "dynamic"), (4, "weight_only")]
    layers = [quantized_layer(*scheme) for scheme in schemes]
    own = Layers([OnnxLinear(layer, 64 if layer.bits == 8 else 32) for layer in layers])
    inputs = tuple(torch.randn(2, 5, 96) for _ in layers)
    made = torch.onnx.export(own, inputs, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(made.model_proto.SerializeToString())
    names = [node.name for node in session.get_inputs()]
    given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    for got, layer, x in zip(session.run(None, given), layers, inputs, strict=True):
        want = torch.nn.functional.linear(x, layer.weight, layer.bias)
        exact = layer.bits == 4 and not layer.dynamic
        close(torch.from_numpy(got), want, 1e-5 if exact else 0.02)


def test_all_quantized_layers_become_onnx_ones():
    graph = Graph(quantize_model(wide(), 4, "weight_only", 16))
    model = with_onnx_layers(graph).model
    kinds = {name: type(model.get_submodule(name)) for name in graph.model.quantization["layers"]}
    assert len(kinds) == 13 and {*kinds.values()} == {OnnxLinear}
    assert isinstance(model.embedding, OnnxEmbedding)
    four = Graph(quantize_model(wide(), 4, "weight_only", 16, layers={"head": 4}))
    with pytest.raises(UserError, match="tied head of 4 bits"):
        with_onnx_layers(four)


def test_a_quantized_embedding_is_the_head_in_onnx():
    head = quantized_layer(8, "dynamic")
    ids = some_ids(2, 9, vocab=24)
    close(OnnxEmbedding(OnnxLinear(head, 64))(ids), head.weight[ids], 1e-6)


@pytest.mark.slow
def test_quantized_models_are_exported_and_verified(place):
    shape = {"d_model": 64, "n_layer": 2, "num_heads": 2, "ssm_head_dim": 16, "vocab_size": 257}
    done = run_script("testv2.py", *flags(preset="demo", max_steps=150, **shape), cwd=place)
    assert done.returncode == 0, done.stderr
    words = ["--quantize", "both", "--calibration_data", "data/text/train.bin"]
    words += ["--calibration_tokens", 4096]
    done = run_script("export_model.py", *words, "--verify", "--benchmark", cwd=place)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in Path("exported_models").iterdir()} == {
        "pytorch_int8",
        "onnx_int8",
        "pytorch_int4",
        "onnx_int4",
        "benchmark.json",
    }
    assert load_model("exported_models/pytorch_int4").quantization["bits"] == 4


# ------------------------------------------------------------------------------- the command


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a small model; verifications are short."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("LENGTHS", (1, 2, 17)), ("STREAMED", 20), ("ROUNDS", 1)):
        monkeypatch.setattr(export_model, name, value)
    save_folder(tmp_path / "model", wide(scan="sequential"))
    byte_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    return tmp_path


def command(*words) -> int:
    return export_model.main(["--checkpoint", "model", *words])


def test_the_command_writes_verifies_runs_and_times(folder, capsys):
    assert command("--format", "torchscript", "--verify", "--generate", "--benchmark") == 0
    said, error = capsys.readouterr()
    assert "the same for 20 of 20" in said and "deprecated" in said and not error
    rows = json.loads((folder / "exported_models" / "benchmark.json").read_text())["rows"]
    assert [row["format"] for row in rows] == ["the model", "torchscript"]
    assert all(row["step_ms"] > 0 and row["prefill_tokens_per_second"] > 0 for row in rows)
    ids = torch.tensor([SimpleTokenizer().encode("import os\n")])
    made = generate(load_model("model"), ids, 40, 0.0)[0, ids.shape[1] :].tolist()
    assert "import os\n" + SimpleTokenizer().decode(made) in said


def test_the_pytorch_format_is_the_model(folder):
    assert command("--format", "pytorch", "--verify") == 0
    made, own = folder / "exported_models" / "pytorch", load_model("model").fingerprint()
    assert load_model(made).fingerprint() == own
    assert load_model(made / "inference.pt").fingerprint() == own
    assert load_model(made).config.scan == load_model("model").config.scan == "sequential"
    words = ["--checkpoint", made, "--prompt", "a", "--max_tokens", 5]
    done = run_main(streaming.main, *words)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("place", ["logits", "layers.1.keys"])
def test_a_mismatch_says_where_and_keeps_nothing(folder, monkeypatch, capsys, place):
    """As a graph that was specialized for one length would be."""
    plain, at = FORMATS["pytorch"], ["logits", *wide().init_state(1).tensors()].index(place)

    def spoiled(folder, options):
        def prefill(ids, *state):
            out = list(graph(ids, *state))
            if ids.shape[1] == 17:
                out[at] = out[at] + 1.0
            return out

        graph, step = plain.open(folder, options)
        return prefill, step

    monkeypatch.setitem(FORMATS, "pytorch", plain._replace(open=spoiled))
    assert command("--format", "pytorch", "--verify") == 1
    error = capsys.readouterr().err
    assert f"error: pytorch: {place} differs by 1.0e+00 at length 17, batch 1" in error
    assert list((folder / "exported_models").iterdir()) == []


def test_another_likeliest_token_is_a_mismatch(folder, monkeypatch, capsys):
    """Even if all logits are within the tolerance."""
    plain = FORMATS["pytorch"]

    def spoiled(folder, options):
        def step(ids, *state):
            logits, *rest = graph(ids, *state)
            second = logits.topk(2).indices[0, 1]
            logits[0, second] = logits.max() + 1e-6
            return logits, *rest

        graph = plain.open(folder, options)[1]
        return graph, step

    monkeypatch.setitem(FORMATS, "pytorch", plain._replace(open=spoiled))
    monkeypatch.setattr(export_model, "EXACT", {**EXACT, "logits": 10.0})
    assert command("--format", "pytorch", "--verify") == 1
    assert "only 1 of 20 streamed tokens are the same" in capsys.readouterr().err


def test_a_graph_of_another_shape_is_a_mismatch():
    with pytest.raises(Mismatch, match=r"logits is \(1, 3\) and not \(1, 4\) here"):
        Comparison([], EXACT).add([torch.zeros(1, 3)], [torch.zeros(1, 4)], "here")


def test_angles_are_compared_modulo_2():
    comparison, zero = Comparison(["layers.0.phase"], EXACT), torch.zeros(1)
    comparison.add([zero, torch.tensor([1.99999])], [zero, zero], "here")
    with pytest.raises(Mismatch, match="phase differs by 1.0e.00 here"):
        comparison.add([zero, torch.ones(1)], [zero, zero], "here")
    with pytest.raises(Mismatch, match="logits differs by nan"):
        comparison.add([torch.tensor([torch.nan])], [zero], "here")


@pytest.mark.parametrize("words, fragment", [
    (["--format", "pytorch", "--optimize"], "--optimize: does nothing for pytorch"),
    (["--format", "onnx", "--aoti"], "--aoti: does nothing for onnx"),
    (["--format", "torchscript", "--quantize", "int8"], "--quantize: makes torchscript smaller"),
    (["--quantize", "int4"], "--calibration_data: int4 needs it"),
    (["--calibration_data", "ids.bin"], "--calibration_data: only int4 needs it"),
    (["--quantize", "both", "--calibration_data", "ids.bin", "--calibration_tokens", "64"],
     "group_size: 64 does not divide the 32 inputs"),
    (["--quantize", "both", "--calibration_data", "ids.bin", "--calibration_tokens", "64",
      "--group_size", "8"], "group_size: ONNX Runtime has no groups of 8"),
    (["--generate", "--prompt", ""], "--prompt: holds no token"),
    (["--generate", "--vocab_file", "many.txt", "--prompt", "1"], "--vocab_file: gives ids beyond"),
    (["--quantize", "int4", "--calibration_data", "no.bin"], "no.bin"),
    (["--batch_size", "0"], "--batch_size: 0 is out of range"),
    (["--vocab_file", "none.json"], "none.json: no such file"),
    (["--checkpoint", "none.pt"], "none.pt: no such checkpoint"),
    (["--device", "cuda:77"], "device: cuda:77 is not available"),
    (["--output_dir", "model/config.json"], "--output_dir: model/config.json cannot be created"),
], ids=str)  # fmt: skip
def test_what_cannot_work_is_refused(folder, words, fragment):
    write_tokens(folder / "ids.bin", "text " * 40)
    (folder / "many.txt").write_text("".join(f"word{i}\n" for i in range(400)))
    before = files_below(folder)
    with pytest.raises(UserError) as refused:
        command(*words)
    assert fragment in str(refused.value)
    assert files_below(folder) == before and not (folder / "exported_models").exists()


def test_a_named_tokenizer_is_found_again(folder):
    (folder / "model" / "tokenizer.json").rename(folder / "mine.json")
    assert command("--format", "pytorch", "--vocab_file", "mine.json") == 0
    assert find_tokenizer("exported_models/pytorch").encode("a") == SimpleTokenizer().encode("a")


def test_a_folder_of_something_else_is_not_replaced(folder):
    (folder / "exported_models" / "pytorch").mkdir(parents=True)
    with pytest.raises(UserError, match="pytorch: is not an exported model"):
        command("--format", "pytorch", "--force")


@POSIX
def test_a_folder_is_replaced_from_inside_it_and_through_a_link(folder, monkeypatch):
    """What was to replace "." lay in it, and was deleted with it."""
    (folder / "site").mkdir()
    (folder / "link").symlink_to("site")
    monkeypatch.chdir(folder / "site")
    for path in (Path("."), folder / "link", folder / "site"):
        with new_folder(path) as made:
            (made / "new.txt").write_text(str(path))
        assert files_below(folder / "site") == {"new.txt": str(path).encode()}
    file = folder / "site" / "new.txt"  # is not replaced
    with pytest.raises(UserError, match="new.txt: cannot be written"), new_folder(file):
        pass
    assert files_below(folder / "site") == {file.name: str(path).encode()}
    assert (folder / "link").is_symlink()
    assert {p.name for p in folder.iterdir()} == {"link", "model", "site"}


def test_what_is_there_stays_without_force(folder):
    assert command("--format", "pytorch") == 0
    before = files_below(folder)
    done = run_main(export_model.main, "--checkpoint", "model", "--format", "pytorch")
    assert_refused(done, str(Path("exported_models", "pytorch")), "exists already", "--force")
    assert files_below(folder) == before
    assert command("--format", "pytorch", "--force") == 0
    assert files_below(folder).keys() == before.keys()


def test_a_full_disk_leaves_what_was_there(folder, monkeypatch):
    save_folder(folder / "model", wide(n_layer=1))
    assert command("--format", "torchscript") == 0
    before = files_below(folder)

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"torchscript: cannot be written \(.*No space left"):
        command("--format", "torchscript", "--force")
    assert files_below(folder) == before


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="onnxscript: is not installed; pip install onnxscript"):
        command("--format", "onnx")


def test_a_model_without_a_tokenizer_is_exported_but_cannot_write(folder):
    (folder / "model" / "tokenizer.json").unlink()
    assert command("--format", "pytorch", "--verify") == 0
    with pytest.raises(UserError, match="--vocab_file: no tokenizer was found"):
        command("--format", "pytorch", "--generate", "--force")
