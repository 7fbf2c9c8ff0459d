"""Muon over several processes: the same updates as in one, divided, and little held at a time."""

import copy
import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers import LINUX, flags, fork_group, run_main, tiny_config
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import muon as muon_benchmark
from benchmarks.muon import Held, count, count_step
from testv2 import Config, TinyMambaModel
from tinymamba import muon
from tinymamba.distributed import full_tensor, make_sharded, shard_like
from tinymamba.initial_weights import init_weights
from tinymamba.muon import Matrix, assign, list_matrices, orthogonalize, plan_rounds
from tinymamba.optimizer import MuonAdamW, load_optimizer, make_optimizer

CONFIG = tiny_config(lr=0.02, weight_decay=0.3)
ROUND = 5000  # numbers: small, so that one step takes several rounds
# Rows of each part: fewer rows than processes, odd ones, tall and wide matrices.
PARTS = {(1, 8): [1], (3, 16): [3], (5, 8): [2, 3], (24, 8): [16, 8], (7, 24): [7], (33, 3): [33]}
ROWS = (Shard(0),)


# ------------------------------------------------------------------------------- one step, slowly


def gradients(tensors, seed: int) -> list[torch.Tensor]:
    """The same random gradients in every process."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=random) for t in tensors]


def step_slowly(weight, grad, mean, rows) -> None:
    """Muon's update of a parameter, one matrix after the other."""
    mean.lerp_(grad, 1 - MuonAdamW.MOMENTUM)
    momentum = grad.lerp(mean, MuonAdamW.MOMENTUM)
    weight *= 1 - CONFIG.lr * CONFIG.weight_decay
    for part, update in zip(weight.split(rows), momentum.split(rows), strict=True):
        new = orthogonalize(update[None])[0].float()
        part.add_(new * (0.2 * max(update.shape) ** 0.5), alpha=-CONFIG.lr)


def expected_after(steps: int) -> list[torch.Tensor]:
    """The matrices of PARTS after some steps."""
    weights = gradients([torch.empty(shape) for shape in PARTS], seed=99)
    means = [torch.zeros_like(weight) for weight in weights]
    for step in range(steps):
        for *tensors, rows in zip(
            weights, gradients(weights, step), means, PARTS.values(), strict=True
        ):
            step_slowly(*tensors, rows)
    return weights


def put(t: torch.Tensor, mesh, placements) -> torch.Tensor:
    """A tensor, sharded if there is a mesh."""
    return t if mesh is None else distribute_tensor(t, mesh, placements, src_data_rank=None)


def matrices_after(steps: int, mesh=None, placements=ROWS) -> list[torch.Tensor]:
    """The same with MuonAdamW, sharded over a mesh if there is one."""
    start = gradients([torch.empty(shape) for shape in PARTS], seed=99)
    weights = [nn.Parameter(put(t, mesh, placements)) for t in start]
    rows = dict(zip(weights, PARTS.values(), strict=True))
    optimizer = MuonAdamW(rows, [nn.Parameter(torch.zeros(1))], CONFIG)
    for step in range(steps):
        for weight, grad in zip(weights, gradients(start, step), strict=True):
            weight.grad = put(grad, mesh, placements)
        optimizer.step()
    return [full_tensor(weight).detach() for weight in weights]


# ----------------------------------------------------------------------------------- whole models


def train(model, optimizer, steps) -> dict[str, torch.Tensor]:
    """Steps with the same gradients in every process; the weights, assembled."""
    for step in steps:
        for p, grad in zip(model.parameters(), gradients(model.parameters(), step), strict=True):
            p.grad = shard_like(grad, p)
        optimizer.step()
    return {name: full_tensor(p).detach() for name, p in model.named_parameters()}


def build(sharded: bool) -> tuple[nn.Module, MuonAdamW]:
    torch.manual_seed(0)
    make = partial(TinyMambaModel, CONFIG, filled=False)
    if sharded:
        model = make_sharded(make, torch.device("cpu"), {"shard": dist.get_world_size()})
    else:
        model = make()
    init_weights(model)
    return model, make_optimizer(model, CONFIG)


def whole(state: dict) -> dict:
    """A copy of an optimizer's state as a checkpoint holds it, assembled."""
    return copy.deepcopy(tree_map(full_tensor, state))


def run_and_reload(sharded: bool, saved: dict | None) -> dict:
    """Weights after three steps, the state, and the weights after a fourth step from `saved`."""
    model, optimizer = build(sharded)
    found = {"weights": train(model, optimizer, range(3)), "state": whole(optimizer.state_dict())}
    model, optimizer = build(sharded)
    load_optimizer(optimizer, whole(saved or found["state"]), CONFIG)
    return found | {"resumed": train(model, optimizer, [3])}


# -------------------------------------------------------------------------------- the processes


def bytes_held(count: int, mesh=None) -> int:
    """The most bytes that a step over so many matrices of 32 x 32 makes at a time."""
    weights = [nn.Parameter(put(torch.randn(32, 32), mesh, ROWS)) for _ in range(count)]
    optimizer = MuonAdamW({p: [32] for p in weights}, [nn.Parameter(torch.zeros(1))], CONFIG)
    for _ in range(2):  # the momentum is made in the first
        for p in weights:
            p.grad = put(torch.randn(32, 32), mesh, ROWS)
        with Held() as held:
            optimizer.step()
    return held.most


def step_without_a_gradient(mesh) -> bool:
    """Whether a matrix without a gradient, and only that, stays as it is."""
    weights = [nn.Parameter(put(torch.ones(4, 4), mesh, ROWS)) for _ in range(3)]
    optimizer = MuonAdamW({p: [4] for p in weights}, [nn.Parameter(torch.zeros(1))], CONFIG)
    optimizer.step()  # none has any
    for p in weights[1:]:
        p.grad = put(torch.eye(4), mesh, ROWS)
    optimizer.step()
    first, *others = (full_tensor(p).detach() for p in weights)
    still = torch.equal(first, torch.ones(4, 4)) and weights[0] not in optimizer.state
    return still and all((other != 1).any() for other in others)


def step_with_an_infinite_gradient(mesh, rank: int) -> tuple[bool, float]:
    """Whether a gradient scaler skips a step for an infinity in one process's shard; its scale."""
    p = nn.Parameter(put(torch.ones(4, 4), mesh, ROWS))
    optimizer = MuonAdamW({p: [4]}, [nn.Parameter(torch.zeros(1))], CONFIG)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    p.grad = put(torch.eye(4), mesh, ROWS)
    if rank == 1:
        p.grad.to_local()[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    return torch.equal(full_tensor(p).detach(), torch.ones(4, 4)), scaler.get_scale()


def in_two(rank: int, saved: dict) -> dict:
    """What one of two processes finds."""
    mesh = init_device_mesh("cpu", (2,))
    found = {
        "copies": matrices_after(3),
        "shards": matrices_after(3, mesh),
        "ddp": run_and_reload(False, saved),
        "fsdp": run_and_reload(True, saved),
        "idle": [step_without_a_gradient(m) for m in (None, mesh)],
        "cost": {kind: count_step(muon_benchmark.build(CONFIG, kind)) for kind in ("ddp", "fsdp")},
        "infinite": step_with_an_infinite_gradient(mesh, rank),
    }
    muon.ROUND = 4096
    found["held"] = {n: [bytes_held(n), bytes_held(n, mesh)] for n in (32, 64)}
    return found


def in_four(rank: int, _) -> dict:
    """What one of four processes finds, with hybrid shards too."""
    mesh = init_device_mesh("cpu", (2, 2))
    return {
        "copies": matrices_after(2),
        "shards": matrices_after(2, init_device_mesh("cpu", (4,))),
        "hybrid": matrices_after(2, mesh, (Replicate(), Shard(0))),
    }


def start(act, argument, rank: int) -> dict:
    """What one process of a group finds."""
    muon.ROUND = ROUND
    dist.init_process_group("gloo")
    found = act(rank, argument)
    dist.barrier()
    return found


def together(act, world: int, argument, folder) -> list[dict]:
    """What each process of a group finds."""
    return fork_group(world, partial(start, act, argument), folder)


@pytest.fixture(scope="module")
def one():
    """What a single process finds."""
    return run_and_reload(False, None)


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    """What each of two processes finds."""
    return together(in_two, 2, one["state"], tmp_path_factory.mktemp("two"))


def assert_same(found: dict, expected: dict, tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        said = f"{name}: {{}}".format
        torch.testing.assert_close(found[name], t, rtol=0, atol=tolerance, msg=said)


# --------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("limit", [muon.ROUND, 100, 1])
def test_rounds_of_any_size_give_the_same_bits(monkeypatch, limit):
    monkeypatch.setattr(muon, "ROUND", limit)
    for found, expected in zip(matrices_after(3), expected_after(3), strict=True):
        assert torch.equal(found, expected)


@LINUX
def test_two_processes_give_the_bits_of_one(one, two):
    for rank in two:
        for kind in ("copies", "shards"):
            for found, expected in zip(rank[kind], expected_after(3), strict=True):
                assert torch.equal(found, expected), kind
        assert_same(rank["ddp"]["weights"], one["weights"])
        assert_same(rank["fsdp"]["weights"], one["weights"], 1e-8)  # AdamW's, rounded otherwise


@LINUX
def test_all_processes_have_the_same_bits(two):
    for kind, part in itertools.product(("ddp", "fsdp"), ("weights", "resumed")):
        assert_same(two[0][kind][part], two[1][kind][part])


@LINUX
def test_a_state_goes_from_one_process_to_two_and_back(one, two):
    for kind in ("ddp", "fsdp"):
        state, wanted = two[0][kind]["state"], one["state"]
        assert state["param_groups"] == wanted["param_groups"]
        assert state["state"].keys() == wanted["state"].keys()
        for i, kept in wanted["state"].items():
            assert_same(state["state"][i], kept, 1e-7)
        assert_same(two[0][kind]["resumed"], one["resumed"], 1e-8)
        model, optimizer = build(False)
        load_optimizer(optimizer, whole(state), CONFIG)
        assert_same(train(model, optimizer, [3]), one["resumed"], 1e-8)


@LINUX
def test_a_matrix_without_a_gradient_stays_and_holds_up_nobody(two):
    assert [rank["idle"] for rank in two] == [[True, True]] * 2


@LINUX
def test_an_infinity_in_one_shard_skips_the_step_in_all_processes(two):
    assert [rank["infinite"] for rank in two] == [(True, 4.0)] * 2


@LINUX
def test_a_step_holds_a_few_rounds_whatever_the_number_of_matrices(two):
    one_round, at_once = 2 * 4096, bytes_held(64)  # bytes; the second with rounds as they are
    for rank in two:
        for held in itertools.chain(*rank["held"].values()):
            assert held <= 10 * one_round < at_once / 5


@LINUX
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_benchmark_counts_without_data_what_real_processes_do(monkeypatch, two, parallel):
    monkeypatch.setattr(muon, "ROUND", ROUND)
    counted, real = count(CONFIG, parallel, 2), two[0]["cost"][parallel]
    alone = count(CONFIG, parallel, 1)
    for name in ("TFLOP", "MB received"):
        assert counted[name] == pytest.approx(real[name])
    assert counted["MB held"] == pytest.approx(real["MB held"], rel=0.3)  # gloo holds some longer
    assert counted["TFLOP"] * counted["balance"] < 0.51 * alone["TFLOP"]
    assert alone["MB received"] == 0 < counted["MB received"]


@LINUX
def test_the_benchmark_measures_a_real_process():
    words = {"d_model": 64, "n_layer": 1, "num_heads": 1, "vocab_size": 64, "processes": 1}
    done = run_main(muon_benchmark.main, "--run", *flags(**words, parallel="ddp"))
    assert done.returncode == 0, done.stderr
    heading, _, row = done.stdout.splitlines()
    assert heading == "| parallel | processes | CPU seconds | MB more |"
    assert row.startswith("| ddp | 1 | ") and float(row.split("|")[3]) > 0


@LINUX
def test_four_processes_and_hybrid_shards_give_the_bits_of_one(tmp_path):
    for rank in together(in_four, 4, None, tmp_path):
        for kind, weights in rank.items():
            for found, expected in zip(weights, expected_after(2), strict=True):
                assert torch.equal(found, expected), kind


# -------------------------------------------------------------------------------------- the plan


def matrices_of(config: Config) -> list[Matrix]:
    """Muon's matrices in a model of these settings."""
    with torch.device("meta"):
        model = TinyMambaModel(config)
    return sorted(m for own in make_optimizer(model, config).rounds for m in own[0])


@pytest.fixture(scope="module")
def base():
    """Those of the base preset."""
    return matrices_of(Config())


@pytest.mark.parametrize("processes, most", [(2, 1.001), (4, 1.001), (8, 1.001), (16, 1.02)])
def test_every_matrix_has_one_owner_and_the_owners_equal_loads(base, processes, most):
    owned = assign(base, processes)
    assert sorted(itertools.chain(*owned)) == base
    loads = [sum(matrix.flops for matrix in own) for own in owned]
    assert max(loads) * processes <= most * sum(loads)


def test_rounds_hold_every_matrix_once_and_no_more_than_the_limit(monkeypatch, base):
    for limit in (2**23, 10**6):
        monkeypatch.setattr(muon, "ROUND", limit)
        rounds = plan_rounds(base, 8)
        assert sorted(m for owners in rounds for own in owners for m in own) == base
        for own in itertools.chain(*rounds):
            assert len(own) <= 1 or sum(matrix.size for matrix in own) <= limit


def test_more_processes_than_matrices_leave_some_without():
    few = list_matrices({torch.empty(4, 4): [4], torch.empty(6, 4): [2, 4]})
    assert [len(own) for own in assign(few, 5)] == [1, 1, 1, 0, 0]
    assert len(plan_rounds(few, 5)) == 1


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 7, 7)])
def test_the_flops_are_those_of_the_products(shape):
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(shape))
    assert counter.get_total_flops() == shape[0] * Matrix(0, 0, *shape[1:]).flops
