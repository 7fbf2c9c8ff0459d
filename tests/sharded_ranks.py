"""What test_sharding.py runs in each of several processes: one JSON line per process.

    PYTHONPATH=. RANK=0 WORLD_SIZE=2 ... python tests/sharded_ranks.py PORT WORDS -- WORDS --

First the checks below, then a run of testv2.py for each list of words. These meet at PORT.
"""

import json
import os
import sys
from itertools import groupby

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from testv2 import Config, TinyMambaModel, main
from tinymamba.distributed import full_tensor, join_process_group, make_sharded
from tinymamba.initial_weights import init_weights

CPU = torch.device("cpu")
SHAPE = {"d_model": 32, "n_layer": 3, "vocab_size": 257, "num_heads": 2, "ssm_head_dim": 8,
         "d_state": 8, "window_size": 8, "chunk_size": 16, "dropout": 0.0,
         "state_noise": 0.0}  # fmt: skip


class Traffic(TorchDispatchMode):
    """Counts the bytes that collective operations gather, scatter and reduce."""

    def __init__(self):
        super().__init__()
        self.sizes = {"_allgather_base_": 0, "_reduce_scatter_base_": 0, "allreduce_": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        if name in self.sizes:
            whole = args[1] if name == "_reduce_scatter_base_" else args[0]
            whole = whole if isinstance(whole, list | tuple) else [whole]
            self.sizes[name] += sum(t.nbytes for t in whole)
        return func(*args, **(kwargs or {}))


def compare(sizes: dict[str, int], tied: bool) -> dict:
    """A sharded model against one of this process alone."""
    config = Config(**SHAPE, tie_embeddings=tied)
    torch.manual_seed(3)
    whole = TinyMambaModel(config)
    torch.manual_seed(3)
    model = make_sharded(lambda: TinyMambaModel(config, filled=False), CPU, sizes)
    init_weights(model)
    pairs = zip(model.state_dict().values(), whole.state_dict().values(), strict=True)
    found = {
        "same": all(torch.equal(full_tensor(p), q) for p, q in pairs),
        "rest": sorted(find_tensors(model)),
        "tied": model.head.weight is model.embedding.weight,
        "held": sum(p.to_local().numel() for p in model.parameters()),
    }
    ids = torch.arange(64).view(2, 32)
    whole(ids, ids).backward()
    with Traffic() as traffic:
        model(ids, ids).backward()
    pairs = zip(model.parameters(), whole.parameters(), strict=True)
    gaps = [(full_tensor(p.grad) - q.grad).abs().max().item() for p, q in pairs]
    return {**found, "gap": max(gaps), "sizes": traffic.sizes}


def find_tensors(model: torch.nn.Module) -> list[str]:
    """Buffers and all other tensors that are no parameters."""
    plain = (
        f"{name}.{field}"
        for name, module in model.named_modules()
        for field, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    )
    return [*plain, *(name for name, _ in model.named_buffers())]


def run_checks() -> dict:
    """All comparisons, by name."""
    world = int(os.environ["WORLD_SIZE"])
    ways = {"fsdp": {"shard": world}, "hsdp": {"replicate": 2, "shard": world // 2}}
    watchdog = join_process_group(CPU, 60)
    found = {f"{n} {t}": compare(way, t) for n, way in ways.items() for t in (True, False)}
    watchdog.close(None)
    dist.destroy_process_group()
    return found


def check_and_train(argv: list[str]) -> None:
    """Print what the checks found and the exit codes of the runs."""
    checks = run_checks()
    os.environ["MASTER_PORT"], *words = argv
    runs = [list(part) for end, part in groupby(words, "--".__eq__) if not end]
    print(json.dumps([checks, [main(part) for part in runs]]))


if __name__ == "__main__":
    check_and_train(sys.argv[1:])
