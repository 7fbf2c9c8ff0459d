"""Quantization: what a layer computes on each path, what GPTQ gains, what a folder holds."""

import copy
import errno
import functools
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DOCUMENTS,
    FIRST_FORM,
    assert_refused,
    close,
    examples,
    files_below,
    flags,
    free_copy,
    run_main,
    run_script,
    some_ids,
    wide,
    write_tokens,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import peft
import quantize
from export_model import Graph
from peft import apply_lora_to_model, merge_adapter, save_adapter
from quantize import mean_loss, quantize_model, quantize_weight, read_blocks, report
from streaming import StreamingServer
from testv2 import TinyMambaModel, generate, load_model, save_folder
from tinymamba import four_bit, kernels
from tinymamba.checkpoint import save_checkpoint
from tinymamba.cli import UserError
from tinymamba.four_bit import codes_of_tiles, factors_of_tiles, tiled_product, to_tiles
from tinymamba.kernels import QuantizedLinear, pack, quantized_layers, to_bytes, unpack

SIZE = 8  # inputs of a group
SCHEMES = [(8, "dynamic"), (8, "weight_only"), (4, "dynamic"), (4, "weight_only")]


def quantized(bits=8, mode="dynamic", calibration=None, **changes) -> TinyMambaModel:
    return quantize_model(wide(**changes), bits, mode, SIZE, calibration)


def some_layer(mode: str, d_in=96, d_out=40, bits=8, bias=True, size=SIZE) -> QuantizedLinear:
    layer = QuantizedLinear(d_in, d_out, bias, bits, mode, size)
    layer.fill(*quantize_weight(torch.randn(d_out, d_in), bits, size))
    if bias:
        nn.init.normal_(layer.bias)
    return layer


def tiled_layer(mode: str, **changes) -> QuantizedLinear:
    layer = some_layer(mode, bits=4, size=32, **changes)
    layer.tile()
    return layer


def tiled_model(mode="weight_only", **changes) -> tuple[TinyMambaModel, TinyMambaModel]:
    """A model of tiled 4-bit layers, and the same one that is not tiled."""
    model = quantize_model(wide(**changes), 4, mode, 32)
    other = copy.deepcopy(model)
    for layer in quantized_layers(other).values():
        layer.untile()
    assert all(m.is_tiled == (m.bits == 4) for m in quantized_layers(model).values())
    return model, other


# ------------------------------------------------------------------------------------ numbers


@examples(60)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))
def test_packed_numbers_come_back(rows, groups, half, seed):
    random = torch.Generator().manual_seed(seed)
    factors = torch.randint(1, 16, (rows, groups), generator=random, dtype=torch.int8)
    numbers = torch.randint(-8, 8, (rows, groups, 2 * half), generator=random, dtype=torch.int8)
    codes = (numbers * factors[..., None]).flatten(1)
    packed = pack(codes, factors)
    assert packed.dtype == torch.uint8 and packed.nbytes * 2 == codes.nbytes
    assert torch.equal(unpack(packed, factors), codes)


@examples(40)
@given(st.sampled_from([4, 8]), st.booleans(), st.integers(0, 2**31))
def test_codes_are_in_range_and_near(bits, corrected, seed):
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 32, generator=random) * torch.rand(6, 1, generator=random)
    weight[0] = 0.0
    x = torch.randn(64, 32, generator=random)
    codes, scale, factors = quantize_weight(weight, bits, SIZE, x.T @ x if corrected else None)
    whole = codes.double() * scale[:, None].double()
    step = scale.double()[:, None].expand_as(whole)
    if bits == 4:
        assert factors.min() >= 1 and factors.max() <= 15
        assert torch.equal(unpack(pack(codes, factors), factors), codes)
        step = step * factors.double().repeat_interleave(SIZE, dim=1)
    assert codes.abs().max() <= 127 and not whole[0].any()
    if not corrected:  # no further than half a step, but for what the best factor cuts off
        cut = (weight.double() / step).clamp(-8 if bits == 4 else -127, 7 if bits == 4 else 127)
        assert ((whole / step - cut).abs() <= 0.5 + 1e-4).all()


def test_gptq_leaves_less_error_than_rounding_where_inputs_are_correlated():
    mixed = torch.randn(12, 64) @ torch.diag(torch.rand(64) + 0.1)
    x, weight = torch.randn(2000, 12) @ mixed + 0.1 * torch.randn(2000, 64), torch.randn(48, 64)
    for bits, gain in ((4, 0.5), (8, 0.5)):
        errors = []
        for hessian in (None, x.T @ x):
            codes, scale, _ = quantize_weight(weight, bits, SIZE, hessian)
            errors.append((x @ (codes * scale[:, None] - weight).T).square().mean().item())
        assert errors[1] < gain * errors[0], errors


def test_an_input_that_is_never_there_does_no_harm():
    x = torch.randn(200, 32)
    x[:, 5] = 0.0
    weight = torch.randn(8, 32)
    for hessian in (x.T @ x, torch.zeros(32, 32)):
        codes, scale, _ = quantize_weight(weight, 4, SIZE, hessian)
        close(codes * scale[:, None], weight, 0.25)


# ------------------------------------------------------------------------------------ layers


@pytest.mark.parametrize("bytewise", [True, False], ids=["bytes", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_every_path_gives_the_product_with_the_weight(mode, dtype, bytewise, monkeypatch):
    if bytewise and not kernels.MULTIPLIES_BYTES:
        pytest.skip("this CPU has no instructions for it")
    monkeypatch.setattr(kernels, "MULTIPLIES_BYTES", bytewise)
    monkeypatch.setattr(kernels, "CACHE", 1000)  # several parts
    for bias in (True, False):
        layer = some_layer(mode, bias=bias)
        for shape in ((1, 1, 96), (3, 5, 96), (50, 96), (96,), (0, 96), (2, 0, 96)):
            x = torch.randn(shape).to(dtype)
            got, whole = layer(x), layer.weight.double()
            given_bias = None if layer.bias is None else layer.bias.double()
            want = F.linear(x.double(), whole, given_bias)
            assert got.dtype == dtype and got.shape == want.shape
            step = to_bytes(x.float())[1].double()
            half = step / 2 if mode == "dynamic" else step / 508
            bound = half * whole.abs().sum(1) + 1e-5  # of what is rounded to whole steps
            if dtype == torch.bfloat16:
                bound = bound + 2**-7 * (x.double().abs() @ whole.abs().T + want.abs() + 1e-3)
            assert ((got.double() - want).abs() <= bound).all()


def test_a_row_does_not_depend_on_those_beside_it():
    layer, x = some_layer("dynamic"), torch.randn(4, 96) * torch.tensor([[1e-3], [1], [50], [0]])
    for i in range(4):
        assert torch.equal(layer(x)[i], layer(x[i : i + 1])[0])


def test_a_row_that_is_not_finite_stays_so():
    for mode in ("dynamic", "weight_only"):
        layer, x = some_layer(mode), torch.randn(3, 96)
        x[1, 7] = math.inf
        x[2, 7] = math.nan
        got = layer(x)
        assert got[0].isfinite().all() and not got[1:].isfinite().any()


def test_a_change_of_type_leaves_whole_numbers_and_scales():
    model = quantized(4)
    before = {
        n: t.clone()
        for n, t in model.state_dict().items()
        if n.endswith((".codes", ".scale", ".factors"))
    }
    model = model.to(torch.bfloat16).to("cpu")
    for name, t in before.items():
        got = model.state_dict()[name]
        assert torch.equal(got, t) and got.dtype == t.dtype
    assert model(some_ids(1, 9)).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------ tiles

with_kernel = pytest.mark.skipif(not four_bit.TILE_ROWS, reason="no fast kernel for this CPU")


def random_codes(rows: int, groups: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    factors = torch.randint(1, 16, (rows, groups), generator=random, dtype=torch.int8)
    numbers = torch.randint(-8, 8, (rows, groups, size), generator=random, dtype=torch.int8)
    return (numbers * factors[..., None]).flatten(1), factors


@with_kernel
@examples(40)
@given(
    st.integers(1, 200),
    st.integers(1, 3),
    st.sampled_from([32, 64, 128, 256]),
    st.integers(1, 2 + four_bit.FEW_ROWS),
    st.integers(0, 2**31),
)
def test_the_kernel_multiplies_by_the_very_codes(rows, groups, size, count, seed):
    codes, factors = random_codes(rows, groups, size, seed)
    tiles, tile_factors = to_tiles(codes, factors)
    assert torch.equal(codes_of_tiles(tiles, tile_factors, rows), codes)
    assert torch.equal(factors_of_tiles(tile_factors, rows), factors)
    assert tiles.nbytes == (rows + -rows % four_bit.TILE_ROWS) * groups * size // 2
    x = torch.randn(count, groups * size).bfloat16()
    got, want = tiled_product(x, tiles, tile_factors, rows), x.double() @ codes.double().T
    sums = x.double().abs() @ codes.double().abs().T  # in float32
    assert ((got.double() - want).abs() <= 2**-8 * want.abs() + 2**-21 * sums).all()


@with_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_a_tiled_layer_gives_the_product_with_its_weight(mode, dtype):
    for bias in (True, False):
        layer, other = tiled_layer(mode, bias=bias), some_layer(mode, bits=4, bias=bias, size=32)
        other.load_state_dict(layer.state_dict())
        other.untile()
        assert torch.equal(layer.weight, other.weight) and not hasattr(layer, "codes")
        for shape in ((1, 1, 96), (3, 5, 96), (70, 96), (96,), (0, 96), (2, 0, 96)):
            x = torch.randn(shape).to(dtype)
            got, want, whole = layer(x), other(x), layer.weight.double()
            assert got.dtype == dtype and got.shape == want.shape
            bound = 2**-8 * (x.double().abs() @ whole.abs().T + want.double().abs() + 1e-3)
            assert ((got - want).double().abs() <= bound).all()


@with_kernel
@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_a_row_of_a_tiled_layer_is_its_own(mode):
    layer, x = tiled_layer(mode), torch.randn(5, 96) * torch.tensor([[1e-3], [50], [0], [1], [1]])
    x[3, 7], x[4, 7] = math.inf, math.nan
    got = layer(x)
    assert got[:3].isfinite().all() and not got[3:].isfinite().any()
    for i in range(3):
        assert torch.equal(got[i], layer(x[i : i + 1])[0])


@with_kernel
def test_tiles_take_half_the_memory_and_nothing_else_shows_them(tmp_path):
    shape = {"d_model": 128, "ssm_head_dim": 32}
    model, other = tiled_model("dynamic", **shape)

    def held(model: TinyMambaModel) -> int:
        layers = [m for m in quantized_layers(model).values() if m.bits == 4]
        return sum(t.nbytes for m in layers for t in m.buffers())

    assert held(model) < 0.65 * held(other)
    assert model.fingerprint() == other.fingerprint()
    assert model.count_parameters() == wide(**shape).count_parameters()
    for name, form in (("one", model), ("two", other)):
        (tmp_path / name).mkdir()
        save_folder(tmp_path / name, form)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    ids, again = some_ids(2, 9), load_model(tmp_path / "two")
    forms = again, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to("cpu")
    for form in forms:
        assert all(m.is_tiled == (m.bits == 4) for m in quantized_layers(form).values())
        close(form(ids), model(ids), 0.02)
    other.load_state_dict(model.state_dict())
    assert other.blocks[0].mlp.in_proj.is_tiled and other.fingerprint() == model.fingerprint()


@with_kernel
@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_a_tiled_model_is_near_the_one_of_whole_bytes(mode):
    model, other = (form.to(torch.bfloat16) for form in tiled_model(mode))
    ids = some_ids(2, 40)
    close(model(ids), other(ids), 0.1 * other(ids).std().item())
    model, _ = tiled_model(mode)
    state, parts = model.init_state(2), []
    for chunk in ids.split([1, 7, 32], dim=1):
        logits, state = model.advance(chunk, state)
        parts.append(logits)
    close(torch.cat(parts, dim=1), model(ids), 0.1 if mode == "dynamic" else 0.02)


@with_kernel
@pytest.mark.parametrize("count", [3, 70])
def test_the_gradient_through_tiles_is_that_of_the_whole_weight(count):
    layer, x = tiled_layer("weight_only"), torch.randn(count, 96, requires_grad=True)
    layer(x).sum().backward()
    close(x.grad, layer.weight.sum(0).expand(count, 96), 1e-5)
    adapted = apply_lora_to_model(tiled_model()[0], rank=4)
    ids = some_ids(2, 33)
    adapted.loss(ids[:, :-1], ids[:, 1:]).backward()
    grads = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert grads and all(grad.isfinite().all() for grad in grads)


@with_kernel
@torch.no_grad()
@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_an_exported_tiled_layer_fits_every_length(mode):
    layer = tiled_layer(mode)
    exported = export(layer, torch.randn(2, 37, 96))
    for length in (1, 40):
        x = torch.randn(2, length, 96)
        want = F.linear(x, layer.weight, layer.bias)
        close(exported(x), want, 0.5 if mode == "dynamic" else 1e-4)


@pytest.mark.parametrize("reason", ["no fast kernel for this CPU", r"groups of \(.*\), not of 8"])
def test_where_the_kernel_does_not_fit_bytes_are_held_and_that_is_said(reason, monkeypatch):
    size = SIZE if "of 8" in reason else 32
    monkeypatch.setattr(four_bit, "TILE_ROWS", four_bit.TILE_ROWS if size == SIZE else 0)
    with pytest.warns(UserWarning, match=f"take a whole byte in memory: .*{reason}"):
        model = quantize_model(wide(), 4, "weight_only", size)
    assert model.blocks[0].mlp.in_proj.codes.dtype == torch.int8
    assert model(some_ids(1, 9)).isfinite().all()


@pytest.mark.slow
@pytest.mark.skipif(four_bit.TILE_ROWS != 64, reason="this CPU has other tiles anyway")
def test_tiles_of_older_processors_hold_the_same(tmp_path):
    """The tiles depend on the instructions that PyTorch uses, which a variable restricts."""
    tests = [f"{__file__}::{name}" for name in TESTS_OF_TILES]
    words = [sys.executable, "-m", "pytest", "-q", "-n", "0", *tests]
    settings = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(words, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and " skipped" not in done.stdout, done.stdout


TESTS_OF_TILES = (
    "test_the_kernel_multiplies_by_the_very_codes",
    "test_a_tiled_layer_gives_the_product_with_its_weight",
)


# ------------------------------------------------------------------------------------ models


@pytest.mark.parametrize(("bits", "mode"), SCHEMES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "bias": False, **FIRST_FORM},
        {"low_rank": 8, "gate": "top_k", **DOCUMENTS},
    ],
    ids=str,
)
@torch.no_grad()
def test_a_quantized_model_is_near_the_model_of_its_whole_weights(bits, mode, changes):
    model = quantized(bits, mode, **changes)
    plain = copy.deepcopy(wide(**changes))
    for name in model.quantization["layers"]:
        plain.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
    assert torch.equal(plain.embedding.weight, model.embedding.weight)
    ids = some_ids(2, 40)
    close(model(ids), plain(ids), {"dynamic": 0.2, "weight_only": 1e-3}[mode])
    gates = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    kept = ("controller", "angle_proj", "token_proj")
    assert len(gates) == 4 + plain.config.memory and all(n.endswith(kept) for n in gates)


def test_the_given_model_stays_as_it_was_and_another_fingerprint_is_made():
    model = wide()
    before = model.fingerprint()
    prints = {quantized(bits, mode).fingerprint() for bits, mode in SCHEMES}
    assert model.fingerprint() == before and before not in prints and len(prints) == 4
    assert model.count_parameters() == quantized(tie_embeddings=True).count_parameters() | {
        "total": model.count_parameters()["total"]
    }


def test_gptq_is_nearer_to_the_model_than_rounding():
    ids, model = some_ids(48, 32, vocab=5, seed=3), wide()  # of few tokens: inputs of low rank
    calibration = some_ids(96, 32, vocab=5, seed=4)
    errors = []
    for given_ids in (None, calibration):
        got = quantize_model(model, 4, "weight_only", SIZE, given_ids)
        errors.append((got(ids) - model(ids)).square().mean().item())
    assert errors[1] < 0.9 * errors[0], errors


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("bits", "mode"), SCHEMES)
def test_a_folder_gives_back_the_very_model(tmp_path, bits, mode, tied):
    model = quantized(bits, mode, tie_embeddings=tied)
    save_folder(tmp_path, model)
    again = load_model(tmp_path)
    assert again.fingerprint() == model.fingerprint() and again.quantization == model.quantization
    ids = some_ids(2, 40)
    assert torch.equal(again(ids), model(ids))
    tensors = load_file(tmp_path / "model.safetensors")
    assert ("embedding.weight" in tensors) == (not tied)
    codes = tensors["blocks.0.mlp.in_proj.codes"]
    assert codes.nbytes == 128 * 32 * bits // 8
    again.load_state_dict(model.state_dict())


def test_a_damaged_or_foreign_folder_is_refused(tmp_path):
    save_folder(tmp_path, quantized(4))
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good, about = weights.read_bytes(), json.loads(config.read_text())
    for at in range(len(good) // 4, len(good), len(good) // 7):
        weights.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        with pytest.raises(UserError, match=r"model.safetensors: is damaged"):
            load_model(tmp_path)
    weights.write_bytes(good)
    scheme = about["quantization"]
    for other in (
        {},
        [],
        4,
        {**scheme, "version": 99},
        {**scheme, "mode": "magic"},
        {**scheme, "group_size": 0},
        {**scheme, "group_size": "x"},
        {**scheme, "layers": {"blocks.9.x": 4}},
        {**scheme, "layers": {"norm": 8}},
        {**scheme, "layers": {"head": 3}},
        {**scheme, "layers": []},
    ):
        config.write_text(json.dumps({**about, "quantization": other}))
        with pytest.raises(UserError, match=r"config.json: cannot be read"):
            load_model(tmp_path)
    config.write_text(json.dumps({**about, "quantization": {**scheme, "group_size": 4}}))
    with pytest.raises(UserError, match="does not fit"):
        load_model(tmp_path)
    del about["quantization"]
    config.write_text(json.dumps(about))
    with pytest.raises(UserError, match="does not fit"):
        load_model(tmp_path)


@torch.no_grad()
def test_a_stream_from_a_folder_is_the_greedy_text_of_the_model(tmp_path):
    model = quantized(4, "weight_only")
    save_folder(tmp_path, model)
    prompt = some_ids(1, 12)
    server = StreamingServer(str(tmp_path), "cpu")
    answer = server.answer(
        prompt[0].tolist(), as_ids=True, max_new_tokens=20, temperature=0.0, eos_token_id=-1
    )
    got = [token.id for chunk in answer for token in chunk.tokens]
    want = generate(load_model(tmp_path), prompt, 20, 0.0)[0, 12:].tolist()
    assert got == want


@torch.no_grad()
def test_chunks_of_a_text_give_the_logits_of_the_whole():
    for mode in ("dynamic", "weight_only"):
        model, ids = quantized(8, mode), some_ids(2, 40)
        state, parts = model.init_state(2), []
        for chunk in ids.split([1, 7, 32], dim=1):
            logits, state = model.advance(chunk, state)
            parts.append(logits)
        close(torch.cat(parts, dim=1), model(ids), {"dynamic": 0.1, "weight_only": 1e-3}[mode])


# ------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize(
    ("mode", "of_each", "of_all"), [("weight_only", 1e-3, 1e-3), ("dynamic", 0.5, 0.2)]
)
def test_lora_on_a_quantized_model_learns_as_on_its_whole_weights(mode, of_each, of_all):
    model = quantized(8, mode)
    plain = copy.deepcopy(wide())
    for name in model.quantization["layers"]:
        plain.get_submodule(name).weight.data = model.get_submodule(name).weight
    ids, grads = some_ids(2, 33), []
    for base in (copy.deepcopy(model), plain):
        torch.manual_seed(5)
        adapted = apply_lora_to_model(base, rank=4)
        for i, p in enumerate(p for p in adapted.parameters() if p.requires_grad):
            nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(i))
        adapted.loss(ids[:, :-1], ids[:, 1:]).backward()
        grads.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 2 * 2 * 6
    for name, grad in grads[0].items():
        close(grad, grads[1][name], of_each)
    got, want = (torch.cat([g.flatten() for g in found.values()]) for found in grads)
    assert (got - want).norm() <= of_all * want.norm()


def test_the_gradient_of_an_input_is_that_of_the_whole_weight():
    layer, x = some_layer("weight_only"), torch.randn(3, 5, 96, requires_grad=True)
    layer(x).square().sum().backward()
    other = x.detach().clone().requires_grad_(True)
    F.linear(other, layer.weight, layer.bias).square().sum().backward()
    close(x.grad, other.grad, 1e-3)


def test_an_adapter_knows_its_quantized_base_and_is_not_merged(tmp_path):
    model = quantized()
    base = model.fingerprint()
    adapted = apply_lora_to_model(model)
    layer = adapted.blocks[0].mlp.in_proj
    close(layer.weight, layer.base_layer.weight, 1e-6)
    save_adapter(adapted, tmp_path)
    assert base.encode() in (tmp_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match="is quantized: no adapter can be merged"):
        merge_adapter(adapted)


# ------------------------------------------------------------------------------------ graphs


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_a_traced_graph_fits_every_length(mode):
    model = quantized(8, mode, n_layer=1)
    example = (some_ids(2, 37), *model.init_state(2).tensors().values())
    traced = torch.jit.trace(Graph(model), example, check_trace=False)
    same_path(traced, model, example)


def export(module: nn.Module, *inputs: torch.Tensor):
    """A module as torch.export writes it, for any batch size and any length of the first input."""
    batch, length = (torch.export.Dim(name, min=1) for name in ("batch", "length"))
    first, others = {0: batch, 1: length}, tuple({0: batch} for _ in inputs[1:])
    program = torch.export.export(
        module.eval(),
        inputs,
        dynamic_shapes=(first, others) if others else (first,),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    return program.module()


@torch.no_grad()
@pytest.mark.parametrize(("bits", "mode"), SCHEMES)
def test_an_exported_layer_fits_every_length(bits, mode):
    layer = some_layer(mode, bits=bits)
    exported = export(layer, torch.randn(2, 37, 96))
    for length in (1, 5, 64):
        x = torch.randn(2, length, 96)
        close(exported(x), layer(x), 0.05 if mode == "dynamic" else 1e-3)


@torch.no_grad()
def test_an_exported_graph_fits_every_length():
    model = quantized(4, "weight_only", n_layer=1)
    example = (some_ids(2, 37), *model.init_state(2).tensors().values())
    same_path(export(Graph(model), *example), model, example)


def same_path(graph, model, example):
    """The graph multiplies whole weights; activations that are rounded may fall to either side."""
    for length in (1, 5, 64):
        ids = some_ids(2, length, seed=length)
        want = Graph(model)(ids, *example[1:])[0]
        dynamic = model.quantization["mode"] == "dynamic"
        close(graph(ids, *example[1:])[0], want, 0.1 if dynamic else 1e-3)


# ------------------------------------------------------------------------------------ commands


@pytest.fixture
def base(place):
    """A checkpoint beside data, in the working folder."""
    save("base.pt", wide())
    (place / "data" / "text" / "vocab.txt").write_text("a\nb\n")
    return place


def save(path: str, model: TinyMambaModel) -> None:
    save_checkpoint(path, {"model": model.state_dict(), "config": model.config.to_dict()})


TRAIN = ("--calibration_data", "data/text/train.bin", "--calibration_tokens", 640)
INT4 = ("--checkpoint", "base.pt", "--bits", 4, "--group_size", SIZE, "--output_dir", "out")
run = functools.partial(run_main, quantize.main)
finetune = functools.partial(run_main, peft.main)


def test_the_command_writes_a_folder_that_serves_and_learns(base):
    done = run_script("quantize.py", *INT4, *TRAIN, cwd=base)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{Path('out', 'model.safetensors')}: ")
    model = load_model("out")
    assert model.quantization["method"] == "gptq" and model.quantization["mode"] == "weight_only"
    assert files_below(base / "out").keys() == {"model.safetensors", "config.json", "vocab.txt"}
    brief = flags(steps=2, validation_steps=1, batch_size=2, block_size=16, device="cpu")
    words = [*brief, *flags(method="lora", output_dir="lora", generate_samples="false")]
    learned = finetune("--checkpoint", "out", *words)
    assert learned.returncode == 0, learned.stderr
    server = StreamingServer("out", "cpu", adapters={"a": "lora"})
    assert server.tokenizer is not None
    assert server.generate_text("a", max_new_tokens=30, seed=0, adapter="a")
    calibration = read_blocks("data/text/train.bin", wide(), 640)
    again = quantize_model(load_model("base.pt"), 4, "weight_only", SIZE, calibration)
    assert again.fingerprint() == model.fingerprint()  # the same data give the same numbers


def test_what_cannot_be_done_is_refused_in_one_line(base):
    def refused(*words, naming: list[str]):
        before = files_below(base)
        assert_refused(run(*words), *naming)
        assert files_below(base) == before and not (base / "new").exists()

    bad = free_copy(wide())
    bad.blocks[1].mlp.in_proj.weight.data[3, 3] = math.inf
    save("bad.pt", bad)
    save_folder(base / "int8", quantized())
    write_tokens(base / "far.bin", [5] * 700 + [257])
    eight = ("--checkpoint", "base.pt", "--output_dir", "new")
    four = (*eight, "--bits", 4, "--group_size", SIZE)
    refused("--checkpoint", "int8", "--output_dir", "new", naming=["is quantized already"])
    refused(
        "--checkpoint",
        "bad.pt",
        "--output_dir",
        "new",
        naming=["blocks.1.mlp.in_proj.weight has values that are not finite"],
    )
    refused(
        *eight,
        "--bits",
        4,
        "--rtn",
        naming=[
            "group_size: 64 does not divide the 32 inputs",
            "blocks.0.ssm.in_proj",
            "[2, 4, 8, 16, 32]",
        ],
    )
    refused(*eight, "--group_size", 32, naming=["--group_size: 8 bits have no groups"])
    refused(*four, "--group_size", 3, "--rtn", naming=["group_size: 3 is invalid"])
    refused(*four, naming=["calibration_data: is missing", "--rtn"])
    refused(*four, "--rtn", *TRAIN, naming=["--rtn: needs no calibration data"])
    refused(*four, "--report", naming=["calibration_data: is missing"])
    refused(*four, "--calibration_data", "none.bin", naming=["none.bin: no such file"])
    refused(
        *four,
        "--calibration_data",
        "data/text/train.bin",
        naming=["data/text/train.bin: has ", "tokens, not 65536"],
    )
    refused(*four, *TRAIN[:3], 31, naming=["calibration_tokens: 31 is less than one block"])
    refused(
        *four,
        "--calibration_data",
        "far.bin",
        "--calibration_tokens",
        640,
        naming=["far.bin: id 257 at offset 700 is outside vocab_size=257"],
    )
    refused(*eight, "--output_dir", "int8", naming=["int8: holds model.safetensors", "--force"])
    refused(*eight, "--output_dir", "base.pt/x", naming=["output_dir"])
    refused(*eight, "--bits", 3, naming=["--bits"])
    refused(*eight, "--mode", "static", naming=["--mode"])
    refused("--checkpoint", "none.pt", naming=["none.pt: no such checkpoint"])


def test_a_quantized_base_takes_adapters_only(base):
    save_folder(base / "int8", quantized())
    for words in (("--method", "full"), ("--method", "lora", "--merge")):
        before = files_below(base)
        done = finetune("--checkpoint", "int8", "--output_dir", "new", *words)
        assert_refused(done, "checkpoint: is quantized")
        assert files_below(base) == before


def test_force_replaces_and_the_report_names_every_part(base):
    for words in ((), ("--force", "--mode", "weight_only")):
        done = run("--checkpoint", "base.pt", "--output_dir", "out", *words)
        assert done.returncode == 0, done.stderr
    assert load_model("out").quantization["mode"] == "weight_only"
    assert {path.name for path in (base / "out").iterdir()} == {
        "model.safetensors",
        "config.json",
        "vocab.txt",
    }
    (base / "data" / "text" / "vocab.txt").unlink()  # no tokenizer of another model may stay
    done = run("--checkpoint", "base.pt", "--output_dir", "out", "--force")
    assert done.returncode == 0 and not (base / "out" / "vocab.txt").exists()
    before = files_below(base)
    done = run(*INT4, *TRAIN, "--report")
    assert done.returncode == 0 and files_below(base) == before
    for part in (
        "gate.controller",
        "ssm.angle_proj",
        "blocks.1.attention.qkv",
        "head ",
        "embedding.weight",
        "ssm.A_log",
        "conv.weight",
        "ssm state",
    ):
        assert f"\n{part}" in done.stdout


def test_a_full_disk_leaves_the_folder_that_was_there(base, monkeypatch):
    assert run("--checkpoint", "base.pt", "--output_dir", "out").returncode == 0
    before = files_below(base)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("testv2.write_tokenizer", full)  # which comes last
    assert_refused(run(*INT4[:2], "--output_dir", "out", "--force"), "No space left")
    assert files_below(base) == before


def test_the_report_is_the_loss_of_the_quantized_part(base):
    model, ids = wide(n_layer=1), some_ids(20, 32)
    rows = {row["part"]: row for row in report(model, 4, "weight_only", SIZE, ids)}
    alone = quantize_model(model, 4, "weight_only", SIZE, layers={"blocks.0.mlp.in_proj": 4})
    row = rows["blocks.0.mlp.in_proj"]
    assert row["loss"] == mean_loss(alone, ids) != rows["nothing"]["loss"]
    assert math.isclose(row["change"], math.exp(row["loss"] - rows["nothing"]["loss"]) - 1)
