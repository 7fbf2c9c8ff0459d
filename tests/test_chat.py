"""Chats: on the console, in the server, in transformers, and in benchmark.py."""

import contextlib
import gzip
import io
import json
import math
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import POSIX, assert_refused, close, free_copy, run_main, train_bpe, wide
from serve_helpers import CHAT, COMPLETIONS, NAME, running

import benchmark
import streaming
from streaming import StreamingServer
from tinymamba.chat_rows import read_chats
from tinymamba.chat_session import ChatSessions
from tinymamba.chat_template import ChatTemplate
from tinymamba.checkpoint import save_model
from tinymamba.cli import UserError
from tinymamba.openai_api import Message
from tinymamba.tokenizer import EOS_TOKEN, SimpleTokenizer

transformers = pytest.importorskip("transformers")

from hf_integration import TinyMambaHFModel, TinyMambaHFTokenizer, convert  # noqa: E402

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{{- '<|im_end|>' + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
FORGETFUL = CHATML.replace("m.content }}", "(m.content if loop.last else m.content[-3:]) }}")
END = "<|im_end|>"
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
)
BRIEF = CHATML.replace(
    "m.content }}", "(m.content[-1:] if m.role == 'assistant' else m.content) }}"
)
DEAF = CHATML.replace("messages %}", "messages if m.role != 'system' %}")
GREEDY = {"temperature": 0.0, "max_new_tokens": 30}


def tokenizer_of(template: str | None = CHATML, **special: str) -> SimpleTokenizer:
    """A tokenizer with this template, and special tokens by their names."""
    content = train_bpe(END, "<|im_start|>", EOS_TOKEN).to_str()
    made = {"name": "tokenizer.json", "content": content, "chat_template": template}
    return SimpleTokenizer.from_dict({**made, "special_tokens": special})


def talkative(template: str | None = CHATML):
    """A model whose likeliest tokens are four characters, and the end of a turn after 4 to 7."""
    model, tokenizer = free_copy(wide(vocab_size=320, tie_embeddings=False)), tokenizer_of(template)
    others = torch.ones(320, dtype=torch.bool)
    others[tokenizer.encode("%NZ&")] = False  # no two of them are one token
    model.requires_grad_(False).head.weight[others] = 0.0  # of equal ones, the first is taken
    model.tokenizer = tokenizer.to_dict()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Checkpoints of one model with different templates; plain.pt has none."""
    folder = tmp_path_factory.mktemp("chat")
    shapes = {"model": CHATML, "plain": None, "forgetful": FORGETFUL, "strict": STRICT}
    for name, template in {**shapes, "deaf": DEAF, "brief": BRIEF}.items():
        save_model(folder / f"{name}.pt", talkative(template))
    return folder


@pytest.fixture(scope="module")
def server(folder) -> StreamingServer:
    return StreamingServer(folder / "model.pt", "cpu")


def ids_of(server: StreamingServer, messages, reply=True) -> list[int]:
    """The ids of messages, by a template of its own."""
    return ChatTemplate(SimpleTokenizer.from_dict(server.tokenizer.to_dict())).encode(
        [Message(**m) for m in messages], reply
    )


def said(chats: ChatSessions, session: str, text: str) -> str:
    """The answer to a user."""
    with contextlib.closing(chats.ask(session, text)) as turn:
        return "".join(chunk.text for chunk in turn)


def assert_holds(chats: ChatSessions, session: str, messages: list[dict]) -> None:
    """The session has these messages, and its state is that after the ids that it says."""
    server, history = chats.server, chats.history(session)
    assert [*history.messages] == messages
    assert server.get_session_info(session)["position"] == len(history.ids)
    if history.ids:
        now = server.decoder.read_unread(server.find(session).now, None)
        want = server.model(torch.tensor([history.ids]))[0, -1]
        close(torch.from_numpy(now.logits), want, 1e-4)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Answer briefly: <|im_end|>"}
ASKED = ["Hello", "und so weiter", "<|im_start|>42?"]

# ------------------------------------------------------------------------------- the end of a turn


@pytest.mark.parametrize(
    "template, end",
    [
        (CHATML, "<|im_end|>"),
        (
            "{% for m in messages %}{{ bos_token }}{{ m.content }} {{ eos_token }}{% endfor %}",
            "</s>",
        ),
        ("{% for m in messages %}[{{ m.content }}]<|endoftext|>{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", None),
        ("<|im_start|>{{ messages[0].content }}", None),
        ("{{ raise_exception('no') }}", None),
        (None, None),
    ],
)
def test_the_token_that_ends_a_turn_is_found_from_the_template(template, end):
    names = {"bos_token": "<|im_start|>", "eos_token": "</s>"}
    content = train_bpe(EOS_TOKEN, "<|im_start|>", END, "</s>").to_str()
    made = {"name": "tokenizer.json", "content": content, "chat_template": template}
    tokenizer = SimpleTokenizer.from_dict({**made, "special_tokens": names})
    id_of = tokenizer.library.token_to_id
    assert ChatTemplate(tokenizer).turn_end == (None if end is None else id_of(end))
    assert TinyMambaHFTokenizer.of(tokenizer).turn_end == (None if end is None else id_of(end))


# ------------------------------------------------------------------------------------ sessions


def test_a_turn_reads_exactly_what_is_new(server, monkeypatch):
    """All ids are read once; only the last one of an answer is left for the next turn."""
    chats, session, run = ChatSessions(server, GREEDY), server.create_session(), server.decoder.run
    read = []
    monkeypatch.setattr(
        server.decoder, "run", lambda ids, state: [read.extend(ids[0].tolist()), run(ids, state)][1]
    )
    chats.set_system(session, SYSTEM["content"])
    messages = [SYSTEM]
    for text in ASKED:
        with contextlib.closing(chats.ask(session, text)) as turn:
            answer = "".join(chunk.text for chunk in turn)
        messages += [user(text)]
        assert turn.ids == ids_of(server, messages) and turn.repeated == 0
        assert turn.finish_reason == "stop" and 0 < len(answer) < 30
        messages += [assistant(answer)]
        history = chats.history(session)
        assert [*history.messages] == messages
        assert history.ids == tuple(turn.ids) + tuple(server.tokenizer.encode(answer))
        assert tuple(read) in (history.ids, history.ids[:-1])
    assert_holds(chats, session, messages)


def test_an_answer_is_that_of_a_whole_prompt(server):
    chats, session = ChatSessions(server, GREEDY), server.create_session()
    for text in ASKED:
        answer = said(chats, session, text)
        prompt = ids_of(server, chats.history(session).messages[:-1])
        assert answer == server.generate_text(prompt, stop_ids=[0], **GREEDY)


@pytest.mark.parametrize("name", ["forgetful", "model"])
def test_what_is_written_in_another_way_now_is_read_again(folder, name):
    """By the template, or as drawn ids are not those of their text: that of t, h, e is one id."""
    server = StreamingServer(folder / f"{name}.pt", "cpu")
    letters = dict.fromkeys(server.tokenizer.encode("thxe"), 99.0)
    assert "the" not in map(server.tokenizer.decode, ([i] for i in letters))
    drawn = {"seed": 1, "temperature": 1.0, "logit_bias": letters, "max_new_tokens": 30}
    chats, session = ChatSessions(server, GREEDY if name == "forgetful" else drawn), "a"
    server.create_session(session)
    repeated = 0
    for text in ("Hello", "the other", "42?"):
        with contextlib.closing(chats.ask(session, text)) as turn:
            for _ in turn:
                pass
        messages = [*chats.history(session).messages]
        assert turn.ids == ids_of(server, messages[:-1])
        assert_holds(chats, session, messages)
        repeated += turn.repeated
    assert repeated > 0


def test_an_answer_written_anew_is_read_again_but_not_the_chat_before_it(folder, monkeypatch):
    """The state before the last token of a prompt is kept, to go back to when an answer changes."""
    server = StreamingServer(folder / "brief.pt", "cpu")
    chats, session, run = ChatSessions(server, GREEDY), server.create_session(), server.decoder.run
    said(chats, session, "Hello")
    asked = ids_of(server, [user("Hello")])
    read = []
    monkeypatch.setattr(
        server.decoder, "run", lambda ids, state: [read.extend(ids[0].tolist()), run(ids, state)][1]
    )
    with contextlib.closing(chats.ask(session, "42?")) as turn:
        assert turn.repeated > 1 and turn.ids[: len(asked)] == asked
        assert next(iter(turn)).text
    new = turn.ids[len(asked) - 1 :]
    assert read[: len(new)] == new


def test_undo_fork_reset_and_system(server):
    chats, session = ChatSessions(server, GREEDY), server.create_session()
    first = [user("Hello"), assistant(said(chats, session, "Hello"))]
    second = said(chats, session, "42?")
    fork = server.fork_session(session)
    chats.undo(session)
    assert_holds(chats, session, first)
    assert said(chats, session, "42?") == second
    both = [*first, user("42?"), assistant(second)]
    assert_holds(chats, session, both)
    assert_holds(chats, fork, both)
    chats.set_system(fork, "x")
    assert_holds(chats, fork, [{"role": "system", "content": "x"}, *both])
    said(chats, fork, "und")
    for left in (5, 3, 1):
        assert len(chats.history(fork).messages) == left + 2
        chats.undo(fork)
    with pytest.raises(UserError, match="undo: the chat has no turn to undo"):
        chats.undo(fork)
    chats.reset(session)
    assert_holds(chats, session, [])
    server.rollback(session)  # to the text before the last turn, with its messages
    assert_holds(chats, session, first)


def test_a_saved_chat_goes_on_and_plain_text_is_none(server, tmp_path):
    chats, session = ChatSessions(server, GREEDY), server.create_session()
    said(chats, session, "Hello")
    server.save_session(session, tmp_path / "chat")
    loaded = server.load_session(tmp_path / "chat")
    assert server.find(loaded).chat == chats.history(session)
    fresh = ChatSessions(server, GREEDY)
    assert said(fresh, loaded, "42?") == said(chats, session, "42?")
    assert fresh.history(loaded) == chats.history(session)

    server.generate_text("more", loaded, max_new_tokens=1)
    with pytest.raises(UserError, match="chat: the session has text that is no chat"):
        chats.ask(loaded, "Hello")
    server.save_session(loaded, tmp_path / "text")
    assert server.find(server.load_session(tmp_path / "text")).chat is None
    server.rollback(loaded)
    assert chats.history(loaded) == chats.history(session)

    found = server.find(session)
    for changes in ({"ids": found.chat.ids[1:]}, {"messages": ({"role": "boss", "content": ""},)}):
        found.chat = chats.history(loaded)._replace(**changes)
        server.save_session(session, tmp_path / "chat")
        with pytest.raises(UserError, match="is not a valid session .its messages do not fit"):
            server.load_session(tmp_path / "chat")


def test_a_turn_that_fails_or_says_nothing_changes_nothing(server):
    chats, session = ChatSessions(server, GREEDY), server.create_session()
    said(chats, session, "Hello")
    before = server.find(session).now, chats.history(session), server.find(session).turns
    turn = chats.ask(session, "42?")
    turn.stop()
    assert [*turn] == []
    turn.close()
    banned = dict.fromkeys(range(320), -math.inf)
    with pytest.raises(UserError, match="every token is banned"):
        said(ChatSessions(server, {**GREEDY, "logit_bias": banned}), session, "42?")
    chats.ask(session, "42?").close()  # before it began
    now = server.find(session)
    assert (now.now, chats.history(session), now.turns) == before
    with contextlib.closing(chats.ask(session, "42?")) as turn:
        text = next(iter(turn)).text
    assert chats.history(session).messages[-1] == assistant(text)
    assert_holds(chats, session, [*chats.history(session).messages])


# ------------------------------------------------------------------------------------ console


def console(folder: Path, *words, lines: str = "") -> subprocess.CompletedProcess:
    return run_main(streaming.main, "--checkpoint", "model.pt", "--chat", "--temperature", 0,
                    "--max_tokens", 30, *words, cwd=folder, input=lines)  # fmt: skip


def test_a_chat_on_the_console(folder, server):
    lines = "Hello\n\n42?\n/save chat\n/undo\n42?\n/fork b\n/reset\nHello\n/load chat\nund\n/help\n"
    done = console(folder, "--system", "Be brief", lines=lines)
    assert (done.returncode, done.stderr) == (0, "")
    chats, session = ChatSessions(server, GREEDY), server.create_session()
    chats.set_system(session, "Be brief")
    one, two, three = (said(chats, session, text) for text in ("Hello", "42?", "und"))
    want = [one, two, "saved chat", two, "now in b", one, three, streaming.ChatConsole.HELP]
    assert done.stdout == "".join(f"{line}\n" for line in want)
    more = console(folder, "--load_session", "chat", "--prompt", "und", "--stats")
    assert more.stdout == f"{three}\n" and "tokens/s" in more.stderr


def test_a_terminal_has_signs_and_commands(server, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    talk = streaming.ChatConsole(server, *streaming.parse(["--chat", "--temperature", "0"]))
    monkeypatch.setattr("sys.stdin", Terminal("Hello\n/system  two  words \n/nothing\n"))
    talk.interact()
    out, err = capsys.readouterr()
    assert out.startswith("/system [TEXT], /save FILE") and out.count("> ") == 4
    assert err.startswith("error: /nothing: is not a command") and len(err.splitlines()) == 1
    messages = talk.chats.history(talk.session).messages
    assert [m["content"] for m in messages[:2]] == ["two  words", "Hello"]


def test_a_reread_is_said_once(folder):
    words = ("--checkpoint", "forgetful.pt")
    done = console(folder, *words, lines="Hello you\nHello me\nHello us\n")
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1
    assert re.match(r"note: the last \d+ tokens of the chat are different now", done.stderr)


@POSIX
def test_ctrl_c_ends_the_answer_only(folder, server, monkeypatch):
    class Pressed(io.StringIO):
        """Ctrl-C is pressed when the third letter is there."""

        def write(self, text):
            super().write(text)
            if text and len(self.getvalue()) == 3:
                signal.raise_signal(signal.SIGINT)

    talk = streaming.ChatConsole(server, *streaming.parse(["--chat", "--temperature", "0"]))
    with contextlib.redirect_stdout(Pressed()) as out:
        talk.say("Hello")
    text = out.getvalue().removesuffix("\n")
    assert 3 <= len(text) < 7
    assert_holds(talk.chats, talk.session, [user("Hello"), assistant(text)])
    read = server.decoder.read

    def pressed(*values):
        signal.raise_signal(signal.SIGINT)
        return read(*values)

    monkeypatch.setattr(server.decoder, "read", pressed)
    talk.say("42?")  # while its prompt is read
    assert len(talk.chats.history(talk.session).messages) == 2


@pytest.mark.parametrize(
    "words, lines, fragments",
    [
        (["--checkpoint", "plain.pt"], "", ["chat", "no chat template", "--tokenizer"]),
        (["--load_session", "text"], "", ["chat: the session has text that is no chat"]),
        ([], "/undo\nHello\n", ["undo: the chat has no turn to undo"]),
        ([], "/load model.pt\n", ["model.pt"]),
        (["--checkpoint", "strict.pt"], "Hello\n/system x\n", ["rejects them (no system)"]),
        (["--checkpoint", "deaf.pt"], "/system x\n", ["system: the chat template leaves it out"]),
    ],
)
def test_what_is_wrong_with_a_chat_is_one_line(folder, server, words, lines, fragments):
    server.create_session("text")
    server.generate_text("Hello", "text", max_new_tokens=1)
    server.save_session("text", folder / "text")
    server.delete_session("text")
    assert_refused(console(folder, *words, lines=lines), *fragments)


def test_a_system_message_needs_a_chat(folder):
    done = run_main(streaming.main, "--system", "x", "--prompt", "y", cwd=folder)
    assert_refused(done, "--system: needs a chat")


# ------------------------------------------------------------------------------------- the server


@pytest.fixture(scope="module")
def served(folder):
    """A server of the model, over HTTP."""
    library = StreamingServer(folder / "model.pt", "cpu", cache_bytes=2**24)
    with running(library=library) as server:
        yield server


def test_answers_of_the_server_end_with_the_turn(served, server):
    greedy = {"temperature": 0, "max_tokens": 30}
    want = server.generate_text(ids_of(server, [user("Hello")]), stop_ids=[0], **GREEDY)
    body = {"messages": [user("Hello")], **greedy}
    (choice,) = served.post(CHAT, **body)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (want, "stop")
    streamed = [*served.ai.chat.completions.create(model=NAME, stream=True, **body)]
    assert "".join(part.choices[0].delta.content or "" for part in streamed) == want
    assert streamed[-1].choices[0].finish_reason == "stop"
    answer = served.ai.responses.create(
        model=NAME, input="Hello", temperature=0, max_output_tokens=30
    )
    assert (answer.output_text, answer.status) == (want, "completed")
    form = {"structured_outputs": {"choice": ["xq", "zj"]}}
    (choice,) = served.post(CHAT, **body, **form)["choices"]
    assert choice["message"]["content"] in ("xq", "zj") and choice["finish_reason"] == "stop"
    prompt = {"prompt": ids_of(server, [user("Hello")]), **greedy}
    (choice,) = served.post(COMPLETIONS, **prompt)["choices"]
    assert choice["finish_reason"] == "length", "plain text has no turns"
    assert served.http.get("/v1/models").json()["data"][0]["chat_template"] is True


# --------------------------------------------------------------------- transformers and benchmark


@pytest.fixture(scope="module")
def converted(folder) -> Path:
    """The model in a folder of transformers."""
    convert(str(folder / "model.pt"), str(folder / "hf"))
    return folder / "hf"


def test_a_converted_folder_chats(converted, server, tmp_path):
    settings = json.loads((converted / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [2, 0]
    pipe = transformers.pipeline("text-generation", model=str(converted), device="cpu")
    messages = [SYSTEM | {"content": "Be brief"}, user("Hello")]
    (got,) = pipe(messages, max_new_tokens=30, do_sample=False)
    want = server.generate_text(ids_of(server, messages), stop_ids=[0], **GREEDY)
    assert got["generated_text"] == [*messages, assistant(want)]
    tuned = shutil.copytree(converted, tmp_path / "tuned")
    settings["eos_token_id"].append(7)  # by who trained it further
    (tuned / "generation_config.json").write_text(json.dumps(settings))
    convert(str(tuned), str(tmp_path / "again"))
    again = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert again["eos_token_id"] == [2, 0, 7]
    assert "apply_chat_template" in (converted / "README.md").read_text()


def test_a_converted_template_has_the_tokens_that_it_was_written_for(tmp_path):
    """transformers gives bos_token and eos_token of its own: those that separate texts."""
    text = "\n  {% if true %}{{ bos_token }}{% endif %}" + CHATML.replace(
        "'<|im_end|>'", "eos_token"
    )
    special = {"bos_token": "<|im_start|>", "eos_token": END, "image_token": "'\\"}
    tokenizer = tokenizer_of(text + "{{ image_token }}", **special)
    TinyMambaHFTokenizer.of(tokenizer).save_pretrained(tmp_path)
    for again in (SimpleTokenizer(tmp_path / "tokenizer.json"), tokenizer):
        loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
        got = loaded.apply_chat_template([user("Hello")], add_generation_prompt=True)
        assert got["input_ids"] == ChatTemplate(again).encode([Message(**user("Hello"))])
    assert TinyMambaHFTokenizer.of(tokenizer).turn_end == 0
    assert TinyMambaHFTokenizer.of(again).eos_token_id == 2


def evaluate(folder: Path, place: Path, *words) -> subprocess.CompletedProcess:
    """benchmark.py on the chats of a place."""
    words = ["--tinymamba_checkpoint", folder / "model.pt", "--device", "cpu", *words]
    return run_main(benchmark.main, "--benchmark_type", "chat", *words, cwd=place)


def held_out(folder: Path, server: StreamingServer) -> list[list[dict]]:
    """Chats in chats.jsonl: one answer of four is what the model says itself."""
    own = server.generate_text(ids_of(server, [user("Hello")]), stop_ids=[0], **GREEDY)
    chats = [
        [user("Hello"), assistant(own), user("42?"), assistant("the <|im_end|> theme")],
        [SYSTEM, user("und"), assistant(" so weiter, für Köln\n")],
        [user("the"), assistant("x"), user("other")],
    ]
    rows = [json.dumps({"messages": chat, "id": i}) + "\n" for i, chat in enumerate(chats)]
    (folder / "chats.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return chats


def test_the_loss_of_answers_is_that_of_transformers(folder, server, converted, tmp_path):
    """As lm-evaluation-harness scores: the log-likelihood of an answer after its chat."""
    chats = held_out(tmp_path, server)
    words = ["--data", "chats.jsonl", "--dtype", "float32", "--batch_sizes", 3]
    done = evaluate(folder, tmp_path, *words, "--answer_tokens", 30)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "benchmark_results" / "results.json").read_text())["rows"]

    model = TinyMambaHFModel.from_pretrained(converted)
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted)
    losses, same, ended = [], 0, 0
    for messages in chats:
        for i, m in enumerate(messages):
            if m["role"] != "assistant":
                continue
            context = ids_of(server, messages[:i])
            answer = [*server.tokenizer.encode(m["content"]), 0]
            if not any(END in each["content"] for each in messages[: i + 1]):
                asked = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True)
                whole = tokenizer.apply_chat_template(messages[: i + 1])["input_ids"]
                assert asked["input_ids"] == context
                assert whole[: len(context + answer)] == context + answer
            logits = model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
            losses += F.cross_entropy(logits, torch.tensor(answer), reduction="none").tolist()
            ids = model.generate(torch.tensor([context]), max_new_tokens=30, do_sample=False)
            said = ids[0, len(context) :].tolist()
            same += said == answer
            ended += said[-1] == 0
    assert row["tokens"] == len(losses) and row["answers"] == 4
    assert row["nats_per_token"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert (row["exact_match"], row["ended"]) == (same / 4, ended / 4)
    assert same >= 1
    assert "4 answers: " in (tmp_path / "benchmark_results" / "results.md").read_text()


COLON = CHATML.replace("'\\n' + m.content", "':' + m.content").replace("assistant\\n", "assistant:")
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
"""
LIKELIHOOD = """output_type: loglikelihood
doc_to_target: "{{answer}}<|im_end|>"
metric_list: [{metric: perplexity}]
"""
WRITTEN = """output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["<|im_end|>"], do_sample: false, max_gen_toks: 30}
metric_list: [{metric: exact_match}]
"""


@pytest.mark.slow
def test_lm_evaluation_harness_has_the_same_scores_with_its_chat_template(tmp_path):
    """White space at the end of a prompt would count as part of the answer in the harness."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    save_model(tmp_path / "model.pt", talkative(COLON))
    server = StreamingServer(tmp_path / "model.pt", "cpu")
    own = server.generate_text(ids_of(server, [user("Hello")]), stop_ids=[0], **GREEDY)
    pairs = [("Hello", own), ("42?", "the theme"), ("und", "so weiter")]
    chats = [{"messages": [user(asked), assistant(said)]} for asked, said in pairs]
    rows = [{"question": asked, "answer": said} for asked, said in pairs]
    for name, lines in {"chats": chats, "rows": rows}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name, rest in {"likelihood": LIKELIHOOD, "written": WRITTEN}.items():
        task = TASK.format(name=name, file=tmp_path / "rows.jsonl") + rest
        (tmp_path / f"{name}.yaml").write_text(task)
    words = ["--data", "chats.jsonl", "--dtype", "float32", "--answer_tokens", 30]
    assert evaluate(tmp_path, tmp_path, *words).returncode == 0
    (row,) = json.loads((tmp_path / "benchmark_results" / "results.json").read_text())["rows"]

    convert(str(tmp_path / "model.pt"), str(tmp_path / "hf"))
    lm = HFLM(pretrained=str(tmp_path / "hf"), batch_size=2, device="cpu", dtype="float32")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    settings = {"task_manager": manager, "bootstrap_iters": 0, "apply_chat_template": True}
    found = simple_evaluate(lm, tasks=["likelihood", "written"], **settings)["results"]
    nats = math.log(found["likelihood"]["perplexity,none"]) * len(pairs) / row["tokens"]
    assert row["nats_per_token"] == pytest.approx(nats, abs=1e-5)
    assert row["exact_match"] == found["written"]["exact_match,none"] == 1 / 3


def test_one_token_is_no_whole_answer_and_rows_can_be_limited(folder, server, tmp_path):
    held_out(tmp_path, server)
    words = ["--data", "chats.jsonl", "--limit", 1, "--answer_tokens", 1]
    assert evaluate(folder, tmp_path, *words).returncode == 0
    (row,) = json.loads((tmp_path / "benchmark_results" / "results.json").read_text())["rows"]
    assert (row["answers"], row["ended"], row["exact_match"]) == (2, 0, 0)


def test_chats_are_read_in_all_forms_that_are_prepared(folder, server, tmp_path):
    """The same chats score the same as messages, ShareGPT's rows, Parquet, or split prompts."""
    chats = [c for c in held_out(tmp_path, server) if c[-1]["role"] == "assistant"]
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    shared = [[{"from": names[m["role"]], "value": m["content"]} for m in c] for c in chats]
    rows = {
        "a.jsonl": [{"messages": c} for c in chats],
        "b.json.gz": [{"conversations": c} for c in shared],
        "c.parquet": [{"messages": c, "id": i} for i, c in enumerate(chats)],
        "d.jsonl": [{"prompt": c[:-1], "completion": c[-1:]} for c in chats],
    }
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.Table.from_pylist(rows["c.parquet"]), tmp_path / "c.parquet")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(rows["b.json.gz"]).encode()))
    for name in ("a.jsonl", "d.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    for name in rows:
        assert [said for _, said in read_chats([str(tmp_path / name)])] == chats

    scores = []
    for files in (["a.jsonl"], [*rows, "a.txt"]):
        (tmp_path / "a.txt").write_text("no table")
        done = evaluate(folder, tmp_path, "--data", *files, "--answer_tokens", 1, "--force")
        assert done.returncode == 0, done.stderr
        results = (tmp_path / "benchmark_results" / "results.json").read_text()
        scores.append(json.loads(results)["rows"][0])
    assert "left out: text, not a table: 1 (a.txt)" in done.stdout + done.stderr
    assert [each["answers"] for each in scores] == [3, 12]
    assert scores[1]["tokens"] == 4 * scores[0]["tokens"]
    assert scores[1]["nats_per_token"] == pytest.approx(scores[0]["nats_per_token"], abs=1e-5)


PAIR = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.mark.parametrize(
    "words, text, fragments",
    [
        ([], None, ["needs --data"]),
        (["--data", "nowhere.jsonl"], None, ["nowhere.jsonl: no such file or folder"]),
        (["--data", "a.jsonl"], "", ["a.jsonl: is empty"]),
        (["--data", "a.jsonl"], "\n", ["--data: has no chats"]),
        (["--data", "a.jsonl"], ROW + "{", ["a.jsonl:2: not JSON"]),
        (
            ["--data", "a.jsonl"],
            ROW + '{"messages": [1]}',
            ["a.jsonl:2: messages.0 is no message", "give role and content"],
        ),
        (["--data", "a.jsonl"], ROW.replace('"a"', "1"), ["a.jsonl:1: messages.0 is int"]),
        (
            ["--data", "a.jsonl"],
            ROW.replace("user", "boss"),
            ["a.jsonl:1: messages.0 has the role 'boss'"],
        ),
        (["--data", "a.jsonl"], ROW.replace("assistant", "user"), ["turns 1 and 2 are both of"]),
        (["--data", "a.jsonl"], ROW.replace("assistant", "tool"), ["a.jsonl:1: no turn of assis"]),
        (["--data", "a.jsonl"], PAIR, ["a.jsonl:1: has two answers, chosen and rejected"]),
        (
            ["--data", "a.jsonl"],
            ROW.replace('"a"', '"\\ud800"'),
            ["a.jsonl:1: half a surrogate pair", "--encoding_errors replace"],
        ),
    ],
)
def test_rows_that_cannot_be_asked_are_named(folder, tmp_path, words, text, fragments):
    if text is not None:
        (tmp_path / "a.jsonl").write_text(text)
    assert_refused(evaluate(folder, tmp_path, *words), *fragments)
    if "a.jsonl" in words:
        done = evaluate(folder, tmp_path, *words, "--tinymamba_checkpoint", folder / "plain.pt")
        assert_refused(done, "--tinymamba_checkpoint: the model has no chat template")
