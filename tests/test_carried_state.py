"""--carry_state: the order of rows, states that go from step to step, checkpoints of them."""

import functools
import gc
import itertools
import math
import pickle
import signal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    LATEST,
    LINUX,
    after_step,
    assert_refused,
    assert_refuses,
    brief_config,
    brief_flags,
    call,
    examples,
    free_copy,
    go_on,
    run_main,
    run_two_ranks,
    some_ids,
    wide,
    write_conversations,
    write_tokens,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import peft
import testv2
from peft import AdapterConfig, FineTuner
from testv2 import Config, Trainer
from tinymamba.carried_state import CarriedStates, RowDataset, RowOrder, erase_rows
from tinymamba.checkpoint import load_checkpoint, save_checkpoint
from tinymamba.cli import UserError
from tinymamba.data_order import ShardedBatches

BATCH, BLOCK = 2, 8
CARRIED = {"carry_state": True, "batch_size": BATCH, "gradient_accumulation_steps": 2}
CARRIED |= {"block_size": BLOCK, "optimizer": "adamw", "checkpoint_interval": 0}


def carried_config(**changes) -> Config:
    return brief_config(**{**CARRIED, **changes})


def losses(trainer: Trainer) -> list[float]:
    return [loss for _, loss in trainer.progress["history"]["train"]]


def take_steps(trainer: Trainer, steps: int) -> list[float]:
    """The losses of that many steps, without logs and checkpoints, which take longer."""
    batches = trainer.train_batches(steps)
    return [trainer.train_step(batches)[0] for _ in range(steps)]


# ------------------------------------------------------------------------------------ order


def walk(order: RowOrder, epoch: int) -> list[list[tuple[int, int]]]:
    """What each row reads in an epoch."""
    first = epoch * len(order)
    return [[order.locate(i) for i in range(first + row, first + len(order), order.rows)]
            for row in range(order.rows)]  # fmt: skip


sources = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=4)


@examples(150)
@given(sources, st.booleans(), st.integers(1, 12), st.integers(0, 99), st.integers(0, 3))
def test_an_epoch_is_cut_into_runs_that_read_each_block_at_most_once(
    sizes, by_size, rows, seed, epoch
):
    blocks, weights = ([*each] for each in zip(*sizes, strict=True))
    weights = blocks if by_size else weights
    order = RowOrder(blocks, weights, rows, seed)
    most = math.floor(
        min(Fraction(b, w) for b, w in zip(blocks, weights, strict=True)) * sum(weights)
    )
    assert order.tape == most and len(order) == most // rows * rows
    read = walk(order, epoch)
    flat = [place for run in read for place in run]
    assert len(set(flat)) == len(flat) == len(order)
    assert all(0 <= block < blocks[source] for source, block in flat)
    for row, run in enumerate(read):
        for step, place in enumerate(run):
            goes_on = step and place == (run[step - 1][0], run[step - 1][1] + 1)
            assert order.begins((epoch * order.steps + step) * rows + row) == (not goes_on)
    breaks = sum(order.begins(epoch * len(order) + i) for i in range(len(order)))
    assert breaks <= rows + 2 * len(blocks) + 1, "runs are as long as they can be"
    for source, weight in enumerate(weights):
        share = Fraction(weight, sum(weights))
        for places in zip(*read, strict=True):  # of one step
            assert abs(sum(s == source for s, _ in places) - rows * share) < 2
        left_out = order.tape - len(order)
        assert abs(sum(s == source for s, _ in flat) - order.tape * share) < 1 + left_out


def test_the_order_is_a_pure_function_and_another_in_every_epoch_and_seed():
    order = RowOrder([50, 31], [50, 31], 4, seed=1)
    numbers = [*range(3 * len(order))]
    inorder = [order.locate(i) for i in numbers]
    for seed in (0, 5):
        shuffled = np.random.default_rng(seed).permutation(numbers).tolist()
        again = RowOrder([50, 31], [50, 31], 4, seed=1)
        found = {i: again.locate(i) for i in shuffled}
        assert [found[i] for i in numbers] == inorder
    epochs = [walk(order, epoch) for epoch in range(3)]
    other = walk(RowOrder([50, 31], [50, 31], 4, seed=2), 0)
    for one, two in itertools.combinations([*epochs, other], 2):
        assert all(a != b for a, b in zip(one, two, strict=True))


def test_every_block_has_its_turn_over_the_epochs():
    order = RowOrder([23, 2], [23, 2], 4, seed=0)
    assert order.tape % 4, "each epoch leaves some out"
    read = {place for epoch in range(12) for run in walk(order, epoch) for place in run}
    assert read == {(0, b) for b in range(23)} | {(1, b) for b in range(2)}


def test_a_source_of_less_than_a_block_an_epoch_is_read_as_often_as_its_weight_says():
    order = RowOrder([40, 40], [100, 1], 2, seed=0)  # 0.4 blocks of 40.4 in an epoch
    places = [place for epoch in range(200) for run in walk(order, epoch) for place in run]
    assert abs(sum(source for source, _ in places) - len(places) / 101) < 25


@LINUX
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there are cores
@pytest.mark.parametrize("world, workers", [(1, 0), (2, 2)])
def test_each_rank_and_worker_reads_the_rows_whose_states_it_has(
    tmp_path, monkeypatch, world, workers
):
    path = write_tokens(tmp_path / "x.bin", np.arange(61 * BLOCK + 3))
    data = pickle.loads(pickle.dumps(RowDataset(path, BLOCK, rows=8)))  # as to a worker
    config = carried_config(gradient_accumulation_steps=4 // world)
    last = 2 * len(data)
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        states = CarriedStates(wide(), data, config)
        plan = ShardedBatches(0, last, BATCH, rank, world)
        batches = iter([*DataLoader(data, batch_sampler=plan, num_workers=workers)])
        for first in range(0, last, data.rows):
            for i in range(4 // world):
                ids, targets = next(batches)
                rows = [data[first + row] for row in states.rows(i)]
                assert torch.equal(ids, torch.stack([row[0] for row in rows]))
                assert torch.equal(targets, torch.stack([row[1] for row in rows]))
        assert next(batches, None) is None


# ------------------------------------------------------------------------------------ training


def losses_of_one_reading(trainer: Trainer, steps: int) -> list[float]:
    """The loss of each step, from one pass over all that a row reads until it begins anew."""
    data, found = trainer.train_data, torch.zeros(steps, trainer.train_data.rows)
    for row in range(data.rows):
        numbers = [step * data.rows + row for step in range(steps)]
        begins = [step for step, i in enumerate(numbers) if data.order.begins(i)]
        assert begins[0] == 0
        for first, last in itertools.pairwise([*begins, steps]):
            parts = [data[i] for i in numbers[first:last]]
            ids, targets = (torch.cat([part[k] for part in parts])[None] for k in (0, 1))
            each = F.cross_entropy(trainer.model(ids).mT, targets, reduction="none")
            found[first:last, row] = each.view(last - first, -1).mean(1)
    return found.mean(1).tolist()


@pytest.mark.parametrize(
    "changes",
    [{}, {"document_mask": True, "eos_id": 10}, {"checkpoint_activations": True}],
    ids=["plain", "documents", "recomputed"],
)
def test_losses_of_steps_are_those_of_one_long_reading(place, changes):
    """Of two sources, over two epochs, in which texts end."""
    ids = np.fromfile("data/text/train.bin", np.int32)
    sources = [write_tokens(Path(f"{n}.bin"), ids[n : n + n * BLOCK + 1]) for n in (20, 7)]
    trainer = Trainer(carried_config(**changes, lr=0.0, train_data_path=[*map(str, sources)]))
    trainer.model.load_state_dict(wide(**changes).state_dict())  # whose states matter
    found, order = take_steps(trainer, 10), trainer.train_data.order
    assert order.steps == 6 and sum(order.begins(i) for i in range(4, 6 * 4)) > 0
    want = losses_of_one_reading(trainer, 10)
    assert found == pytest.approx(want, abs=1e-5)
    assert max(state.position.max() for state in trainer.carried.states) == 4 * BLOCK
    ids, targets = next(trainer.batches(trainer.loader(trainer.train_data, 4, 8)))
    alone = trainer.model.loss(ids, targets).item()
    ids, targets = next(trainer.batches(trainer.loader(trainer.train_data, 6, 8)))
    alone = (alone + trainer.model.loss(ids, targets).item()) / 2
    assert abs(alone - want[1]) > 1e-3, "the state matters"


def test_the_model_gives_the_state_after_the_text_and_gradients_as_without_one():
    model, ids = free_copy(wide()).train(), some_ids(2, 17)
    plain = model(ids[:, :-1], ids[:, 1:])
    loss, gates, state = model_with_state(model, ids, model.init_state(2))
    assert torch.allclose(loss, plain, atol=1e-6) and gates.shape[-1] == 3
    want = torch.autograd.grad(plain, [*model.parameters()])
    for one, other in zip(torch.autograd.grad(loss, [*model.parameters()]), want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    _, advanced = model.advance(ids[:, :-1], model.init_state(2))
    for name, t in advanced.tensors().items():
        torch.testing.assert_close(state.tensors()[name], t)


def model_with_state(model, ids, state):
    (loss, gates), state = model(ids[:, :-1], ids[:, 1:], return_gates=True, state=state)
    return loss, gates, state


def test_accumulation_equals_one_large_batch(place):
    pieces = Trainer(carried_config(batch_size=2, gradient_accumulation_steps=3))
    whole = Trainer(carried_config(batch_size=6, gradient_accumulation_steps=1))
    assert take_steps(pieces, 5) == pytest.approx(take_steps(whole, 5), abs=1e-5)
    for a, b in zip(pieces.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)
    assert_same_states(pieces.carried.gather(), whole.carried.gather(), 1e-4)


def assert_same_states(one: dict, other: dict, tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, t in one.items():
        torch.testing.assert_close(t, other[name], atol=tolerance, rtol=tolerance)


def test_memory_does_not_grow_and_states_hold_no_graph(place):
    gc.freeze()  # to search what other tests have left takes long
    trainer = Trainer(carried_config(state_noise=0.1, dropout=0.1))
    batches, counts = trainer.train_batches(9), []
    for steps in (3, 5):
        for _ in range(steps):
            trainer.train_step(batches)
        counts.append(count_tensors())
    assert counts[0] == counts[1]
    for state in trainer.carried.states:
        for t in state.tensors().values():
            assert not t.requires_grad and t.untyped_storage().nbytes() == t.nbytes
    assert len(trainer.carried.states) == 2
    assert trainer.carried.states[0].nbytes == trainer.model.init_state(BATCH).nbytes


def count_tensors() -> int:
    gc.collect()
    return sum(type(o) is torch.Tensor for o in gc.get_objects())


def test_states_are_float32_under_autocast(place):
    trainer = Trainer(carried_config(amp_dtype=torch.bfloat16))
    take_steps(trainer, 2)
    for name, t in trainer.carried.gather().items():
        integer = name in ("position", "document_start")
        assert t.dtype == (torch.int64 if integer else torch.float32)


@pytest.fixture
def compiles(monkeypatch):
    """Compilation begins here: without a compiler, graphs are interpreted."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(testv2, "why_no_compile", lambda device: None)


def test_compiled_blocks_carry_the_same_state_and_are_compiled_once(place, compiles):
    plain, compiled = (Trainer(carried_config(use_compile=on)) for on in (False, True))
    want, found = take_steps(plain, 3), take_steps(compiled, 1)
    batches = compiled.train_batches(2)
    with torch.compiler.set_stance("fail_on_recompile"):
        found += [compiled.train_step(batches)[0] for _ in range(2)]
    assert compiled.compiled and found == pytest.approx(want, abs=1e-5)
    assert_same_states(compiled.carried.gather(), plain.carried.gather(), 1e-4)


def test_a_step_that_is_computed_again_begins_with_the_same_states(place, monkeypatch):
    """As where compilation fails in the second micro-batch."""
    plain, again = Trainer(carried_config()), Trainer(carried_config())
    forward, calls = again.forward, []

    def fail_once(*args, **settings):
        calls.append(1)
        if len(calls) == 4:
            raise torch._dynamo.exc.TorchDynamoException("no")
        return forward(*args, **settings)

    monkeypatch.setattr(again, "forward", fail_once)
    assert take_steps(again, 3) == take_steps(plain, 3)
    assert_same_states(again.carried.gather(), plain.carried.gather())


# ------------------------------------------------------------------------------ skipped steps


def test_a_skipped_spike_keeps_its_state_and_a_broken_row_begins_anew():
    data = RowDataset.__new__(RowDataset)
    data.rows, data.order = 4, RowOrder([40], [40], 4, seed=0)
    states = CarriedStates(wide(), data, carried_config())
    for i, state in enumerate(states.states):
        ids = some_ids(BATCH, 5, seed=i)
        states.next[i] = wide().advance(ids, state)[1]
    first = next(i for i in range(4, 40, 4) if not any(map(data.order.begins, range(i, i + 4))))
    states.next[1].layers[0].ssm[1] = math.inf
    states.next[1].layers[1].keys[1, 0, 0] = math.nan
    kept = [state.clone() for state in states.next]
    states.advance(first, good=False)
    assert_same_states(states.states[0].tensors(), kept[0].tensors())
    assert_same_states(states.states[1].select([0]).tensors(), kept[1].select([0]).tensors())
    fresh = wide().init_state(1)
    assert_same_states(states.states[1].select([1]).tensors(), fresh.tensors())


def test_an_erased_row_reads_as_if_nothing_had_been_before():
    model, ids = wide(), some_ids(2, 30)
    _, state = model.advance(ids, model.init_state(2))
    state = erase_rows(state, torch.tensor([False, True]))
    got, _ = model.advance(ids, state)
    want = model(ids)
    assert torch.allclose(got[1], want[1], atol=1e-5)
    assert not torch.allclose(got[0], want[0], atol=1e-2)


def test_a_step_without_a_finite_loss_does_not_poison_the_rows(place):
    trainer = Trainer(carried_config())
    loss_of, calls = trainer.carried.loss, []

    def poisoned(model, batch, i):
        calls.append(i)
        loss = loss_of(model, batch, i)
        if len(calls) == 3:  # of the second step
            trainer.carried.next[i].layers[0].ssm.fill_(math.nan)
            return loss * math.nan
        return loss

    trainer.carried.loss = poisoned
    finite = [math.isfinite(loss) for loss in take_steps(trainer, 5)]
    assert finite == [True, False, True, True, True]


# ------------------------------------------------------------------------------------ resume


def test_a_run_stopped_after_each_of_its_steps_is_the_run_that_was_not(place):
    changes = {"max_steps": 6, "dropout": 0.1, "state_noise": 0.1}
    whole = Trainer(carried_config(**changes, checkpoint_path="whole.pt"))
    assert whole.run() == 0 and whole.epoch() == 0
    trainer = Trainer(carried_config(**changes))
    after_step(trainer, 1, lambda: signal.raise_signal(signal.SIGINT))
    assert trainer.run() == 130
    for _ in range(4):
        go_on(stop_after=1)
    trainer = go_on()
    saved, want = load_checkpoint(LATEST), load_checkpoint("whole.pt")
    assert losses(trainer) == losses(whole)
    assert all(torch.equal(saved["model"][name], t) for name, t in want["model"].items())
    assert_same_states(saved["carried_state"], want["carried_state"])
    assert want["carried_state"]["position"].max() > BLOCK


@pytest.fixture
def stopped(place):
    """A checkpoint in the middle of a run of 6 steps of 4 rows."""
    trainer = Trainer(carried_config(max_steps=6))
    after_step(trainer, 3, lambda: signal.raise_signal(signal.SIGINT))
    assert trainer.run() == 130
    return place


def test_rows_are_distributed_anew_over_the_micro_batches(stopped):
    saved = load_checkpoint(LATEST)
    plain = Trainer(Config.from_dict(saved["config"]), saved=saved)
    config = {**saved["config"], "batch_size": 4, "gradient_accumulation_steps": 1}
    other = Trainer(Config.from_dict(config), saved=load_checkpoint(LATEST))
    assert_same_states(other.carried.gather(), plain.carried.gather())
    assert len(other.carried.states) == 1
    assert take_steps(other, 3) == pytest.approx(take_steps(plain, 3), abs=1e-5)


def test_another_number_of_rows_is_refused(stopped):
    words = ["--resume", "--batch_size", 3]
    assert_refuses(*words, naming=["batch_size: a step has 6 rows", "the states of 4",
                                   "--accept_changed_data"])  # fmt: skip
    done = call(*words, "--accept_changed_data", "true")
    assert done.returncode == 0 and "a new epoch begins" in done.stdout, done.stderr
    assert load_checkpoint(LATEST)["carried_state"]["position"].tolist() == [3 * BLOCK] * 6


@pytest.mark.parametrize("carried", [True, False])
def test_carrying_cannot_be_switched_on_or_off(place, carried):
    assert Trainer(carried_config(max_steps=2, carry_state=carried)).run() == 0
    words = ["--resume", "--max_steps", 4, "--carry_state", str(not carried).lower()]
    assert_refuses(*words, naming=[f"carry_state: {not carried} asked for"])


def test_a_checkpoint_from_before_there_was_carry_state_goes_on_without(place):
    assert Trainer(brief_config(max_steps=2)).run() == 0
    saved = load_checkpoint(LATEST)
    assert "carried_state" not in saved and "rows" not in saved["data"]
    del saved["config"]["carry_state"]
    save_checkpoint(LATEST, saved)
    assert call("--resume", "--max_steps", 3).returncode == 0
    words = ["--resume", "--max_steps", 4, "--carry_state", "true"]
    assert_refuses(*words, naming=["carry_state: True asked for, but the checkpoint has False"])


def lost(states):
    states.clear()


def short(states):
    states["layers.0.ssm"] = states["layers.0.ssm"][:3]


def of_another_kind(states):
    states["layers.1.keys"] = states["layers.1.keys"].bfloat16()


def incomplete(states):
    del states["position"]


def test_states_that_do_not_fit_are_refused(stopped):
    for damage in (short, of_another_kind, incomplete, lost):
        saved = load_checkpoint(LATEST)
        damage(saved["carried_state"])
        save_checkpoint("damaged.pt", saved)
        words = ["--resume_from", "damaged.pt", "--checkpoint_path", "x.pt"]
        assert_refuses(*words, naming=["damaged.pt", "has no states of 4 rows of this model"])


def test_other_data_begin_anew_if_they_are_accepted(stopped):
    text = np.fromfile("data/text/train.bin", np.int32)
    write_tokens(Path("data/text/train.bin"), text[: len(text) // 2])
    assert_refuses("--resume", naming=["the data's sources"])
    assert call("--resume", "--accept_changed_data", "true").returncode == 0
    assert load_checkpoint(LATEST)["carried_state"]["position"].tolist() == [3 * BLOCK] * 4


# ---------------------------------------------------------------------------------- processes


def test_two_processes_equal_one_which_goes_on_from_their_checkpoint(place):
    changes = {"max_steps": 3, "schedule": "constant"}
    words = brief_flags(**{**CARRIED, **changes, "batch_size": 1})
    one = Trainer(carried_config(**changes))
    assert one.run() == 0
    want = load_checkpoint(LATEST)
    for parallel in ("ddp", "fsdp"):
        run_two_ranks(*words, "--parallel", parallel, "--checkpoint_path", f"{parallel}.pt")
        saved = load_checkpoint(f"{parallel}.pt")
        assert_same_states(saved["carried_state"], want["carried_state"], 1e-4)
        for name, t in want["model"].items():
            torch.testing.assert_close(saved["model"][name], t, atol=1e-5, rtol=0)
    longer = ["--max_steps", 5, "--resume"]
    refusal = ["a step has 2 rows, but", "the states of 4"]
    assert_refuses(*longer, "--checkpoint_path", "fsdp.pt", naming=refusal)
    assert call(*longer, "--checkpoint_path", "fsdp.pt", "--batch_size", 2).returncode == 0
    assert call(*longer).returncode == 0
    got, want = load_checkpoint("fsdp.pt"), load_checkpoint(LATEST)
    assert_same_states(got["carried_state"], want["carried_state"], 1e-3)


# ----------------------------------------------------------------------------------- refusals


def test_what_does_not_go_with_it_is_refused(place):
    words = brief_flags(**CARRIED, max_steps=1)
    assert_refuses(*words, "--teacher", "x", naming=["teacher: reads each block alone"])
    large = brief_flags(**{**CARRIED, "batch_size": 5000}, max_steps=1)
    assert_refuses(*large, naming=["batch_size: a step reads 10000 rows, but an epoch has"])
    talk = write_conversations(place, "talk", [([1, 2, 3, 4], [0, 0, 1, 1])] * 9, {})
    words += ["--train_data_path", talk]
    assert_refuses(*words, naming=[str(talk), "holds conversations", "--carry_state"])


def test_fine_tuning_carries_states_but_of_prefixes_and_pairs(place):
    config = carried_config(max_steps=3)
    tuner = FineTuner(config, wide(), AdapterConfig(method="lora"))
    assert tuner.run() == 0
    assert load_checkpoint(LATEST)["carried_state"]["position"].tolist() == [3 * BLOCK] * 4
    with pytest.raises(UserError, match="method: of prefix tuning"):
        FineTuner(config, wide(), AdapterConfig(method="prefix"))
    testv2.save_checkpoint("base.pt", {"model": wide().state_dict(), "config": config.to_dict()})
    words = ["--checkpoint", "base.pt", "--objective", "dpo", "--carry_state", "true"]
    assert_refused(run_main(peft.main, *words), "carry_state: has no meaning with --objective dpo")
