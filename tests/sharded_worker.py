"""One of two processes that train sharded models one after another: test_sharded_checkpoint.py.

They meet once. The first one leaves what it has seen in the file "seen".
"""

import errno
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import brief_config
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

import testv2
from testv2 import Trainer, resumed_config
from tinymamba import sharded_checkpoint
from tinymamba.checkpoint import digest, find_saved, save_checkpoint
from tinymamba.cli import UserError
from tinymamba.distributed import full_tensor, local_tensor
from tinymamba.profiling import profile_parts

STEPS = {
    "parallel": "fsdp",
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "dropout": 0.1,
    "schedule": "constant",
    "checkpoint_interval": 2,
    "wandb_run_name": "run",
}


def begin(path: str, **changes) -> Trainer:
    """A run that saves to `path`: it continues if there is something to continue from."""
    named = {**STEPS, **changes, "checkpoint_path": path}
    config = brief_config(**named, resume="auto")
    saved, _ = find_saved(config)
    config = config if saved is None else resumed_config(saved, named)
    return Trainer(config, saved=saved)


def train(path: str, **changes) -> Trainer:
    trainer = begin(path, **changes)
    trainer.log.plot = lambda _: None  # half a second of imports
    trainer.train()
    trainer.writer.close()
    return trainer


def gathered(trainer: Trainer) -> dict:
    """The state as one process would have it."""
    return tree_map(full_tensor, trainer.state())


def count_gathers(run) -> int:
    """How many tensors were assembled from their shards meanwhile."""
    calls, ways = [], ("full_tensor", "redistribute")
    before = [getattr(DTensor, name) for name in ways]
    for name, method in zip(ways, before, strict=True):
        setattr(DTensor, name, lambda *a, m=method, **k: (calls.append(1), m(*a, **k))[1])
    run()
    for name, method in zip(ways, before, strict=True):
        setattr(DTensor, name, method)
    return len(calls)


def storages(state: dict) -> dict[int, int]:
    """Place and bytes of the memory that this process has for the tensors of a state."""
    tensors = [t for t in tree_leaves(state) if isinstance(t, torch.Tensor)]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}


def staging(trainer: Trainer) -> dict:
    """Bytes that a background save copies, of this process's shards, and of the whole state."""
    own, staged = storages(trainer.state()), storages(trainer.writer.copy(trainer.state()))
    shared = (own.keys() & staged.keys()) - {0}
    sizes = {"own": own, "staged": staged, "whole": storages(gathered(trainer))}
    return {"shared": len(shared), **{name: sum(s.values()) for name, s in sizes.items()}}


def fail_on_full_disk(trainer: Trainer) -> str:
    """Save while the disk of the second process is full; the error."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    fsync = os.fsync
    try:
        if dist.get_rank() == 1:
            os.fsync = full
        trainer.save()
    except UserError as e:
        return str(e)
    finally:
        os.fsync = fsync
    return ""


def begin_from(folder: str) -> tuple[str, int, list[str]]:
    """A new run with the weights of a folder: what they are, the most that was read of it, and the
    parts of one of its steps."""
    read, sizes = sharded_checkpoint.read_tensors, []

    def counted(manifest, targets):
        sizes.append(sum(local_tensor(t).nbytes for t in targets.values()))
        read(manifest, targets)

    sharded_checkpoint.read_tensors = counted
    trainer = Trainer(brief_config(**STEPS, init_from=folder, max_steps=3))
    sharded_checkpoint.read_tensors = read
    begun = digest(gathered(trainer)["model"])
    profile, _ = profile_parts(trainer, trainer.train_batches(3), steps=1)
    return begun, max(sizes), [*profile.costs]


def flip(path: Path) -> None:
    """Damage a file, in the first process; the second one waits."""
    if dist.get_rank() == 0:
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    dist.barrier()


def main(argv: list[str]) -> int:
    """All checks; the words of the command line are none."""
    watchdog = testv2.join_process_group(torch.device("cpu"), 60)
    testv2.join_process_group = lambda *_: watchdog
    seen: dict = {}
    validated = {"enable_validation": True, "validation_interval": 2, "validation_steps": 2}
    trainer = train("whole.pt", max_steps=6, save_top_k=2, **validated)
    state = gathered(trainer)
    if trainer.main:
        save_checkpoint("gathered.pt", state)
    seen["gathers"] = count_gathers(lambda: trainer.write("copy.pt", trainer.state()))
    seen["memory"] = staging(trainer)
    seen["full disk"] = fail_on_full_disk(trainer)
    seen["left after it"] = Path("whole.pt.tmp").exists()
    train("carried.pt", max_steps=4, carry_state=True, dropout=0.0)
    train("halves.pt", max_steps=3)
    train("halves.pt", max_steps=6, async_save=True)
    dist.barrier()
    seen["begun"] = begin_from("whole.pt")
    for name, parallel in (("halves", "ddp"), ("gathered", "fsdp")):
        state = gathered(begin(f"{name}.pt", max_steps=9, parallel=parallel))
        seen[name] = [digest(state["model"]), digest(state["optimizer"])]
    flip(Path("halves.pt/shard_00001.safetensors"))
    seen["after damage"] = begin("halves.pt", max_steps=9).step
    watchdog.close(None)
    dist.destroy_process_group()
    if trainer.main:
        Path("seen").write_text(json.dumps(seen))
    return 0
