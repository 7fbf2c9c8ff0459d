"""Training on conversations: packing, the loss over what counts, errors, new tokens."""

import functools
import json
import math
import multiprocessing
import os
import signal
import sys

import numpy as np
import pytest
import torch
from helpers import (
    LATEST,
    POSIX,
    STEP,
    after_step,
    assert_compiled,
    assert_refused,
    brief_config,
    brief_flags,
    close,
    flags,
    free_copy,
    free_port,
    go_on,
    run_main,
    some_ids,
    stir,
    wide,
    write_conversations,
)
from tokenizers import Tokenizer

import peft
import testv2
from testv2 import Trainer, load_model
from tinymamba.checkpoint import load_checkpoint
from tinymamba.cli import UserError
from tinymamba.conversations import ConversationDataset, open_training_data
from tinymamba.dataset import StreamingTokenDataset
from tinymamba.tokenizer import SimpleTokenizer, byte_tokenizer

EOS, START, END = 256, 257, 258
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def turn(role: str, text: str) -> tuple[list[int], list[int]]:
    """The ids of a message in ChatML, and which of them count."""
    head, body = [START, *f"{role}\n".encode()], [*text.encode(), END]
    said = int(role == "assistant")
    return [*head, *body, 10], [0] * len(head) + [said] * len(body) + [0]


def chat(*turns: tuple[str, str]) -> tuple[list[int], list[int]]:
    """A conversation, and which of its tokens count."""
    parts = [turn(*each) for each in turns]
    ids, mask = (sum((part[i] for part in parts), []) for i in (0, 1))
    return [*ids, EOS], [*mask, 0]


CHATS = [
    chat(("user", f"{a}+{b}"), ("assistant", f"{a + b}" * (1 + a % 2)))
    for a in range(8)
    for b in range(5)
]
CHATS[3] = chat(("user", "hi"), ("assistant", "yes"), ("user", "1+2"), ("assistant", "is 3"))


def chat_tokenizer():
    """Bytes, and the special tokens of ChatML at the end."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer


def write_chats(folder, chats=CHATS, tokenizer=None, **facts):
    """The files of a preparation, on both sides."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or chat_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHATML)
    known = {"vocab_size": tokenizer.get_vocab_size(), "eos_id": EOS}
    known["tokenizer"] = SimpleTokenizer(folder / "tokenizer.json").sha256
    for side, part in (("train", chats), ("val", chats[:9])):
        write_conversations(folder, side, part, {**known, **facts})
    return folder / "train.bin"


@pytest.fixture
def chats(tmp_path, monkeypatch):
    """A working folder whose default data are conversations."""
    write_chats(tmp_path / "data" / "text")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(**changes):
    """A short run on conversations."""
    return brief_config(**{"vocab_size": 259, "block_size": 64, "max_steps": 3, **changes})


CHAT_FLAGS = {"vocab_size": 259, "block_size": 64}

# ------------------------------------------------------------------------------------ packing


def random_chats(sizes, seed=0, vocab=257):
    """Conversations of these lengths, of random ids and a random mask."""
    random = np.random.default_rng(seed)
    return [(random.integers(0, vocab, n), random.random(n) < 0.4) for n in sizes]


def next_fit(sizes, room):
    """The reference of packing: the numbers of the conversations in each row."""
    rows, free = [], 0
    for number, size in enumerate(sizes):
        if size > free:
            rows, free = [*rows, []], room
        rows[-1].append(number)
        free -= size
    return rows


def test_rows_hold_whole_conversations_in_order_and_each_token_once(tmp_path):
    sizes = [3, 9, 20, 1 + 16, 5, 16, 2, 2, 2, 30, 4]
    given = random_chats(sizes, seed=4)
    for _, mask in given:
        mask[-1] = True
    path = write_conversations(tmp_path, "train", given, {})
    data = ConversationDataset(path, 20)
    rows = next_fit([min(n, 20) for n in sizes], 20)
    assert len(data) == len(rows)
    for row, numbers in enumerate(rows):
        inputs, targets, ends = data[row]
        at = 0
        for number in numbers:
            ids, mask = (np.asarray(part)[-20:] for part in given[number])
            place = slice(at, at + len(ids))
            assert inputs[place].tolist() == ids.tolist()
            wanted = [*np.where(mask, ids, -100)[1:], -100]
            assert targets[place].tolist() == wanted
            assert ends[place].tolist() == [False] * (len(ids) - 1) + [True]
            at += len(ids)
        assert ends[at:].all() and (targets[at:] == -100).all() and (inputs[at:] == 0).all()
    assert {inputs.dtype, targets.dtype} == {torch.int64} and ends.dtype == torch.bool
    shuffled = ConversationDataset(path, 20, shuffle=True)
    assert sorted(shuffled.locate(i)[1] for i in range(len(rows))) == [*range(len(rows))]
    (file,) = data.files
    assert (file.cut, file.left_out) == (1, 0)


def test_a_mask_is_read_across_the_pieces_of_a_long_file_and_over_shards(tmp_path):
    sizes = [3 + n % 11 for n in range(2000)]
    given = random_chats(sizes, seed=1)
    halves = given[:1000], given[1000:]
    for number, half in enumerate(halves):
        write_conversations(tmp_path, f"part_{number}", half, {})
    whole, folder = tmp_path / "whole", ConversationDataset(tmp_path, 64)
    whole.mkdir()
    data = ConversationDataset(write_conversations(whole, "train", given, {}), 64)
    assert folder.files[0].numbers.tolist() == data.files[0].numbers.tolist()
    teaches = [n for n, (_, mask) in enumerate(given) if mask[1:].any()]
    assert data.files[0].numbers.tolist() == teaches and len(teaches) < 2000
    assert data.files[0].left_out == 2000 - len(teaches)
    for i in range(0, len(data), 17):
        assert all(map(torch.equal, data[i], folder[i]))
    sums = np.cumsum([0, *np.concatenate([mask for _, mask in given])])
    places = np.arange(0, data.files[0].length + 1)
    (shard,) = data.files[0].shards
    assert (data.files[0].count_before(places, shard) == sums).all()


@pytest.mark.parametrize("mask", [False, True], ids=["plain", "document_mask"])
def test_packed_rows_equal_each_conversation_alone(tmp_path, mask):
    """EOS within a conversation ends nothing, even where document_mask is on."""
    given = random_chats([7, 12, 20, 9, 17, 4, 11], seed=2)
    settings = {"document_mask": True, "eos_id": int(given[1][0][5])} if mask else {}
    path = write_conversations(tmp_path, "train", given, {})
    data = ConversationDataset(path, 32)
    ids, targets, ends = (torch.stack(part) for part in zip(*data, strict=True))
    packed, alone = free_copy(wide(double=True, **settings)), free_copy(wide(double=True))
    logits = packed(ids, ends=ends)
    loss, total, count = packed(ids, targets, ends=ends), 0.0, 0
    loss.backward()
    for row in range(len(data)):
        at = 0
        for number in data.files[0].row(row):
            one, counts = map(torch.as_tensor, given[number])
            goal = torch.where(counts, one, -100)[None, 1:]
            close(logits[row : row + 1, at : at + len(one)], alone(one[None]), 1e-10)
            n = (goal != -100).sum()
            total, count = total + alone(one[None, :-1], goal) * n, count + n
            at += len(one)
    (total / count).backward()
    close(loss, total / count, 1e-10)
    for p, q in zip(packed.parameters(), alone.parameters(), strict=True):
        close(p.grad, q.grad, 1e-10)


def test_ends_reset_every_state_that_a_plain_model_would_carry_on():
    model, ids = wide(double=True), some_ids(1, 24)
    ends = torch.zeros_like(ids, dtype=torch.bool)
    same = model(ids, ends=ends)
    close(same, model(ids), 1e-10)
    ends[0, 11] = True
    assert not torch.allclose(model(ids, ends=ends)[0, 12:], same[0, 12:], atol=1e-3)


# A template that writes the end-of-text after each answer, as that of Llama 2.
INNER = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.role == 'assistant' %}"
INNER += "<|endoftext|>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
ROUNDS = [(f"{n}+1", f"{n + 1}") for n in range(2)]


def inner_chat(rounds=ROUNDS):
    """A conversation that goes on after the end-of-text."""
    parts = [(f"user:{asked}assistant:".encode(), [*said.encode(), EOS]) for asked, said in rounds]
    ids = sum(([*asked, *said] for asked, said in parts), [])
    return ids, sum(([0] * len(asked) + [1] * len(said) for asked, said in parts), [])


def write_inner(folder, given):
    """Conversations with that template."""
    path = write_chats(folder, given)
    (folder / "chat_template.jinja").write_text(INNER)
    return path


def test_a_chat_goes_on_after_an_end_of_text_where_training_did(chats):
    """So do server, benchmark, samples and converted models: the state is that of training."""
    for library in ("transformers", "fastapi"):
        pytest.importorskip(library)
    from hf_integration import TinyMambaHFModel
    from streaming import StreamingServer
    from tinymamba.chat_eval import answer_loss, find_questions
    from tinymamba.chat_session import ChatSessions

    write_inner(chats / "data" / "text", [inner_chat()] * 9)
    trainer = Trainer(config(document_mask=True))
    trainer.run()
    server = StreamingServer(LATEST, "cpu")
    talk = ChatSessions(server, {"max_new_tokens": 6, "temperature": 0})
    session = server.create_session()
    for asked in ("0+1", "1+1"):
        list(turn := talk.ask(session, asked))
        turn.close()
    now, history = server.find(session).now, talk.history(session)
    now = server.decoder.read_unread(now, None)
    assert EOS in history.ids[:-8] and len(history.messages) == 4

    model = load_model(LATEST)
    apart = free_copy(model)
    apart.config.document_mask = True
    ids = torch.tensor([history.ids])
    no_ends = torch.zeros_like(ids, dtype=torch.bool)
    trained = apart.run(ids, apart.init_state(1), ends=no_ends, marked=True)[1]
    cut = apart.run(ids, apart.init_state(1))[1]
    for kept, layer, other in zip(now.state.layers, trained.layers, cut.layers, strict=True):
        close(kept.ssm, layer.ssm, 1e-5)
        assert not torch.allclose(layer.ssm, other.ssm, atol=1e-3)
    close(TinyMambaHFModel.of(model)(ids).logits, apart(ids, ends=no_ends), 1e-5)

    roles = ("user", "assistant") * len(ROUNDS)
    said = [{"role": r, "content": c} for r, c in zip(roles, sum(ROUNDS, ()), strict=True)]
    inputs, targets, ends = ConversationDataset("data/text/train.bin", len(inner_chat()[0]))[0]
    want = apart(inputs[None], targets[None], ends=ends[None]).item()
    got, counted = answer_loss(model, find_questions(talk.template, said, EOS), 2)
    assert counted == int((targets != -100).sum()) and got == pytest.approx(want, abs=1e-5)


def test_document_mask_stays_where_conversations_end_with_the_text(chats):
    trainer = Trainer(config(document_mask=True, max_steps=1))
    assert trainer.model.config.document_mask and not trainer.train_data.has_inside(EOS)
    trainer.close()


# --------------------------------------------------------------------------------------- loss


def gradients(trainer, batches):
    """The loss of a step on these batches, and its gradient."""
    trainer.model.double()
    trainer.optimizer.zero_grad()
    loss = trainer.accumulate(batches)
    return loss, [p.grad.clone() for p in trainer.model.parameters()]


def test_accumulation_over_uneven_counts_equals_one_large_batch(chats):
    trainer = Trainer(config(batch_size=6, enable_validation=True))
    large = next(trainer.batches(trainer.loader(trainer.train_data, 0, 6)))
    large[1][2] = -100  # a row without a target
    parts = [tuple(part[rows] for part in large) for rows in ([0], [1, 5], [2], [3, 4])]
    counts = [int((part[1] != -100).sum()) for part in parts]
    assert len({*counts}) > 2 and 0 in counts
    (loss, wanted), (total, got) = gradients(trainer, [large]), gradients(trainer, parts)
    close(total, loss, 1e-10)
    assert all(map(lambda a, b: close(a, b, 1e-10) is None, got, wanted))
    nothing = tuple(part[[2]] for part in large)
    zero, empty = gradients(trainer, [nothing, nothing])
    assert zero == 0 and all((g == 0).all() for g in empty)
    trainer.close()


def test_plain_data_are_weighed_as_before_bit_for_bit(place):
    trainer = Trainer(brief_config(gradient_accumulation_steps=3, max_steps=1))
    batches = list(trainer.train_batches(1))
    loss = trainer.accumulate(batches)
    got = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.optimizer.zero_grad()
    total = torch.zeros(())
    for ids, targets in batches:
        part = trainer.model(ids, targets) / 3
        part.backward()
        total += part.detach()
    assert torch.equal(loss, total)
    assert all(torch.equal(g, p.grad) for g, p in zip(got, trainer.model.parameters(), strict=True))
    trainer.close()


def train_rank(rank: int, port: int, settings: dict) -> None:
    """One of two processes."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {**address, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    sys.exit(Trainer(config(**settings)).run())


@POSIX
def test_two_processes_train_as_one_with_twice_the_batch(chats):
    """Their batches have different numbers of tokens that count."""
    settings = {"max_steps": 2, "optimizer": "adamw", "enable_validation": True}
    two = {"checkpoint_path": "two.pt", "batch_size": 1, "gradient_accumulation_steps": 2}
    fork, port = multiprocessing.get_context("fork"), free_port()
    both = [fork.Process(target=train_rank, args=(r, port, {**settings, **two})) for r in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(100)
    assert [process.exitcode for process in both] == [0, 0]
    assert Trainer(config(**settings, checkpoint_path="one.pt")).run() == 0
    two, one = load_checkpoint("two.pt"), load_checkpoint("one.pt")
    for name, t in one["model"].items():
        close(two["model"][name], t, 1e-5)
    for kind in ("train", "val"):
        a, b = (run["progress"]["history"][kind] for run in (one, two))
        assert np.allclose(a, b, atol=1e-5)


def test_validation_is_the_mean_over_all_tokens_that_count(chats):
    trainer = Trainer(config(batch_size=2, enable_validation=True, max_steps=1))
    rows = [trainer.val_data[i] for i in range(len(trainer.val_data))]
    ids, targets, ends = (torch.stack(part) for part in zip(*rows, strict=True))
    loss = trainer.validate()
    assert math.isclose(loss, trainer.model(ids, targets, ends=ends).item(), rel_tol=1e-5)
    assert trainer.bytes_per_token is None
    trainer.close()


# --------------------------------------------------------------------------------------- runs


def test_a_resumed_run_is_bitwise_the_uninterrupted_one_over_epochs(chats, capsys):
    few = {"batch_size": 3, "num_epochs": 3, "max_steps": 0, "checkpoint_interval": 0}
    whole = Trainer(config(**few, checkpoint_path="whole.pt"))
    assert whole.run() == 0
    assert whole.epoch() == 3 and whole.step // 2 % len(whole.train_data)
    saved = Trainer(config(**few))
    after_step(saved, whole.step // 2, lambda: signal.raise_signal(signal.SIGINT))
    assert saved.run() == 130
    assert go_on().step == whole.step
    one, two = load_checkpoint("whole.pt"), load_checkpoint(LATEST)
    assert one["progress"]["history"] == two["progress"]["history"]
    assert all(torch.equal(t, two["model"][name]) for name, t in one["model"].items())
    said = capsys.readouterr().out
    assert "train.bin: 40 conversations in" in said


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(chats):
    words = {**CHAT_FLAGS, "num_epochs": 2, "lr": 0.02, "validation_interval": 3}
    done = run_main(testv2.main, *brief_flags(**words, enable_validation="true"))
    assert done.returncode == 0, done.stderr
    losses = [loss for _, loss in load_checkpoint(LATEST)["progress"]["history"]["val"]]
    best = load_checkpoint("tinymamba_model_best.pt")
    assert best["val_loss"] == min(losses) < losses[0] / 1.2
    model, data = (
        load_model("tinymamba_model_best.pt"),
        ConversationDataset("data/text/val.bin", 64),
    )
    ids, targets, ends = (torch.stack(part) for part in zip(*data, strict=True))
    assert math.isclose(model(ids, targets, ends=ends).item(), min(losses), rel_tol=1e-4)


def test_resume_on_plain_data_of_the_same_ids_is_refused(chats):
    words = brief_flags(**CHAT_FLAGS, max_steps=1)
    assert run_main(testv2.main, *words).returncode == 0
    folder = chats / "data" / "text"
    facts = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps({**facts, "kind": "text"}))
    for name in ("mask", "index"):
        (folder / f"train.{name}.bin").unlink()
    done = run_main(testv2.main, "--resume", "--max_steps", 2)
    assert_refused(done, "the data's sources was", "--accept_changed_data")


def test_what_is_cut_and_left_out_is_said_once(chats):
    long = chat(("user", "long " * 30), ("assistant", "no"))
    silent = chat(("assistant", "no"), ("user", "long " * 30))
    write_chats(chats / "data" / "text", [*CHATS[:9], long, silent, *CHATS[9:]])
    done = run_main(testv2.main, *brief_flags(**CHAT_FLAGS, max_steps=2))
    assert done.stdout.count("train.bin: 2 of more than 64 tokens") == 1, done.stdout
    assert done.stdout.count("train.bin: 1 are left out, as no token in them counts") == 1


@pytest.mark.parametrize("prompt", ["", "1+2"])
def test_a_sample_answers_a_user_and_ends_with_the_turn(chats, prompt, monkeypatch):
    pytest.importorskip("transformers")
    trainer = Trainer(config(generation_prompt=prompt, generation_length=50, max_steps=1))
    asked, ends = trainer.prompt()
    wanted, _ = turn("user", prompt or "0+0")
    assert asked == [*wanted, START, *b"assistant\n"] and ends == [END, EOS]
    said = []
    monkeypatch.setattr(trainer.log, "say", said.append)
    logits = torch.zeros(1, 1, 259)
    logits[..., END] = 99.0
    monkeypatch.setattr(trainer.model, "advance", lambda ids, state, **_: (logits, state))
    trainer.sample()
    assert said == [f"sample at step 0:\nuser\n{prompt or '0+0'}\nassistant\n\n"]
    trainer.close()


def test_a_sample_that_the_template_rejects_says_so_in_one_line(chats):
    pytest.importorskip("transformers")
    template = chats / "data" / "text" / "chat_template.jinja"
    template.write_text("{{ raise_exception('never') }}")
    trainer = Trainer(config(generation_prompt="hi", max_steps=1))
    with pytest.raises(UserError) as error:
        trainer.prompt()
    said = "generation_prompt: the chat template rejects them (never); use another"
    assert str(error.value) == said
    trainer.close()


def test_a_sample_without_chat_template_says_so(chats):
    (chats / "data" / "text" / "chat_template.jinja").unlink()
    words = brief_flags(**{**CHAT_FLAGS, "generate_samples": "true"}, max_steps=1)
    done = run_main(testv2.main, *words, "--generation_prompt", "hi")
    assert done.returncode == 0 and "no sample: generation_prompt" in done.stdout


def test_compiled_rows_of_conversations_have_one_graph(chats, monkeypatch, capsys):
    """Wherever conversations end, a block is compiled once, and so is the loss."""
    settings = {"n_layer": 1, "window_size": 8, "max_steps": 2}
    eager = Trainer(config(**settings))
    eager.run()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    trainer = Trainer(config(**settings, use_compile=True))
    assert trainer.run() == 0
    assert_compiled(capsys.readouterr().out)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    got, want = (run.progress["history"]["train"] for run in (trainer, eager))
    assert got == [[step, pytest.approx(loss, abs=1e-4)] for step, loss in want]


# ------------------------------------------------------------------------------------- errors


def rewrite(path, change):
    """Change the bytes of a file."""
    path.write_bytes(change(path.read_bytes()))


def refacts(path, **facts):
    """Change what a .json says."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


FAULTS = {
    "short mask": (lambda f: rewrite(f / "train.mask.bin", lambda b: b[:-1]), "train.mask.bin"),
    "other mask": (
        lambda f: rewrite(f / "train.mask.bin", lambda b: b[:9] + b"\xff" + b[10:]),
        "tokens count in it, but the .json",
    ),
    "no mask": (lambda f: (f / "train.mask.bin").unlink(), "train.mask.bin: no such file"),
    "no index": (lambda f: (f / "train.index.bin").unlink(), "train.index.bin: no such file"),
    "cut index": (lambda f: rewrite(f / "train.index.bin", lambda b: b[:-8]), "train.index.bin"),
    "odd index": (lambda f: rewrite(f / "train.index.bin", lambda b: b + b"1"), "train.index.bin"),
    "falling index": (
        lambda f: rewrite(f / "train.index.bin", lambda b: b[:8] + b[16:24] + b[8:16] + b[24:]),
        "does not divide",
    ),
    "another count": (lambda f: refacts(f / "train.json", conversations=3), "3"),
    "shorter ids": (
        lambda f: (
            rewrite(f / "train.bin", lambda b: b[:-4]),
            refacts(f / "train.json", tokens=sum(len(ids) for ids, _ in CHATS) - 1),
        ),
        "train.index.bin",
    ),
    "flipped kind": (lambda f: refacts(f / "train.json", kind="text"), "train.mask.bin lies"),
    "lost json": (lambda f: (f / "train.json").unlink(), "train.mask.bin lies"),
    "unknown kind": (lambda f: refacts(f / "train.json", kind="chats"), "kind 'chats'"),
    "kind of another type": (lambda f: refacts(f / "train.json", kind=5), "says kind 5"),
    "preferences": (lambda f: refacts(f / "train.json", kind="preferences"), "--objective dpo"),
    "nothing counts": (
        lambda f: (
            rewrite(f / "train.mask.bin", lambda b: bytes(len(b))),
            refacts(f / "train.json", counted=0),
        ),
        "no token in it counts",
    ),
    "ids too large": (
        lambda f: rewrite(f / "train.bin", lambda b: (259).to_bytes(4, "little") + b[4:]),
        "id 259 at offset 0",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_files_that_do_not_fit_are_one_line(chats, name):
    spoil, fragment = FAULTS[name]
    spoil(chats / "data" / "text")
    assert_refused(run_main(testv2.main, *brief_flags(**CHAT_FLAGS, max_steps=1)), fragment)
    assert not list(chats.glob("*.pt"))


def test_conversations_and_text_are_not_mixed(chats):
    text, one = chats / "plain", chats / "data" / "text"
    text.mkdir()
    ids = np.arange(2000, dtype=np.int32) % 256
    ids.tofile(text / "train.bin")
    words = brief_flags(
        **CHAT_FLAGS, max_steps=1, train_data_path=[one / "train.bin", text / "train.bin"]
    )
    assert_refused(run_main(testv2.main, *words), "holds text, but", "holds chat")
    words = brief_flags(**{**CHAT_FLAGS, "enable_validation": "true"}, max_steps=1)
    done = run_main(testv2.main, *words, "--val_data_path", text / "train.bin")
    assert_refused(done, "val_data_path")
    plain = open_training_data(text / "train.bin", 64)
    assert type(plain) is StreamingTokenDataset and not plain.masked


# --------------------------------------------------------------------------------- vocabulary


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Checkpoints of models with the tokenizer of plain bytes: tied, and not."""
    folder = tmp_path_factory.mktemp("base")
    ids = np.tile(np.arange(256, dtype=np.int32), 9)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    for side in ("train", "val"):
        ids.tofile(folder / f"{side}.bin")
        facts = {"vocab_size": 257, "eos_id": EOS}
        facts["tokenizer"] = SimpleTokenizer(folder / "tokenizer.json").sha256
        (folder / f"{side}.json").write_text(json.dumps(facts))
    forms = {"tied": {}, "apart": {"tie_embeddings": "false"}, "spare": {"vocab_size": 300}}
    forms["chat"] = {**CHAT_FLAGS, "train_data_path": write_chats(folder / "chats")}
    for name, changes in forms.items():
        changes = {"train_data_path": folder / "train.bin", **changes}
        words = brief_flags(max_steps=1, log_dir=folder / "logs", **changes)
        done = run_main(testv2.main, *words, "--checkpoint_path", folder / f"{name}.pt")
        assert done.returncode == 0, done.stderr
    return folder


def begin(source, *words, **changes):
    """Begin a run on conversations with the weights of a checkpoint."""
    given = {"block_size": 64, "batch_size": 2, "use_compile": False, "device": "cpu"}
    given |= {"enable_validation": False, "generate_samples": False, "amp_dtype": "float32"}
    return run_main(testv2.main, *flags(**given, init_from=source, max_steps=1, **changes), *words)


@pytest.mark.parametrize("name", ["tied", "apart", "spare"])
def test_a_vocabulary_grows_by_rows_that_are_the_mean(chats, base, name):
    old = load_checkpoint(base / f"{name}.pt")["model"]
    done = begin(base / f"{name}.pt", lr=0)
    assert done.returncode == 0, done.stderr
    new = load_checkpoint(LATEST)
    assert new["config"]["vocab_size"] == (300 if name == "spare" else 259)
    for key, t in old.items():
        grown = new["model"][key]
        if key not in ("embedding.weight", "head.weight"):
            assert torch.equal(grown, t)
            continue
        assert torch.equal(grown[:257], t[:257]) and torch.equal(grown[259:], t[259:])
        close(grown[257:259], t[:257].mean(0).expand(2, -1), 1e-6)
    assert SimpleTokenizer.from_dict(new["tokenizer"]).chat_template == CHATML
    again = run_main(testv2.main, "--resume", "--max_steps", 3, "--lr", "1e-3")
    assert again.returncode == 0 and "step 3/3" in again.stdout, again.stderr
    moved = load_checkpoint(LATEST)["model"]["embedding.weight"]
    assert not torch.equal(moved[257], new["model"]["embedding.weight"][257])


@pytest.mark.parametrize("change", ["moved", "replaced", "other model"])
def test_a_tokenizer_that_is_not_the_old_one_with_more_at_the_end_is_refused(chats, base, change):
    spoiled = json.loads(chat_tokenizer().to_str())
    if change == "moved":  # the end-of-text token has another id
        for token, new in zip(spoiled["added_tokens"], (258, 256, 257), strict=True):
            token["id"] = new
        spoiled["added_tokens"].sort(key=lambda token: token["id"])
        names = spoiled["model"]["vocab"]
        names.pop("<|endoftext|>", None)
    elif change == "replaced":
        spoiled["added_tokens"][0]["content"] = "</s>"
    else:
        vocab = spoiled["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    write_chats(chats / "data" / "text", tokenizer=Tokenizer.from_str(json.dumps(spoiled)))
    assert_refused(begin(base / "tied.pt"), "has another tokenizer", "tied.pt")
    words = ["--checkpoint", base / "tied.pt", *flags(steps=1, enable_validation=False)]
    assert_refused(run_main(peft.main, *words, "--method", "full"), "has another tokenizer")


def test_a_model_without_tokenizer_does_not_grow(chats, base, tmp_path):
    saved = load_checkpoint(base / "tied.pt")
    testv2.save_checkpoint(tmp_path / "bare.pt", {**saved, "tokenizer": {}})
    assert_refused(begin(tmp_path / "bare.pt"), "bare.pt: has fewer ids", "tokenizer.json")
    assert_refused(begin(base / "spare.pt", vocab_size=259), "vocab_size: 259", "300")


# -------------------------------------------------------------------------------- fine-tuning


def tune(source, method, *words, **changes):
    """Run peft.py on the conversations."""
    given = {"checkpoint": source, "method": method, "steps": 4, "generate_samples": False}
    given |= {"block_size": 64, "batch_size": 4, "device": "cpu", "amp_dtype": "float32"}
    return run_main(peft.main, *flags(**{**given, "log_interval": 1, **changes}), *words)


@pytest.mark.parametrize("method", peft.METHODS)
def test_every_method_learns_from_conversations(chats, base, method):
    done = tune(base / "chat.pt", method)
    assert done.returncode == 0, done.stderr
    losses = [float(step[2]) for step in STEP.findall(done.stdout)]
    assert len(losses) == 4 and min(losses[-2:]) < losses[0] - 0.01, losses
    packed = "in 40 rows" not in done.stdout
    assert packed == (method != "prefix"), "a learned initial state is before each conversation"


def test_an_adapter_needs_the_tokens_of_its_base_and_full_grows(chats, base):
    for name in ("tied", "spare"):
        for method in ("lora", "prefix", "state_offset"):
            done = tune(base / f"{name}.pt", method)
            assert_refused(done, f"method: {method} cannot learn new tokens", "--method full")
    done = tune(base / "tied.pt", "full", lr=1e-4)
    assert done.returncode == 0, done.stderr
    model = load_model("adapter/tinymamba_model_latest.pt")
    assert model.config.vocab_size == 259 and len(SimpleTokenizer.from_dict(model.tokenizer)) == 259
    again = tune(base / "tied.pt", "full", "--resume", steps=5)
    assert again.returncode == 0 and "step 5/5" in again.stdout, again.stderr


def test_an_adapter_cannot_go_on_where_its_base_begins_anew(chats):
    """The base stays as it is, with document_mask; a run of all weights turns that off."""
    words = brief_flags(**CHAT_FLAGS, max_steps=1, document_mask=True)
    assert run_main(testv2.main, *words).returncode == 0
    write_inner(chats / "data" / "text", [inner_chat()] * 9)
    assert_refused(tune(LATEST, "lora"), "train_data_path: its conversations go on after eos_id")
    done = tune(LATEST, "full")
    assert done.returncode == 0 and "document_mask is off in the model" in done.stdout
    assert not load_model("adapter/tinymamba_model_latest.pt").config.document_mask
    again = tune(LATEST, "full", "--resume", steps=5)
    assert again.returncode == 0 and "step 5/5" in again.stdout, again.stderr


def test_an_adapter_on_packed_rows_learns_what_it_learns_alone(tmp_path):
    """Of the methods, prefix alone has a state before the first token."""
    given = random_chats([9, 14, 12], seed=3)
    data = ConversationDataset(write_conversations(tmp_path, "train", given, {}), 32)
    ids, _, ends = (torch.stack(part) for part in zip(*data, strict=True))
    for method in ("lora", "state_offset"):
        model = peft.attach(free_copy(wide(double=True)), peft.AdapterConfig(method=method))
        stir(model.double(), "default")
        logits, row = model.eval()(ids, ends=ends), data.files[0].row(0)
        at = len(given[row[0]][0])
        second = torch.as_tensor(given[row[1]][0])[None]
        close(logits[:1, at : at + second.shape[1]], model(second), 1e-10)
