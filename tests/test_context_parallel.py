"""Texts in pieces over several processes: as one process reads them, with messages of one size."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import (
    DOCUMENTS,
    EOS,
    FIRST_FORM,
    LATEST,
    POSIX,
    assert_refused,
    assert_refuses,
    brief_flags,
    call,
    close,
    fork_group,
    free_copy,
    run_main,
    some_ids,
    wide,
    write_conversations,
    write_tokens,
)
from torch.nn.parallel import DistributedDataParallel

import peft
import testv2
from testv2 import selective_scan
from tinymamba.checkpoint import load_checkpoint, save_checkpoint
from tinymamba.cli import run_cli
from tinymamba.context_parallel import Pieces, PiecesBefore
from tinymamba.tokenizer import byte_tokenizer

pytestmark = POSIX

LENGTH = 80  # of a text: 2 pieces of 40 tokens, or 4 of 20, which are no whole chunks
CASES = {
    "one text": {},
    "documents": {},
    "eos": DOCUMENTS,
    "padding": {"n_layer": 1},
    "again": {"checkpoint_activations": True},
    "no memory": {"memory": False, "gate": "top_k"},
    "first form": {**FIRST_FORM, "low_rank": 4, "gate": "sparsemax"},
    "keys only": {"qv_conv": False, "memory_products": 0, "memory_every": 1, "d_conv": 1},
    "stepwise": {"scan": "sequential", "n_layer": 1},
    "wide window": {"window_size": LENGTH // 2 + 1},  # of which all but one are the piece before
    "narrow window": {"window_size": 1},
}
WITH_DOCUMENTS = ("documents", "again", "stepwise", "wide window")


def texts(case: str, length: int = LENGTH) -> list:
    """ids, targets (5, l) and where documents end, or None."""
    ids = some_ids(5, length + 1)
    ids, targets, ends = ids[:, :-1].clone(), ids[:, 1:].clone(), None
    places = [[39], [30, 36], [42, 79], [], [3, 19, 20, 41, 59]]  # 39: the next begins at the cut
    marks = torch.zeros_like(ids, dtype=torch.bool)
    for row, columns in enumerate(places):
        marks[row, columns] = True
    if case == "eos":
        ids[marks] = EOS
    if case in WITH_DOCUMENTS:
        ends = marks
    if case == "padding":
        for row, last in enumerate([10, 30, 40, 50, length]):
            targets[row, last:] = -100
    return [ids, targets, ends]


def model_of(case: str):
    return free_copy(wide(double=True, **CASES[case])).train()


def learn(model, case: str, length: int = LENGTH, before=None) -> tuple:
    """This process's part of the mean loss of all targets, its gradients, and its logits."""
    parts = texts(case, length)
    total = (parts[1] != -100).sum()
    if before is not None:
        parts = [t if t is None else t.chunk(before.size, 1)[before.rank] for t in parts]
    ids, targets, ends = parts
    loss = model(ids, targets, ends=ends, before=before) * (targets != -100).sum() / total
    loss.backward()
    with torch.no_grad():
        logits = model(ids, ends=ends, before=before)
    named = model.named_parameters()
    gradients = {name.removeprefix("module."): p.grad for name, p in named}
    return loss.detach(), gradients, logits


def learn_in_pieces(case: str, before: PiecesBefore, wrap: Callable = lambda model: model) -> dict:
    loss, gradients, logits = learn(wrap(model_of(case)), case, before=before)
    for t in (loss, *gradients.values()):
        dist.all_reduce(t)
    return {"loss": loss, "gradients": gradients, "logits": logits}


def learn_all(size: int, cases: list[str], rank: int) -> dict:
    """Each case, by processes that form one group."""
    dist.init_process_group("gloo", rank=rank, world_size=size)
    before = PiecesBefore()
    found = {case: learn_in_pieces(case, before) for case in cases}
    dist.destroy_process_group()
    return found


def learn_more(rank: int) -> dict:
    """Each case by two processes, the bytes that texts of two lengths take, and more."""
    dist.init_process_group("gloo", rank=rank, world_size=2)
    before, sent = PiecesBefore(), []
    found = {case: learn_in_pieces(case, before) for case in CASES}
    for length in (LENGTH, 3 * LENGTH):
        begin = before.sent
        learn(model_of("documents"), "documents", length, before)
        sent.append(before.sent - begin)
    found["sent"] = sent
    found["bfloat16"] = in_bfloat16(before)
    found["recurrences"] = [run_recurrences(before, autocast) for autocast in (False, True)]
    found["ddp"] = learn_in_pieces("documents", before, DistributedDataParallel)
    with pytest.raises(ValueError, match="neither a state nor a mask"):
        model_of("padding")(*texts("padding")[:2], torch.ones(5, LENGTH), before=before)
    with pytest.raises(ValueError, match="2 tokens is shorter than 3"):
        before.last_inputs(torch.ones(1, 2, 8), 3)
    dist.destroy_process_group()
    return found


def in_bfloat16(before: PiecesBefore | None) -> dict[str, torch.Tensor]:
    """The gradients under autocast."""
    model = free_copy(wide()).train()
    with torch.autocast("cpu", torch.bfloat16):
        gradients = learn(model, "documents", before=before)[1]
    for t in gradients.values() if before else ():
        dist.all_reduce(t)
    return gradients


def run_recurrences(before: PiecesBefore, autocast: bool) -> list[torch.Tensor]:
    """What SSM and delta rule find in float32, and all gradients."""
    random = torch.Generator().manual_seed(before.rank)
    x, B, C = (torch.randn(1, 40, *shape, generator=random) for shape in ((2, 8), (4,), (4,)))
    dt, A, D = torch.rand(1, 40, 2, generator=random), torch.tensor([-0.1, -0.2]), torch.ones(2)
    keys = F.normalize(torch.randn(2, 40, 4, generator=random), dim=-1)
    beta, fade = torch.full((2, 40), 0.5), torch.full((2, 40), -0.01)
    given = [t.requires_grad_() for t in (x, dt, A, B, C, D, keys, beta, fade)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, _ = before.scan(selective_scan, *given[:6], None, None, "chunked", 16)
        values = x[0].transpose(0, 1)  # (2, l, 8)
        z, _ = before.delta_rule(values, beta, fade, keys, keys, x.new_zeros(2, 8, 4), 16, False)
        loss = y.square().sum() + z.square().sum()
    return [y, z, *torch.autograd.grad(loss, given)]


@pytest.fixture(scope="module")
def alone() -> dict:
    """What one process finds; it comes before the fork, so that all is imported there."""
    found = {case: learn(model_of(case), case) for case in CASES}
    found["bfloat16"] = in_bfloat16(None)
    return found


@pytest.fixture(scope="module")
def two(alone, tmp_path_factory) -> list[dict]:
    return fork_group(2, learn_more, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(alone, tmp_path_factory) -> list[dict]:
    work = functools.partial(learn_all, 4, ["one text", "documents"])
    return fork_group(4, work, tmp_path_factory.mktemp("four"))


def check(found: list[dict], alone: dict, case: str, name: str | None = None) -> None:
    loss, gradients, logits = alone[case]
    found = [each[name or case] for each in found]
    close(torch.cat([each["logits"] for each in found], dim=1), logits, 1e-12)
    for each in found:
        close(each["loss"], loss, 1e-12)
        for key, gradient in gradients.items():
            close(each["gradients"][key], gradient, 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_from_their_pieces_as_one_does(two, alone, case):
    check(two, alone, case)


@pytest.mark.parametrize("case", ["one text", "documents"])
def test_four_processes_learn_from_their_pieces_as_one_does(four, alone, case):
    """From three on, transitions count: with two, the first piece's state is all that comes."""
    check(four, alone, case)


@pytest.mark.slow
def test_four_processes_learn_every_case(alone, tmp_path):
    cases = [case for case in CASES if case != "wide window"]
    found = fork_group(4, functools.partial(learn_all, 4, cases), tmp_path)
    for case in cases:
        check(found, alone, case)


def test_gradients_of_ddp_are_those_of_one_process(two, alone):
    check(two, alone, "documents", "ddp")


def test_autocast_rounds_no_more_than_in_one_process(two, alone):
    exact = alone["documents"][1]

    def errors(found: dict) -> torch.Tensor:
        """Of each parameter's gradient: those of angles nearly cancel, so a sum is their error."""
        return torch.stack([(found[name] - t).norm() for name, t in exact.items()])

    for found in two:
        assert 0.8 < (errors(found["bfloat16"]) / errors(alone["bfloat16"])).median() < 1.15


def test_autocast_does_not_round_states(two):
    for found in two:
        for exact, same in zip(*found["recurrences"], strict=True):
            assert torch.equal(exact, same)


def test_messages_are_as_large_for_any_length(two):
    for found in two:
        short, long = found["sent"]
        assert short == long > 0


# ------------------------------------------------------------------------------------- runs

STEPS = {
    "enable_validation": "true",
    "validation_interval": 2,
    "validation_steps": 3,
    "gradient_accumulation_steps": 2,
}


def train(*words) -> dict:
    """testv2.py in a forked process: its exit code."""
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: testv2.main([str(word) for word in words]))
    return {"code": ended.value.code}


def train_in_pieces(size: int, *words) -> None:
    found = fork_group(size, lambda _: train("--context_parallel", 2, *words), Path.cwd())
    assert [each["code"] for each in found] == [0] * size


def losses() -> list[list[float]]:
    """The losses of all steps, and of all validations, in the last checkpoint."""
    history = load_checkpoint(LATEST)["progress"]["history"]
    return [[loss for _, loss in history[side]] for side in ("train", "val")]


def assert_as_before(expected: list[list[float]]) -> None:
    for found, side in zip(losses(), expected, strict=True):
        assert found == pytest.approx(side, abs=1e-5)


def test_runs_go_on_with_pieces_and_without(place, capfd):
    byte_tokenizer().save("data/text/tokenizer.json")
    words = [*brief_flags(**STEPS), "--generate_samples", "true", "--generation_length", 3]
    call(*words, "--max_steps", 2)
    call("--resume", "--max_steps", 4)
    call("--resume", "--max_steps", 6)
    expected = losses()
    assert [len(side) for side in expected] == [6, 3]
    call(*words, "--max_steps", 2)
    capfd.readouterr()
    train_in_pieces(2, "--resume", "--max_steps", 4, "--use_compile", "true")
    said = capfd.readouterr().out
    assert said.count("torch.compile is off") == 1 and said.count("sample at step 4") == 1
    assert "2 processes share each text" in said and "a step is 256 tokens" in said
    call("--resume", "--max_steps", 6, "--context_parallel", 1, "--use_compile", "false")
    assert_as_before(expected)


def test_sharded_parameters_and_several_groups(place):
    """In the validation, the second group of two has nothing left to read while the first has."""
    import torch.distributed.fsdp  # noqa: F401 once, and not in each process

    ids = np.fromfile("data/text/val.bin", np.int32)
    write_tokens(Path("data/text/val.bin"), ids[: 5 * 32 + 1])
    call(*brief_flags(**STEPS), "--max_steps", 2)
    expected = losses()
    words = [*brief_flags(**{**STEPS, "batch_size": 2}), "--parallel", "fsdp"]
    train_in_pieces(4, *words, "--checkpoint_activations", "--max_steps", 2)
    assert_as_before(expected)


def test_conversations_that_cross_a_cut(place):
    random, folder = np.random.default_rng(0), Path("data/text")
    for side in ("train", "val"):
        sizes = random.integers(3, 30, 60)
        said = [(random.integers(1, 257, n), random.random(n) < 0.3) for n in sizes]
        write_conversations(folder, side, said, {})
    call(*brief_flags(**STEPS), "--max_steps", 2)
    expected = losses()
    train_in_pieces(2, *brief_flags(**STEPS), "--max_steps", 2)
    assert_as_before(expected)


def test_noise_is_each_process_s_own(place, monkeypatch):
    noisy, seen = testv2.MambaSSM.noisy, []

    def spy(self, x):
        seen.append(noisy(self, x) - x)
        return x + seen[-1]

    def work(_: int) -> dict:
        words = brief_flags(state_noise=0.1, validation_interval=1, max_steps=1)
        assert train("--context_parallel", 2, *words) == {"code": 0}
        return {"noise": seen[0]}

    monkeypatch.setattr(testv2.MambaSSM, "noisy", spy)
    first, second = (found["noise"] for found in fork_group(2, work, Path.cwd()))
    assert first.std() > 0.05 and not torch.equal(first, second)


def test_every_part_of_a_sample_is_cut():
    sample = torch.arange(8), torch.randn(8, 3)
    pieces = [Pieces([sample], number, 4)[0] for number in range(4)]
    for part, cut in zip(sample, zip(*pieces, strict=True), strict=True):
        assert [len(t) for t in cut] == [2] * 4 and torch.equal(torch.cat(cut), part)


@pytest.mark.parametrize(
    "changes, naming",
    [
        ({}, ("does not divide the number of processes, 1", "torchrun --nproc_per_node")),
        ({"block_size": 33}, ("2 pieces of block_size=33", "make it a divisor")),
        ({"window_size": 18}, ("pieces of 16 tokens", "window_size=18", "block_size to 34")),
        ({"d_conv": 18}, ("pieces of 16 tokens", "d_conv=18", "block_size to 34")),
        ({"context_parallel": 0}, ("context_parallel", "at least 1")),
    ],
)
def test_what_cannot_be_cut_is_refused(place, changes, naming):
    assert_refuses(*brief_flags(**{"context_parallel": 2, **changes}), naming=naming)


def test_a_teacher_of_whole_texts_is_refused(place):
    words = brief_flags(context_parallel=2, teacher="big.pt")
    assert_refuses(*words, naming=("teacher: reads whole texts", "data/prepare.py"))


@pytest.mark.parametrize("name", ["context_parallel", "parallel", "shard_group"])
def test_fine_tuning_has_no_such_flag(place, name):
    assert_refused(run_main(peft.main, f"--{name}", 2), f"--{name}: unknown flag")


def test_fine_tuning_goes_on_from_a_run_of_shards_and_pieces_without_either(place):
    call(*brief_flags(max_steps=1))
    saved = load_checkpoint(LATEST)
    saved["config"] |= {"parallel": "fsdp", "context_parallel": 2}
    save_checkpoint("base.pt", saved)
    words = ["--checkpoint", "base.pt", "--method", "full", "--resume_from", "base.pt"]
    done = run_main(peft.main, *words, "--output_dir", "tuned", "--max_steps", 2)
    assert done.returncode == 0, done.stderr
    config = load_checkpoint(Path("tuned") / LATEST)["config"]
    assert (config["parallel"], config["context_parallel"]) == ("ddp", 1)
