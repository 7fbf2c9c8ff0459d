"""Where a step's time goes: every operator belongs to the part of the model that called it."""

import pytest
import torch
from helpers import brief_config, flags, run_main
from torch import nn
from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import FunctionEvent

from benchmarks import step
from testv2 import Trainer
from tinymamba import profiling
from tinymamba.profiling import Cost, Profile, costs_of, profile_parts, recorded

OF_SCAN = {"SSM: scan", "SSM: steps, rotation, gating", "SSM: projections", "SSM: convolution"}
OF_ATTENTION = {"attention: projections", "attention: convolution", "attention: core"}
OF_ATTENTION |= {"attention: norms, RoPE, layout", "memory"}
OF_BLOCKS = {*OF_SCAN, *OF_ATTENTION, "norm and convolution", "MLP", "gate and mixing"}
OF_STEP = {"embedding", "last norm", "head and loss", "rest of the model", "autograd itself"}
OF_STEP |= {"clipping", "optimizer", "data", "waiting for the device"}


def profiled(**changes) -> Profile:
    """Of one step of a tiny run, in the folder `place`."""
    trainer = Trainer(brief_config(max_steps=3, **changes))
    profile, _ = profile_parts(trainer, trainer.train_batches(3), steps=1)
    trainer.close()
    return profile


@pytest.fixture
def counting(monkeypatch):
    """Every matrix product takes one ms, and all else takes none."""
    product = property(lambda event: 1000.0 * (event.name in ("aten::mm", "aten::addmm")))
    monkeypatch.setattr(FunctionEvent, "self_cpu_time_total", product)


def test_the_parts_account_for_a_step_and_each_has_a_row(place):
    tries = (profiled(d_model=64, block_size=64) for _ in range(4))
    profile = next(p for p in tries if p.share >= 0.95)  # another process may take its turn
    assert {*profile.costs} == OF_BLOCKS | OF_STEP
    assert profile.share <= 1.001
    assert [*profile.costs] == [part for part in profiling.PARTS if part in profile.costs]
    assert all(0 <= cost.products <= cost.total for cost in profile.costs.values())
    for part in OF_BLOCKS:
        assert profile.costs[part].forward > 0 and profile.costs[part].backward > 0, part
    assert profile.costs["optimizer"].products > 0 == profile.costs["clipping"].products
    *rows, _, last = profile.table()
    assert [row.split("|")[1].strip() for row in rows[2:]] == [*profile.costs]
    assert f"account for {profile.share:.1%}" in last and "less than" not in last


def test_parts_that_a_model_lacks_have_no_row(place):
    profile = profiled(memory=False, bc_conv=False, k_conv=False, qv_conv=False)
    lacking = {"memory", "SSM: convolution", "attention: convolution"}
    assert {*profile.costs} == (OF_BLOCKS | OF_STEP) - lacking


@pytest.mark.parametrize("again", [0, 1], ids=["plain", "checkpoint_activations"])
def test_backward_operators_belong_to_the_part_of_their_forward_operator(place, counting, again):
    found = profiled(n_layer=3, checkpoint_activations=bool(again), optimizer="adamw").costs
    products = {"SSM: projections": 3, "attention: projections": 2, "MLP": 2, "gate and mixing": 1}
    for part, count in products.items():  # backward: for the input and for the weight
        cost = found[part]
        assert (cost.forward, cost.backward) == (3 * count, 3 * count * (2 + again)), part
        assert cost.products == cost.total
    assert found["memory"].forward >= 1  # one block has it
    lacking = ("embedding", "norm and convolution", "optimizer", "clipping", "autograd itself")
    assert not any(found[part].total for part in lacking)


def test_a_sequence_number_belongs_to_the_last_operator_that_has_it():
    x = torch.ones(3, requires_grad=True)
    with torch.profiler.profile() as profiler, record_function("part: step"):
        with record_function("part: before"):
            x.detach() + 1  # makes no node, so the next operator has its number too
        with record_function("part: of x"):
            y = (2 * x).sum()
        y.backward()
    events = profiler.events()
    whole = next(event for event in events if event.name == "part: step")
    costs = costs_of(events, whole, on_gpu=False)
    assert costs["of x"].backward > 0 == costs["before"].backward < costs["before"].forward
    assert costs["autograd itself"].total > 0  # the gradient of x is stored


def test_compiled_blocks_are_one_part_each_and_are_not_compiled_again(place, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    trainer = Trainer(brief_config(max_steps=3, use_compile=True))
    scan = Trainer.train_step.__globals__["selective_scan"]
    with profiling.recorded_parts(trainer):
        assert Trainer.train_step.__globals__["selective_scan"] is scan  # guarded by the graph
    profile, _ = profile_parts(trainer, trainer.train_batches(3), steps=1)
    trainer.close()
    assert {*profile.costs} == OF_STEP | {"blocks, compiled"}
    assert profile.costs["blocks, compiled"].backward > 0


def test_after_a_profile_everything_is_as_before(place):
    trainer = Trainer(brief_config(max_steps=3))
    before = nn.utils.clip_grad_norm_, torch.autograd.backward, *map(vars, trainer.model.modules())
    before = before[:2], [{*names} for names in before[2:]], {*vars(trainer)}
    with pytest.raises(KeyError), profiling.recorded_parts(trainer):
        assert nn.utils.clip_grad_norm_ is not before[0][0]
        raise KeyError
    after = nn.utils.clip_grad_norm_, torch.autograd.backward
    names = [{*vars(module)} for module in trainer.model.modules()]
    assert (after, names, {*vars(trainer)}) == before
    trainer.close()
    layer = nn.Linear(1, 1)
    layer.forward = own = lambda x: x
    with recorded(layer, "forward", "MLP"):
        assert layer(3) == 3 and layer.forward is not own
    assert layer.forward is own


def test_a_share_that_is_too_low_is_said():
    costs = {"MLP": Cost(forward=30.0, backward=64.0, products=10.0)}
    *_, row, _, last = Profile(costs, step=100.0, plain=99.0).table()
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells == ["MLP", "30.0", "64.0", "10.0", "84.0", "94.0", "94.0"]
    assert "account for 94.0% of a step of 100.0 ms" in last and "less than 95%" in last


def test_step_command_writes_the_table(tmp_path):
    (tmp_path / "notes.md").write_text("a\n<!-- step -->\n<!-- /step -->\nb\n")
    sizes = flags(d_model=32, n_layer=1, num_heads=1, block_size=16, steps=1, vocab_size=64)
    words = [*sizes, *flags(table="notes.md", variant="memory=false ssm_head_dim=32")]
    done = run_main(step.main, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "notes.md").read_text()
    assert text == f"a\n<!-- step -->\n{done.stdout}<!-- /step -->\nb\n"
    assert "| SSM: scan " in text and "| memory " not in text
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]
