"""Models sharded over several processes: their first values, init_from, copies of the shards."""

import contextlib
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import (
    LATEST,
    LINUX,
    POSIX,
    ROOT,
    assert_refused,
    assert_refuses,
    brief_config,
    brief_flags,
    call,
    free_port,
    start_fork,
    tiny_config,
    write_tokens,
)
from sharded_ranks import SHAPE, check_and_train

from benchmarks import sharding
from testv2 import Config, TinyMambaModel, load_model, save_folder
from tinymamba.checkpoint import digest, load_checkpoint, save_model
from tinymamba.cli import UserError
from tinymamba.distributed import arrange_processes, fill_parameter

STEPS = {"enable_validation": "true", "validation_interval": 3, "validation_steps": 3,
         "gradient_accumulation_steps": 2, "generation_length": 4, "max_steps": 3}  # fmt: skip


def run_ranks(count: int, folder: Path, *runs: list) -> list:
    """sharded_ranks.py in that many processes, in `folder`; what each has printed last."""
    env = {"PYTHONPATH": str(ROOT), "WORLD_SIZE": str(count)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [str(free_port()), *(word for run in runs for word in (*run, "--"))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": folder}
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(count):
            started = start_fork(check_and_train, *words, env={**env, "RANK": str(rank)}, **pipes)
            ranks.append(stack.enter_context(started))
        for process in ranks:
            stack.callback(process.kill)
        done = [process.communicate(timeout=300) for process in ranks]
    assert [process.returncode for process in ranks] == [0] * count, done
    return [json.loads(out.splitlines()[-1]) for out, _ in done]


def losses(path: Path = LATEST) -> list[float]:
    return [loss for _, loss in load_checkpoint(path)["progress"]["history"]["train"]]


def assert_as_one_process(checks: dict, count: int) -> None:
    """The same bits at the start, nothing left without values, and the same gradients."""
    total = sum(p.numel() for p in TinyMambaModel(Config(**SHAPE)).parameters())
    for name, found in checks.items():
        assert found["same"] and found["rest"] == [], name
        assert found["tied"] == name.endswith("True")
        assert found["gap"] < 1e-6
        shards = count if name.startswith("fsdp") else count // 2
        assert found["held"] < (0.9 if shards > 1 else 2) * total


# ------------------------------------------------------------------------------ two processes


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found, and the folder in which they trained."""
    if os.name != "posix":
        pytest.skip("two processes need gloo")
    folder = tmp_path_factory.mktemp("two")
    write_tokens(folder / "train.bin", [7 * i % 257 for i in range(4000)])
    torch.manual_seed(1)
    save_model(folder / "base.pt", TinyMambaModel(tiny_config(n_layer=1)))
    paths = {"train_data_path": "train.bin", "max_steps": 1, "lr": 0, "rank_timeout": 60}
    flags = [*brief_flags(**paths, n_layer=1, batch_size=2), "--init_from", "base.pt"]
    runs = [
        [*flags, "--parallel", "hsdp", "--shard_group", 1, "--checkpoint_path", "hsdp.pt"],
        [*flags, "--parallel", "fsdp", "--checkpoint_path", "fsdp.pt"],
    ]
    return run_ranks(2, folder, *runs), folder


@POSIX
def test_sharded_models_begin_with_the_bits_of_one_process(two):
    for checks, codes in two[0]:
        assert codes == [0, 0]
        assert_as_one_process(checks, 2)


@POSIX
def test_sharded_runs_begin_with_the_weights_of_init_from(two):
    want = digest(load_checkpoint(two[1] / "base.pt")["model"])
    for name in ("hsdp.pt", "fsdp.pt"):
        assert digest(load_checkpoint(two[1] / name)["model"]) == want


@POSIX
@pytest.mark.parametrize("way", ["fsdp", "hsdp"])
def test_the_traffic_is_what_the_table_computes(two, way):
    """All-gather and reduce-scatter take the size of what they gather, less this process's part."""
    checks, _ = two[0][0]
    config = Config(**SHAPE)
    shards, copies = (2, 1) if way == "fsdp" else (1, 2)
    sizes = checks[f"{way} True"]["sizes"]
    once = (shards - 1) / shards
    sent = once * (sizes["_allgather_base_"] + sizes["_reduce_scatter_base_"])
    sent += 2 * (copies - 1) / copies * sizes["allreduce_"]
    computed = sharding.cost_of(sharding.count(config), shards, copies)
    assert sent == pytest.approx(computed.traffic, rel=0.02), sizes


@pytest.mark.slow
@POSIX
def test_four_processes_with_two_copies_train_as_one(place):
    """With accumulation, clipping, validation, samples and checkpoints; then one goes on."""
    call(*brief_flags(**STEPS, grad_clip=0.5, generate_samples="true"))
    call("--resume", "--max_steps", 6)
    expected, whole = losses(), load_checkpoint(LATEST)
    words = brief_flags(**{**STEPS, "batch_size": 1, "grad_clip": 0.5, "generate_samples": "true"})
    words += ["--shard_group", "2", "--rank_timeout", "60"]
    paths = [["--checkpoint_path", f"{way}.pt", "--parallel", way] for way in ("hsdp", "fsdp")]
    for checks, codes in run_ranks(4, place, *([*words, *path] for path in paths)):
        assert codes == [0, 0]
        assert_as_one_process(checks, 4)
    for way in ("hsdp", "fsdp"):
        call("--resume", "--checkpoint_path", f"{way}.pt", "--max_steps", 6, "--batch_size", 4)
        assert len(expected) == 6
        assert losses(f"{way}.pt") == pytest.approx(expected, abs=1e-5)
        got = load_checkpoint(f"{way}.pt")
        assert got["val_loss"] == pytest.approx(whole["val_loss"], abs=1e-5)


# ---------------------------------------------------------------------------- without processes


def test_processes_are_arranged_as_asked(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")

    def arranged(parallel, world, group=0):
        return arrange_processes(Config(parallel=parallel, shard_group=group), world)

    assert arranged("hsdp", 1) == arranged("ddp", 8) == {}
    assert arranged("fsdp", 8, 2) == {"shard": 8}
    assert arranged("hsdp", 8) == {"replicate": 2, "shard": 4}
    assert arranged("hsdp", 8, 2) == {"replicate": 4, "shard": 2}
    assert arranged("hsdp", 8, 8) == {"shard": 8} and arranged("hsdp", 4) == {"shard": 4}
    with pytest.raises(UserError, match="3 processes do not divide the 8") as caught:
        arranged("hsdp", 8, 3)
    assert caught.value.args[0] == "shard_group"
    assert_refuses("--shard_group", "-1", naming=["shard_group", "-1"])


def test_a_group_that_does_not_divide_is_refused_before_the_processes_meet(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    done = call(*brief_flags(parallel="hsdp", shard_group=3))
    assert_refused(done, "shard_group", "3 processes", "[1, 2, 4]")


def file_behind(t: torch.Tensor) -> str:
    """The file that the memory of a tensor is mapped from; empty if it is not."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= t.data_ptr() < last:
            return " ".join(line.split()[5:])
    raise AssertionError("no such memory")


@LINUX
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_weights_of_init_from_stay_in_its_file(tmp_path, kind):
    path, model = tmp_path / "m.pt", TinyMambaModel(tiny_config())
    if kind == "file":
        save_model(path, model)
    else:
        path = tmp_path
        save_folder(path, model)
    mapped = load_model(path, mapped=True)
    assert digest(mapped.state_dict()) == digest(load_model(path).state_dict())
    assert all(file_behind(p).startswith(str(path)) for p in mapped.parameters())
    assert not any(file_behind(p).startswith(str(path)) for p in load_model(path).parameters())


def test_a_damaged_file_is_refused_before_it_is_copied_from(place):
    path = Path("base.pt")
    save_model(path, TinyMambaModel(tiny_config()))
    sound = path.read_bytes()
    for at in (len(sound) // 3, len(sound) // 2):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        assert_refuses(*brief_flags(), "--init_from", path, naming=["base.pt", "damaged"])
    path.write_bytes(sound[:-500])
    assert_refuses(*brief_flags(), "--init_from", path, naming=["base.pt", "damaged"])


def test_values_of_another_shape_are_no_values_of_a_parameter():
    with pytest.raises(AssertionError):
        fill_parameter(torch.nn.Parameter(torch.zeros(3, 4)), torch.zeros(4))


# ------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_sizes_are_those_of_a_real_model_and_its_optimizer(optimizer):
    config = brief_config(optimizer=optimizer)
    model = TinyMambaModel(config)
    sizes = sharding.count(config)
    made = sharding.make_optimizer(model, config)
    ids = torch.arange(64).view(2, 32)
    model(ids, ids).backward()
    made.step()
    kept = [t for state in made.state.values() for t in state.values() if t.ndim]
    assert sizes.state == sum(t.numel() for t in kept)
    assert sizes.total == model.count_parameters()["total"]
    assert sizes.root == sum(p.numel() for p in (model.embedding.weight, model.norm.weight))


def test_the_table_has_a_row_for_each_size_and_more_shards_take_less():
    rows = sharding.make_table(sharding.Options())
    assert [row.split()[1] for row in rows[2:]] == list(sharding.SHAPES)
    sizes = sharding.Sizes(total=1000, block=100, root=200, state=1000)
    memory = [sharding.cost_of(sizes, shards, 1).memory for shards in (2, 4, 8)]
    assert memory == sorted(memory, reverse=True)
    one, ddp = sharding.cost_of(sizes, 1, 1), sharding.cost_of(sizes, 1, 4)
    assert (one.memory, one.traffic) == (4 * 3000, 0)
    assert (ddp.memory, ddp.traffic) == (4 * 4000, 4 * 1500)
