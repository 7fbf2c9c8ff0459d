"""Preferences: the data of pairs, DPO against TRL, SimPO against its formula, runs of both."""

import copy
import functools
import itertools
import math
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    FIRST_FORM,
    assert_compiled,
    assert_refused,
    close,
    files_below,
    flags,
    free_copy,
    run_main,
    run_two_ranks,
    stir,
    tiny_config,
    wide,
    write_conversations,
    write_tokens,
)
from torch.utils.data import default_collate

import peft
from hf_integration import TinyMambaHFModel, TinyMambaHFTokenizer
from peft import AdapterConfig, PreferenceTuner, ScoringModel
from testv2 import TinyMambaModel, load_model
from tinymamba.checkpoint import load_checkpoint, save_model
from tinymamba.cli import UserError
from tinymamba.preferences import Objective, PairDataset, flatten_pairs, score_rows
from tinymamba.tokenizer import SimpleTokenizer

PREFERENCES = {"kind": "preferences"}
METHODS = ("lora", "prefix", "state_offset", "full")


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> list:
    """Two conversations; the last token of each stands for the end of text, and does not count."""
    return [
        ([*prompt, *answer, 256], [*[0] * len(prompt), *[1] * len(answer), 0])
        for answer in (chosen, rejected)
    ]


def make_pairs(count: int, seed: int = 0) -> list:
    """Conversations whose answers are of two kinds: small bytes are chosen, large ones rejected."""
    random = np.random.default_rng(seed)

    def text(low: int, high: int, length: int) -> list[int]:
        return random.integers(low, high, length).tolist()

    pairs = []
    for _ in range(count):
        sizes = random.integers(2, 8, 2)
        prompt = text(1, 256, random.integers(3, 12))
        pairs += pair(prompt, text(1, 6, sizes[0]), text(250, 256, sizes[1]))
    return pairs


def write_pairs(folder: Path, side: str, conversations: list, **facts) -> Path:
    return write_conversations(folder, side, conversations, {**PREFERENCES, **facts})


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """A working folder with the checkpoint of a base, train.bin and val.bin."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "base.pt", wide(), wide().state_dict())
    write_pairs(tmp_path, "train", make_pairs(40))
    write_pairs(tmp_path, "val", make_pairs(25, seed=1))
    return tmp_path


SHORT = flags(
    checkpoint="base.pt", train_data="train.bin", val_data="val.bin", batch_size=4, block_size=32,
    generate_samples=False, log_interval=1, amp_dtype="float32",
)  # fmt: skip


def tune(*words, **values):
    """peft.py on pairs, in this process."""
    return run_main(peft.main, *SHORT, *flags(**values), *words)


# ---------------------------------------------------------------------------------- the loss


def batch_of(conversations: list, block_size: int = 32, folder: Path | None = None) -> list:
    """All pairs as one batch of rows."""
    data = PairDataset(write_pairs(folder, "batch", conversations), block_size)
    return flatten_pairs(default_collate([data.rows(i) for i in range(len(data))]), 64)


def slow_scores(model, conversations: list) -> torch.Tensor:
    """The log-probabilities of the answers (pairs, 2), one conversation after the other."""
    found = []
    for ids, mask in conversations:
        logits = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        found.append(sum(logits[i - 1, ids[i]] for i in range(len(ids)) if mask[i]))
    return torch.stack(found).view(-1, 2)


def scoring(model):
    """The model with scores in place of the mean loss."""
    model.cross_entropy = ScoringModel.cross_entropy.__get__(model)
    return model


def test_scores_are_those_of_each_conversation_alone(tmp_path):
    conversations = make_pairs(5)
    ids, targets, ends, numbers = batch_of(conversations, folder=tmp_path)
    model = scoring(copy.deepcopy(wide(double=True)))
    got = model(ids, targets, ends=ends).view(-1, 2)
    close(got, slow_scores(wide(double=True), conversations), 1e-10)
    assert numbers.tolist() == [0, 1, 2, 3, 4]
    model.LOSS_CHUNK = 7
    close(model(ids, targets, ends=ends).view(-1, 2), got, 1e-12)
    assert torch.equal(score_rows(torch.ones(2, 3, 8), torch.full((2, 3), -100), F.relu, 2),
                       torch.zeros(2))  # fmt: skip


def test_documents_that_end_within_a_conversation_do_not_erase_it(tmp_path):
    documents = {"document_mask": True, "eos_id": 5}
    conversations = pair([7, 5, 8, 9], [1, 2], [3])
    batch = batch_of(conversations, folder=tmp_path)
    model = scoring(copy.deepcopy(wide(double=True, **documents)))
    got = model(batch[0], batch[1], ends=batch[2]).view(-1, 2)
    close(got, slow_scores(wide(double=True), conversations), 1e-10)


def wide_copy(noise: float = 0.0):
    """A copy of wide() that may be trained, with noise in every weight."""
    model, random = free_copy(wide()), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p += noise * torch.randn(p.shape, generator=random)
    return model


def test_dpo_is_the_loss_of_trl_with_the_same_gradients(tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    conversations = make_pairs(4)
    policy, reference = TinyMambaHFModel.of(wide_copy(0.02)), TinyMambaHFModel.of(wide())
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], beta=0.3,
                     gradient_checkpointing=False)  # fmt: skip
    text = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    trainer = DPOTrainer(policy, reference, args, train_dataset=text,
                         processing_class=TinyMambaHFTokenizer.of(SimpleTokenizer()))  # fmt: skip
    examples = []
    for (chosen, mask), (rejected, _) in zip(conversations[::2], conversations[1::2], strict=True):
        prompt, answers = mask.index(1), {"chosen_ids": chosen, "rejected_ids": rejected}
        answers = {name: ids[prompt:-1] for name, ids in answers.items()}
        examples.append({"prompt_ids": chosen[:prompt], **answers})
    want = trainer.compute_loss(policy, trainer.data_collator(examples))
    want.backward()

    batch = batch_of(conversations, folder=tmp_path)
    ours, base = scoring(wide_copy(0.02)), scoring(wide_copy())
    objective = Objective("dpo", beta=0.3).validate()
    scores, frozen = (m(*batch[:2], ends=batch[2]).view(-1, 2) for m in (ours, base))
    loss = objective.losses(objective.rewards(scores, None, frozen.detach())).mean()
    loss.backward()
    assert abs(loss.item() - math.log(2)) > 0.01  # not where every model begins
    assert abs(loss.item() - want.item()) < 1e-5
    theirs = dict(policy.model.named_parameters())
    largest = max(p.grad.abs().max() for p in ours.parameters())
    for name, p in ours.named_parameters():
        close(p.grad, theirs[name].grad, 1e-5, scale=largest)


def test_simpo_is_its_formula():
    scores = torch.tensor([[-3.0, -8.0], [-20.0, -1.0]], dtype=torch.float64)
    lengths = torch.tensor([[2, 4], [10, 1]])
    objective = Objective("simpo", beta=2.0, gamma=0.5).validate()
    got = objective.losses(objective.rewards(scores, lengths, None))
    for loss, (chosen, rejected), (m, n) in zip(got, scores, lengths, strict=True):
        u = 2.0 / m.item() * chosen - 2.0 / n.item() * rejected - 0.5
        assert abs(loss + math.log(1 / (1 + math.exp(-u)))) < 1e-12


@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_gradients_are_those_of_finite_differences(name):
    objective = Objective(name).validate()
    targets = torch.tensor([[-100, 3, 1], [2, -100, -100], [-100, 0, -100], [4, 4, 0]])
    hidden, weight = torch.randn(4, 3, 2).double(), torch.randn(5, 2).double()
    lengths = (targets != -100).sum(-1).view(-1, 2)
    reference = torch.randn(2, 2).double()

    def loss(hidden, weight):
        scores = score_rows(hidden, targets, lambda h: h @ weight.mT, 2).view(-1, 2)
        return objective.losses(objective.rewards(scores, lengths, reference))

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"objective": "dpo", "beta": 0.0}, "beta: 0.0 is out of range"),
        ({"objective": "simpo", "gamma": -1.0}, "gamma"),
        ({"objective": "dpo", "gamma": 1.0}, "gamma: has no meaning with --objective dpo"),
        ({"beta": 0.1}, "beta: has no meaning with --objective likelihood"),
        ({"objective": "rlhf"}, "objective: rlhf is not a choice"),
    ],
)
def test_bad_objectives_are_rejected(settings, words):
    with pytest.raises(UserError, match=words):
        Objective(**settings).validate()


# ---------------------------------------------------------------------------------- the data


def test_rows_hold_the_conversations_and_the_targets_that_count(tmp_path):
    data = PairDataset(write_pairs(tmp_path, "x", pair([7, 8, 9], [1, 2], [3])), 8)
    inputs, targets, ends, number = data[0]
    assert inputs[:, :6].tolist() == [[7, 8, 9, 1, 2, 256], [7, 8, 9, 3, 256, 0]]
    assert targets.tolist() == [[-100, -100, 1, 2] + [-100] * 4, [-100, -100, 3] + [-100] * 5]
    assert ends.tolist() == [[False] * 5 + [True] * 3, [False] * 4 + [True] * 4]
    assert number == 0 and len(data) == 1


def test_every_pair_is_read_once_in_an_epoch_from_several_files(tmp_path):
    files = [write_pairs(tmp_path, name, make_pairs(n, n)) for name, n in (("x", 5), ("y", 8))]
    data = PairDataset(files, 32, shuffle=True)
    numbers = [data[i][-1] for i in range(26)]
    assert sorted(numbers[:13]) == sorted(numbers[13:]) == list(range(13))
    assert numbers[:13] != numbers[13:]
    for i in (3, 17):
        again = PairDataset(files, 32, shuffle=True)[i]
        assert torch.equal(torch.stack(again[:2]), torch.stack(data.rows(int(numbers[i]))[:2]))


def test_a_long_prompt_loses_its_beginning_in_both_rows(tmp_path):
    path = write_pairs(
        tmp_path, "x", [*pair(list(range(10, 20)), [1, 2], [3]), *pair([9], [1], [2])]
    )
    data = PairDataset(path, 8)
    inputs, targets, _, _ = data.rows(0)
    assert list(data.describe())[-1].endswith(
        "1 are longer than 8 and lose the beginning of their prompt"
    )
    assert inputs.tolist() == [[*range(15, 20), 1, 2, 256], [*range(15, 20), 3, 256, 0]]
    assert targets[0].tolist() == [-100] * 4 + [1, 2, -100, -100]
    assert PairDataset(path, 4).files[0].cut == 1
    with pytest.raises(UserError, match="answer of pair 0 is longer than block_size=3.*size 4"):
        PairDataset(path, 3)


def drop_index(folder):
    (folder / "x.index.bin").unlink()


def shorten_mask(folder):
    path = folder / "x.mask.bin"
    path.write_bytes(path.read_bytes()[:-1])


def shift_index(folder):
    index = np.fromfile(folder / "x.index.bin", np.int64)
    (index[:-1] + [0, *[1] * (len(index) - 2)]).tofile(folder / "x.index.bin")


TWO = pair([7, 8], [1, 2], [3, 4])


@pytest.mark.parametrize(
    "conversations, facts, damage, words",
    [
        (TWO, {"kind": "chat"}, None, "x.bin: holds chat, not preferences"),
        (TWO[:1], {}, None, "x.bin: 1 conversations are not pairs"),
        (TWO, {}, drop_index, "x.index.bin: no such file"),
        (TWO, {}, shorten_mask, "x.mask.bin: has bits for 8 tokens"),
        (TWO, {}, shift_index, "x.index.bin: does not divide the 10 tokens"),
        (pair([7], [1], [1]), {}, None, "pair 0: both answers are equal"),
        (pair([7], [1], []), {}, None, "pair 0: an answer has no token that counts"),
        ([TWO[0], pair([7, 9], [1], [3])[1]], {}, None, "pair 0: the prompts differ"),
        ([TWO[0], pair([7], [1], [3])[1]], {}, None, "pair 0: the prompts differ"),
        (pair([], [1], [2]), {}, None, "pair 0: the prompts differ"),
    ],
)
def test_files_that_are_no_pairs_are_rejected(tmp_path, conversations, facts, damage, words):
    path = write_pairs(tmp_path, "x", conversations, **facts)
    if damage:
        damage(tmp_path)
    with pytest.raises(UserError, match=words):
        PairDataset(path, 8)[0]


# ---------------------------------------------------------------------------------- the runs


def tuner(method="lora", objective="dpo", **settings):
    """A run in the working folder, before its first step."""
    base = load_model("base.pt")
    adapter = AdapterConfig(method).validate()
    values = {"train_data_path": "train.bin", "val_data_path": "val.bin", "batch_size": 4,
              "generate_samples": False, "amp_dtype": torch.float32, "block_size": 32,
              "max_steps": 2, "state_noise": 0.0, "device": "cpu", **settings}  # fmt: skip
    config = peft.settings(peft.Options(), method, values, base)
    return PreferenceTuner(Objective(objective).validate(), config, base, adapter)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_begins_at_its_reference_which_the_pass_leaves_alone(pairs, method):
    run = tuner(method)
    run.keep_scores()
    batch = next(run.batches(run.loader(run.train_data, 0, 4)))
    before = {n: t.clone() for n, t in run.model.state_dict().items()}
    random, active = torch.get_rng_state(), getattr(run.model, "adapter_state", None)
    reference = run.score_reference(batch)
    assert torch.equal(random, torch.get_rng_state()) and run.model.training
    assert active is None or active.active == "default"
    assert all(torch.equal(t, before[n]) for n, t in run.model.state_dict().items())
    assert all(p.grad is None for p in run.model.parameters()) and not reference.requires_grad
    close(reference, run.score(run.model, batch).detach(), 1e-5)
    assert abs(run.micro_loss(batch).item() - math.log(2)) < 1e-4


@pytest.mark.parametrize("method", METHODS[:3])
def test_scores_with_an_adapter_are_those_of_each_conversation_alone(pairs, method):
    run = tuner(method)
    stir(run.model, "default")
    batch = next(run.batches(run.loader(run.train_data, 0, 4)))
    got = run.score(run.model.eval(), batch).detach().double()
    conversations = [make_pairs(40)[2 * number + i] for number in batch[-1] for i in (0, 1)]
    close(got, slow_scores(run.model, conversations), 1e-5)


def test_the_reference_is_the_base_whatever_the_adapter_has_learned(pairs):
    run = tuner(use_compile=False)
    batch = next(run.batches(run.loader(run.train_data, 0, 4)))
    want = run.score_reference(batch)
    stir(run.model, "default")
    assert torch.equal(run.score_reference(batch), want)
    assert (run.score(run.model, batch) - want).abs().max() > 0.1


def test_the_tokens_of_both_rows_are_counted_without_columns_that_are_left_out(pairs, monkeypatch):
    settings = {"gradient_accumulation_steps": 2, "block_size": 96, "enable_validation": False}
    run = tuner(**settings)
    read = [ids.numel() for ids, *_ in run.batches(run.loader(run.train_data, 0, 16))]
    assert read == [2 * 4 * 64] * 4, "of 96 columns 64 are left"
    said = {}
    monkeypatch.setattr(run.log, "record", lambda values, step: said.update(values))
    batches = run.train_batches(2)
    for _ in range(2):
        run.train_step(batches)
    run.report(0.7, 1.0, seconds_per_step=0.5)
    assert run.tokens == run.state()["tokens_seen"] == sum(read)
    assert said["train/tokens_per_second"] == sum(read) / 2 / 0.5
    run.close()


def test_a_compiled_run_has_one_graph_and_a_reference_without_it(pairs, monkeypatch, capsys):
    base = TinyMambaModel(tiny_config(n_layer=1, **FIRST_FORM))
    save_model(pairs / "base.pt", base, base.state_dict())
    eager = tuner()
    assert eager.run() == 0
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    run = tuner(use_compile=True, max_steps=2)
    assert run.run() == 0
    assert_compiled(capsys.readouterr().out)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    got, want = (each.progress["history"]["val"] for each in (run, eager))
    assert got == [[step, pytest.approx(loss, abs=1e-4)] for step, loss in want]


def test_accumulated_gradients_are_those_of_one_batch(pairs):
    grads = []
    for size, count in ((8, 1), (2, 4)):
        run = tuner(batch_size=size, gradient_accumulation_steps=count)
        stir(run.model, "default")
        loss = run.accumulate(list(itertools.islice(run.train_batches(1), count)))
        named = run.model.named_parameters()
        grads.append({"loss": loss, **{n: p.grad for n, p in named if p.grad is not None}})
    for name, grad in grads[0].items():
        close(grads[1][name], grad, 1e-5)


@pytest.mark.parametrize(
    "objective, method", [("dpo", "lora"), ("dpo", "full"), ("simpo", "prefix")]
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(pairs, objective, method):
    words = {"objective": objective, "method": method, "checkpoint_interval": 2, "warmup_steps": 0,
             "min_lr_ratio": 1, "lr": 1e-3, "validation_interval": 3}  # fmt: skip
    assert tune(output_dir="whole", steps=6, **words).returncode == 0
    done = tune(output_dir="cut", steps=3, **words)
    assert done.returncode == 0, done.stderr
    done = tune("--resume", output_dir="cut", method=method, steps=6)
    assert done.returncode == 0, done.stderr
    name = peft.checkpoint_name(method)
    whole, cut = (load_checkpoint(f"{folder}/{name}") for folder in ("whole", "cut"))
    assert whole["global_step"] == cut["global_step"] == 6
    assert all(torch.equal(t, cut["model"][n]) for n, t in whole["model"].items())
    assert whole["progress"]["history"] == cut["progress"]["history"]


@pytest.mark.parametrize("objective, method", [("dpo", "lora"), ("simpo", "full")])
def test_what_is_preferred_is_learned_and_the_base_stays(pairs, objective, method):
    base = (pairs / "base.pt").read_bytes()
    done = tune(output_dir="out", objective=objective, method=method, steps=30, lr=8e-3)
    assert done.returncode == 0, done.stderr
    [accuracy] = re.findall(r"val: reward accuracy (\S+),", done.stdout)
    assert float(accuracy) > 0.9
    assert (pairs / "base.pt").read_bytes() == base


def test_validation_is_over_all_pairs_one_by_one(pairs):
    run, objective = tuner(), Objective("dpo").validate()
    stir(run.model, "default")
    trained = slow_scores(run.model.eval(), make_pairs(25, seed=1))
    rewards = objective.rewards(trained, None, slow_scores(wide(), make_pairs(25, seed=1)))
    said = []
    run.log.say = said.append
    assert abs(run.validate() - objective.losses(rewards).mean()) < 1e-5
    margins = rewards[:, 0] - rewards[:, 1]
    right, mean = (margins > 0).double().mean().item(), margins.mean().item()
    assert said[-1] == f"val: reward accuracy {right:.3f}, margin {mean:.4f}"


def test_columns_in_which_nothing_counts_are_left_out(tmp_path):
    data = PairDataset(write_pairs(tmp_path, "x", make_pairs(4)), 512)
    batch = default_collate([data[i] for i in range(4)])
    ids, targets, ends, numbers = flatten_pairs(batch, 64)
    assert ids.shape == targets.shape == ends.shape == (8, 64) and len(numbers) == 4
    assert (targets != -100).sum() == (batch[1] != -100).sum()
    assert torch.equal(ids, batch[0].flatten(0, 1)[:, :64])


def test_two_processes_train_as_one(pairs):
    words = [*SHORT, *flags(method="full", objective="dpo", steps=2, lr=1e-3, validation_steps=0)]
    run_two_ranks(*words, "--output_dir", "two", "--batch_size", 2, script="peft.py")
    assert run_main(peft.main, *words, "--output_dir", "one").returncode == 0
    two, one = (load_checkpoint(f"{n}/tinymamba_model_latest.pt") for n in ("two", "one"))
    close(two["references"]["train"]["scores"], one["references"]["train"]["scores"], 1e-5)
    for name, t in one["model"].items():
        close(two["model"][name], t, 1e-3)
    for (_, mine), (_, other) in zip(
        *(r["progress"]["history"]["val"] for r in (one, two)), strict=True
    ):
        assert abs(mine - other) < 1e-5


@pytest.mark.parametrize(
    "words, fragments",
    [
        (["--objective", "dpo", "--beta", "0"], ["beta", "0"]),
        (["--objective", "dpo", "--gamma", "1"], ["gamma", "dpo"]),
        (["--beta", "0.2"], ["beta", "likelihood"]),
        (["--objective", "ppo"], ["--objective"]),
        (["--objective", "dpo", "--train_data", "text.bin"], ["text.bin", "holds text"]),
        (["--objective", "simpo", "--train_data", "chat.bin"], ["chat.bin", "chat"]),
        (["--objective", "dpo", "--train_data", "odd.bin"], ["odd.bin", "1 conversations"]),
        (["--objective", "dpo", "--block_size", "4"], ["--block_size", "longer"]),
        (["--objective", "dpo", "--train_data", "nowhere.bin"], ["nowhere.bin"]),
    ],
)
def test_bad_commands_are_one_line_and_change_nothing(pairs, words, fragments):
    write_tokens(pairs / "text.bin", "plain text " * 50)
    write_conversations(pairs, "chat", make_pairs(4), {})
    write_pairs(pairs, "odd", make_pairs(1)[:1])
    before = files_below(pairs)
    assert_refused(tune("--output_dir", "out", *words), *fragments)
    assert files_below(pairs) == before


def test_a_run_keeps_its_objective_and_its_base(pairs):
    words = {"output_dir": "out", "method": "full", "steps": 1}
    assert tune(objective="dpo", **words).returncode == 0
    again = {**words, "steps": 2}
    assert_refused(tune("--resume", objective="dpo", beta=0.2, **again), "beta: changed since")
    assert_refused(tune("--resume", objective="simpo", **again), "objective", "changed since")
    refused = tune("--resume", objective="likelihood", **again)
    assert_refused(refused, "train.bin", "--objective dpo")
    save_model(pairs / "base.pt", wide_copy(0.1), wide_copy(0.1).state_dict())
    assert_refused(tune("--resume", **again), "base: changed since")
    save_model(pairs / "base.pt", wide(), wide().state_dict())
    write_pairs(pairs, "train", make_pairs(30, 5))
    assert_refused(tune("--resume", **again), "--accept_changed_data")
    assert tune("--resume", "--accept_changed_data", **again).returncode == 0
    kept = load_checkpoint("out/tinymamba_model_latest.pt")["references"]["train"]["scores"]
    close(kept.double(), slow_scores(wide(), make_pairs(30, 5)), 1e-5)


def test_a_run_stopped_while_it_reads_the_base_goes_on(pairs, monkeypatch):
    words = {"method": "full", "steps": 2, "objective": "dpo", "validation_interval": 5}
    score, stop = PreferenceTuner.score, lambda: signal.raise_signal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(PreferenceTuner, "score", lambda *given: stop() or score(*given))
        assert tune(output_dir="cut", **words).returncode == 130
    name = "tinymamba_model_latest.pt"
    stopped = load_checkpoint(f"cut/{name}")
    assert stopped["global_step"] == 0 and "references" not in stopped
    done = tune("--resume", output_dir="cut", **words)
    assert done.returncode == 0, done.stderr
    assert tune(output_dir="whole", **words).returncode == 0
    whole, cut = (load_checkpoint(f"{folder}/{name}") for folder in ("whole", "cut"))
    assert all(torch.equal(t, cut["model"][n]) for n, t in whole["model"].items())
