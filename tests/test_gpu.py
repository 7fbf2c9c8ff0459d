"""A GPU gives what the CPU gives. Run by `make test-gpu`; without a GPU, CPU against CPU."""

import json
import math

import pytest
import torch
from helpers import (
    GATES,
    ROOT,
    TINY,
    close,
    close_angles,
    flags,
    free_copy,
    run_script,
    some_ids,
    tiny_config,
    wide,
)

from testv2 import TinyMambaModel, make_optimizer, orthogonalize, selective_scan
from tinymamba.checkpoint import load_checkpoint

pytestmark = pytest.mark.gpu
DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")
LENGTH = 300  # tokens: many windows, chunks, and more than one tile


def on_both(model, work) -> list:
    """What `work(model, device)` gives on the CPU and on the GPU, there brought back to the CPU."""
    return [work(free_copy(model).to(device), device) for device in (torch.device("cpu"), DEVICE)]


@pytest.fixture(autouse=True)
def exact_products():
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_loss_and_gradients(gate, fused):
    def work(model, device):
        ids = some_ids(3, LENGTH).to(device)
        loss = model(ids, ids.roll(-1, 1))
        loss.backward()
        return loss.detach().cpu(), {n: p.grad.cpu() for n, p in model.named_parameters()}

    (loss, gradients), (loss_there, there) = on_both(wide(gate=gate, use_flash_attn=fused), work)
    close(loss_there, loss, 1e-5)
    for name, gradient in gradients.items():
        close(there[name], gradient, 1e-3)


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
    for mine, other in zip(there.layers, state.layers, strict=True):
        for name, tensor in mine._asdict().items():
            compare = close_angles if name == "phase" else close
            compare(tensor, getattr(other, name), 1e-4)


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
