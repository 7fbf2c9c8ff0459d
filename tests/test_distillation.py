"""tinymamba/distillation.py: losses against plain formulas, teachers, and stored lessons."""

import itertools
import json
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    LATEST,
    after_step,
    assert_refused,
    assert_refuses,
    brief_config,
    brief_flags,
    close,
    go_on,
    run_main,
    some_ids,
    tiny_config,
    wide,
    write_conversations,
    write_tokens,
)

from data import prepare
from testv2 import TinyMambaModel, Trainer
from tinymamba.checkpoint import load_checkpoint, save_model
from tinymamba.cli import UserError
from tinymamba.distillation import (
    Lesson,
    StoredLessons,
    Teacher,
    divergence,
    lesson_loss,
    write_lessons,
)
from tinymamba.token_file import TokenFile

V = 11


def logits_of(rows, seed, dtype=torch.float64):
    return torch.randn(*rows, V, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes, **heads))


def test_the_divergence_is_that_of_the_definition():
    mine, theirs = logits_of((5,), 0), logits_of((5,), 1)
    p, q = (theirs / 2).softmax(-1), (mine / 2).softmax(-1)
    want = (p * (p / q).log()).sum(-1)
    close(divergence(mine, p.log(), None, 2.0), want, 1e-12)
    everything = p.log().topk(V)
    close(divergence(mine, *everything, 2.0), want, 1e-6)


@pytest.mark.parametrize("k", [1, 4])
def test_ids_that_a_teacher_does_not_name_are_one_event(k):
    mine, theirs = logits_of((5,), 0), logits_of((5,), 1)
    best = theirs.log_softmax(-1).topk(k)
    q = mine.softmax(-1).gather(-1, best.indices)
    p, q = (torch.cat((t, 1 - t.sum(-1, keepdim=True)), -1) for t in (best.values.exp(), q))
    close(divergence(mine, *best, 1.0), (p * (p / q).log()).sum(-1), 1e-12)


def test_a_student_that_expects_the_same_has_no_divergence_and_no_slope():
    theirs = logits_of((5,), 1)
    mine = theirs.clone().requires_grad_()
    for k in (V, 3):
        best = (theirs / 2).log_softmax(-1).topk(k)
        lost = divergence(mine, *best, 2.0).sum()
        assert abs(lost) < 1e-6
        [slope] = torch.autograd.grad(lost, mine)
        assert slope.abs().max() < 1e-6


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("k", [None, 4])
def test_the_loss_and_its_gradients_are_those_of_the_formula_in_any_chunks(chunk, k):
    torch.manual_seed(0)
    head = torch.nn.Linear(6, V).double()
    hidden = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, (2, 5))
    targets[0, :2] = targets[1, -1] = -100
    expected = (logits_of((2, 5), 1) / 2).log_softmax(-1)
    best = expected.topk(k) if k else (expected, None)
    got = lesson_loss(head, hidden, targets, Lesson(*best, 0.3, 2.0), chunk)
    logits = head(hidden)
    soft = divergence(
        logits.flatten(0, 1), *(t if t is None else t.flatten(0, 1) for t in best), 2.0
    )
    soft = soft[targets.flatten() != -100].mean()
    want = 0.7 * F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + 0.3 * 4 * soft
    close(got, want, 1e-12)
    inputs = [hidden, *head.parameters()]
    for one, two in zip(*(torch.autograd.grad(t, inputs) for t in (got, want)), strict=True):
        close(one, two, 1e-10)


def test_a_lesson_without_targets_is_zero_and_not_nan():
    head = torch.nn.Linear(6, V)
    lesson = Lesson(logits_of((1, 4), 0).log_softmax(-1), None, 0.5, 1.0)
    hidden, nothing = torch.randn(1, 4, 6, requires_grad=True), torch.full((1, 4), -100)
    loss = lesson_loss(head, hidden, nothing, lesson, 3)
    loss.backward()
    assert loss == 0 and not hidden.grad.any()


@pytest.mark.parametrize("make", [tiny_llama, wide], ids=["transformers", "tinymamba"])
def test_a_teacher_reads_each_of_the_texts_in_a_row_alone(make):
    teacher, ids = Teacher(make(), 257, 0.5, 2.0), some_ids(2, 12)
    ends = torch.zeros(2, 12, dtype=torch.bool)
    ends[0, 4] = ends[0, 5] = ends[1, -1] = True
    got = teacher.lesson(ids, ends).logprobs
    assert got.shape == (2, 12, 257)
    close(got.exp().sum(-1), torch.ones(2, 12), 1e-5)
    for row, begin, end in ((0, 0, 5), (0, 5, 6), (0, 6, 12), (1, 0, 12)):
        close(got[row, begin:end], teacher.lesson(ids[row : row + 1, begin:end]).logprobs[0], 1e-4)
    assert not any(p.requires_grad for p in teacher.model.parameters())


@pytest.fixture
def stored(tmp_path):
    """A file of 70 tokens, its teacher, and the lessons in blocks of 16."""
    source = TokenFile(write_tokens(tmp_path / "train.bin", some_ids(1, 70)[0].tolist()))
    teacher = Teacher(tiny_llama(), 257, 0.5, 2.0)
    return source, teacher, write_lessons(source, teacher, 16, 8, {"teacher": "llama"})


def test_stored_lessons_are_those_of_the_teacher_on_each_block(stored):
    source, teacher, path = stored
    lessons = StoredLessons(path, source, 16)
    assert lessons.temperature == 2.0
    for block in range(4):
        begin, end = 16 * block, 16 * block + 16
        ids, logprobs = lessons.read(begin, end)
        tokens = torch.from_numpy(source.read(begin, end).astype(np.int64))
        want = teacher.lesson(tokens[None]).logprobs[0].topk(8)
        close(logprobs, want.values, 2e-3)
        assert (ids == want.indices).float().mean() > 0.95  # nearly equal ones may change places
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "train.bin", "train.teacher.bin", "train.teacher.json",
    ]  # fmt: skip


def test_lessons_on_other_data_or_blocks_are_refused(stored, tmp_path):
    source, _, path = stored
    with pytest.raises(UserError, match=r"made in blocks of 16 tokens; pass --block_size 16"):
        StoredLessons(path, source, 8)
    other = TokenFile(write_tokens(tmp_path / "other.bin", [5] * 70))
    with pytest.raises(UserError, match=r"made from other tokens than .*other\.bin"):
        StoredLessons(path, other, 16)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="should have 3072 bytes"):
        StoredLessons(path, source, 16)
    for damage in ("[]", "{", json.dumps({"top_k": "8"})):
        path.with_suffix(".json").write_text(damage)
        with pytest.raises(UserError, match="does not describe stored lessons"):
            StoredLessons(path, source, 16)
    path.unlink()
    with pytest.raises(UserError, match="no such file; make it with"):
        StoredLessons(path, source, 16)


def test_an_interrupted_pass_leaves_the_old_lessons_or_none(stored, monkeypatch):
    source, teacher, path = stored
    before = path.read_bytes()
    monkeypatch.setattr(teacher, "lesson", lambda ids: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_lessons(source, teacher, 16, 8, {})
    assert path.read_bytes() == before and not list(path.parent.glob("*.part"))


# ------------------------------------------------------------------------------------ training


@pytest.fixture
def teacher_path(place):
    """A model with the vocabulary of the data, in a file of the folder that is worked in."""
    torch.manual_seed(5)
    save_model("teacher.pt", TinyMambaModel(tiny_config(d_model=32)))
    (place / "data" / "text" / "train.json").write_text(json.dumps({"vocab_size": 257}))
    return "teacher.pt"


def losses_of(**settings):
    """The loss of a step, and the gradients, with and without accumulation over two batches."""
    found = []
    for batch_size, parts in ((4, 1), (2, 2)):
        sizes = {"batch_size": batch_size, "gradient_accumulation_steps": parts, "dropout": 0.0}
        trainer = Trainer(brief_config(**{**sizes, "state_noise": 0.0, **settings}))
        loss = trainer.accumulate([*itertools.islice(trainer.train_batches(1), parts)])
        found.append((loss, [p.grad.clone() for p in trainer.model.parameters()]))
        trainer.close()
    return trainer, found


def test_a_run_learns_from_the_tokens_and_from_its_teacher(teacher_path):
    trainer, found = losses_of(teacher=teacher_path, distill_alpha=0.25, temperature=3.0)
    (loss, gradients), (parts, of_parts) = found
    close(loss, parts, 1e-5)
    for one, two in zip(gradients, of_parts, strict=True):
        close(one, two, 1e-3)
    plain = losses_of()[1][0][0]
    alone = losses_of(teacher=teacher_path, distill_alpha=1.0, temperature=3.0)[1][0][0]
    close(loss, 0.75 * plain + 0.25 * alone, 1e-5)
    assert losses_of(teacher=teacher_path, distill_alpha=0.0)[1][0][0] == pytest.approx(plain)


def test_stored_lessons_of_all_ids_train_as_the_teacher_does(teacher_path):
    size = brief_config().block_size
    flags = ("--teacher", teacher_path, "--top_k", 257, "--temperature", 2, "--block_size", size)
    done = run_main(prepare.main, *flags, "--output_dir", "data/text")
    assert done.returncode == 0, done.stderr
    paths = teacher_path, "data/text/train.teacher.bin"
    live, stored = (losses_of(teacher=path)[1][0] for path in paths)
    close(stored[0], live[0], 1e-3)
    for one, two in zip(stored[1], live[1], strict=True):
        close(one, two, 2e-2)


def test_a_run_with_a_teacher_resumes_bitwise_and_its_checkpoint_holds_no_teacher(teacher_path):
    settings = {"teacher": teacher_path, "max_steps": 4}
    assert Trainer(brief_config(**settings, checkpoint_path="straight.pt")).run() == 0
    trainer = Trainer(brief_config(**settings))
    after_step(trainer, 2, lambda: signal.raise_signal(signal.SIGINT))
    assert trainer.run() == 130
    go_on()
    want, got = (load_checkpoint(path)["model"] for path in ("straight.pt", LATEST))
    assert got.keys() == want.keys() == TinyMambaModel(brief_config()).state_dict().keys()
    assert all(torch.equal(got[name], weight) for name, weight in want.items())


def refuse(teacher, *naming, **settings):
    assert_refuses(*brief_flags(teacher=teacher, **settings), naming=naming)


def test_what_cannot_teach_is_one_line(teacher_path, tmp_path):
    refuse("nowhere.pt", "nowhere.pt: no such checkpoint")
    save_model("small.pt", TinyMambaModel(tiny_config(vocab_size=100)))
    refuse("small.pt", "small.pt: the teacher knows 100 ids, the student 257")
    tiny_llama().save_pretrained("llama")
    (tmp_path / "llama" / "model.safetensors").unlink()
    refuse("llama", "llama: transformers cannot load it")
    refuse("none.teacher.bin", "none.teacher.bin: no such file; make it with")
    facts = {"vocab_size": 257, "tokenizer": "1" * 64}
    (tmp_path / "data" / "text" / "train.json").write_text(json.dumps(facts))
    other = TinyMambaModel(tiny_config())
    other.tokenizer = {"sha256": "0" * 64}
    save_model("other.pt", other)
    refuse("other.pt", "has another tokenizer (111111111111) than other.pt (000000000000)")


def test_lessons_are_stored_once_and_of_plain_text_only(teacher_path, tmp_path):
    words = ("--teacher", teacher_path, "--output_dir", "data/text", "--block_size", 16)
    assert run_main(prepare.main, *words).returncode == 0
    folder = tmp_path / "data" / "text"
    stored = (folder / "train.teacher.bin").read_bytes()
    assert len(stored) == (folder / "train.bin").stat().st_size // 4 // 16 * 16 * 32 * 6
    assert_refused(run_main(prepare.main, *words), "train.teacher.bin: exists; pass --force")
    assert_refused(run_main(prepare.main, *words, "--force", "--top_k", 258), "--top_k: 258 of 257")
    assert_refused(run_main(prepare.main, *words, "--input", "x"), "--teacher: reads the train.bin")
    for flag, value in {"chat": "x", "val_input": "x", "tokenizer": "byte", "resume": 1}.items():
        done = run_main(prepare.main, *words, "--force", f"--{flag}", value)
        assert_refused(done, "--teacher: reads the train.bin", f"leave --{flag} out")
    assert_refused(run_main(prepare.main, "--top_k", 8), "--top_k: is of a teacher; pass --teacher")
    refuse(str(folder / "train.teacher.bin"), "pass --temperature 2", block_size=16, temperature=1)
    write_conversations(folder, "train", [([*range(9)], [True] * 9)] * 40, {"vocab_size": 257})
    assert_refused(run_main(prepare.main, *words, "--force"), "holds conversations; train with")
    assert (folder / "train.teacher.bin").read_bytes() == stored


def test_conversations_have_a_teacher_that_reads_each_alone(teacher_path, tmp_path):
    talks = [([i % 250, *range(7)], [False] * 3 + [True] * 5) for i in range(60)]
    for side in ("train", "val"):
        write_conversations(tmp_path / "data" / "text", side, talks, {"vocab_size": 257})
    _, found = losses_of(teacher=teacher_path, block_size=20)
    close(found[0][0], found[1][0], 1e-5)
