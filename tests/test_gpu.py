"""A GPU gives what the CPU gives. Run by `make test-gpu`; without a GPU, CPU against CPU."""

import functools
import json
import math

import pytest
import torch
from helpers import (
    EOS,
    GATES,
    ROOT,
    TINY,
    assert_compiled,
    brief_config,
    close,
    close_angles,
    flags,
    free_copy,
    run_script,
    some_ids,
    tiny_config,
    wide,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from testv2 import TinyMambaModel, Trainer, make_optimizer, selective_scan
from tinymamba.checkpoint import copy_to_host, load_checkpoint
from tinymamba.muon import orthogonalize
from tinymamba.runtime import pick_device

pytestmark = pytest.mark.gpu
DEVICE = pick_device("auto")  # with the trainer's setting for products in float32
LENGTH = 300  # tokens: many windows and chunks
CUDA = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA")


def on_both(model, work) -> list:
    """What `work(model, device)` gives on the CPU and on the GPU, there brought back to the CPU."""
    return [work(free_copy(model).to(device), device) for device in (torch.device("cpu"), DEVICE)]


def loss_and_gradients(model, device, rows: int = 3, length: int = LENGTH):
    """Of a training step on random ids, brought back to the CPU."""
    ids = some_ids(rows, length).to(device)
    loss = model(ids, ids.roll(-1, 1))
    loss.backward()
    return loss.detach().cpu(), {n: p.grad.cpu() for n, p in model.named_parameters()}


def close_steps(got, want, of_loss: float, of_gradients: float) -> None:
    close(got[0], want[0], of_loss)
    for name, gradient in want[1].items():
        close(got[1][name], gradient, of_gradients)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_loss_and_gradients(gate, fused):
    here, there = on_both(wide(gate=gate, use_flash_attn=fused), loss_and_gradients)
    close_steps(there, here, 1e-5, 1e-3)


def test_loss_and_gradients_of_a_text_of_several_groups_of_chunks():
    work = functools.partial(loss_and_gradients, rows=1, length=5000)
    here, there = on_both(wide(document_mask=True, eos_id=EOS), work)
    close_steps(there, here, 1e-5, 1e-3)


def compiled_or_not(compiled: bool, dtype: torch.dtype, **changes) -> tuple:
    torch.compiler.reset()
    model = free_copy(wide(**changes)).to(DEVICE)
    if compiled:
        model.compile_blocks()
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        return loss_and_gradients(model, DEVICE)


@pytest.mark.parametrize("gate", GATES)
def test_compiled_blocks_are_eager_ones(gate):
    eager, compiled = (compiled_or_not(way, torch.float32, gate=gate) for way in (False, True))
    close_steps(compiled, eager, 1e-5, 1e-3)


def test_compiled_blocks_are_as_near_to_float32_in_bfloat16_as_eager_ones():
    exact, eager, compiled = (
        compiled_or_not(way, dtype)
        for way, dtype in ((0, torch.float32), (0, torch.bfloat16), (1, torch.bfloat16))
    )
    close(compiled[0], exact[0], 1e-3)
    for name, want in exact[1].items():
        off = [((found[1][name] - want).norm() / want.norm()).item() for found in (eager, compiled)]
        assert off[1] <= 2 * off[0] + 0.02, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", [False, True], ids=["one_text", "documents"])
def test_attention_needs_no_kernel_that_stores_all_scores(documents, dtype):
    """Without PyTorch's plain products, a call that no fused kernel takes is an error."""
    model = free_copy(wide(document_mask=documents, eos_id=EOS)).to(DEVICE)
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(fused), torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        loss_and_gradients(model, DEVICE)
        state = model.init_state(2)
        with torch.no_grad():
            for piece in some_ids(2, 100).to(DEVICE).split([99, 1], dim=1):
                _, state = model.advance(piece, state)


@CUDA
@pytest.mark.parametrize("compiled", [False, True])
def test_the_host_waits_once_in_a_step_compiled_or_not(data, monkeypatch, compiled):
    monkeypatch.chdir(data)
    trainer = Trainer(brief_config(device="cuda", max_steps=4, use_compile=compiled))
    batches = trainer.train_batches(25)
    exchange = trainer.exchange

    def exchange_waiting(*values):
        torch.cuda.set_sync_debug_mode("default")
        found = exchange(*values)
        torch.cuda.set_sync_debug_mode("error")
        return found

    trainer.train_step(batches)  # compiles, and makes the optimizer's state
    monkeypatch.setattr(trainer, "exchange", exchange_waiting)
    monkeypatch.setattr(trainer, "read", lambda batches: None)  # from ordinary memory, it waits
    try:
        torch.cuda.set_sync_debug_mode("error")
        trainer.train_step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_copy_of_a_checkpoint_is_in_host_memory():
    state = copy_to_host({"model": wide().to(DEVICE).state_dict()})
    assert {t.device.type for t in state["model"].values()} == {"cpu"}


@pytest.mark.parametrize("split", [(300,), (1, 7, 64, 65, 163)])
def test_logits_and_states_of_any_split(split):
    def work(model, device):
        state, logits = model.init_state(3), []
        with torch.no_grad():
            for piece in some_ids(3, LENGTH).to(device).split(split, dim=1):
                out, state = model.advance(piece, state)
                logits.append(out.cpu())
        return torch.cat(logits, dim=1), state.to("cpu")

    (logits, state), (logits_there, there) = on_both(wide(), work)
    close(logits_there, logits, 1e-4)
    got, want = there.tensors(), state.tensors()
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        compare = close_angles if name.endswith("phase") else close
        compare(tensor, want[name], 1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_chunked_scan_is_the_recurrence(dtype, tolerance):
    B, L, H, P, N = 2, 1000, 3, 16, 8
    made = torch.Generator().manual_seed(0)
    x, b, c = (torch.randn(*s, generator=made) for s in ((B, L, H, P), (B, L, N), (B, L, N)))
    dt = torch.rand(B, L, H, generator=made) * 0.2
    A = -torch.rand(H, generator=made)
    x, b, c = (t.to(DEVICE, dtype) for t in (x, b, c))
    rest = [t.to(DEVICE) for t in (dt, A)]
    runs = [
        selective_scan(x, *rest, b, c, torch.ones(H, device=DEVICE), method=method)
        for method in ("chunked", "sequential")
    ]
    for got, want in zip(*runs, strict=True):
        close(got.float(), want.float(), tolerance)


def test_autocast_is_finite_and_near_float32():
    def work(model, device, enabled=True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            return model(some_ids(2, LENGTH).to(device), some_ids(2, LENGTH, seed=1).to(device))

    model = wide().to(DEVICE)
    close(work(model, DEVICE), work(model, DEVICE, enabled=False), 2e-2)


def test_updates():
    def work(model, device):
        config = tiny_config(lr=1e-2)
        optimizer = make_optimizer(model, config)
        for step in range(3):
            ids = some_ids(2, 40, seed=step).to(device)
            model(ids, ids.roll(-1, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: p.detach().cpu() for name, p in model.named_parameters()}

    torch.manual_seed(0)
    weights, there = on_both(TinyMambaModel(tiny_config()), work)
    for name, weight in weights.items():
        close(there[name], weight, 5e-2)  # Newton-Schulz is in bfloat16


def test_orthogonal_matrices():
    x = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    values = torch.linalg.svdvals(orthogonalize(x).float())
    assert values.min() > 0.5 and values.max() < 1.5


@pytest.mark.parametrize("compiled", [False, True])
def test_training_resumes_on_the_gpu_and_loads_on_the_cpu(data, compiled):
    words = flags(
        **{
            **TINY,
            "device": DEVICE,
            "use_compile": compiled,
            "max_steps": 4,
            "checkpoint_interval": 2,
            "generation_length": 8,
            "log_interval": 1,
        }
    )
    done = run_script("testv2.py", *words, cwd=data, timeout=600)
    assert done.returncode == 0, done.stderr
    if compiled:
        assert_compiled(done.stdout)
    done = run_script("testv2.py", "--resume", "--max_steps", 6, cwd=data, timeout=600)
    assert done.returncode == 0, done.stderr
    saved = load_checkpoint(data / "tinymamba_model_latest.pt")
    assert saved["global_step"] == 6 and math.isfinite(saved["val_loss"])
    assert all(t.device.type == "cpu" for t in saved["model"].values())


def test_speed_is_measured(tmp_path):
    words = flags(
        benchmark_type="all",
        d_model=64,
        n_layer=1,
        vocab_size=256,
        device=DEVICE,
        sequence_lengths=[128],
        batch_sizes=[2],
        test_iterations=1,
        warmup_iterations=1,
        models_to_compare=["llama", "mamba2"],
        output_dir=tmp_path / "out",
    )
    done = run_script("benchmark.py", *words, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert {row["status"] for row in rows} == {"ok"}
