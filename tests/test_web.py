"""A model in the browser: the site, and its engine under node against StreamingServer."""

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import NPM_PACKAGES, ROOT, assert_refused, free_copy, lacking, run_main, wide
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from web_helpers import reuse_graphs, shared_site, tiny_chat_model

import export_model
from onnx_generate import OnnxModel
from streaming import StreamingConfig, StreamingServer
from testv2 import TinyMambaModel, generate, load_model
from tinymamba.chat_session import ChatSessions
from tinymamba.checkpoint import pack_tensors, save_model, unpack_tensors
from tinymamba.tokenizer import SimpleTokenizer
from tinymamba.web_site import CHAT, RUNTIME, find_files, find_foreign, is_site

SAMPLED = {"temperature": 0.9, "top_k": 0, "seed": 3}
SERVICE_WORKER = (ROOT / "tinymamba" / "web" / "service_worker.js").read_bytes()


@pytest.fixture(scope="module")
def model() -> TinyMambaModel:
    return tiny_chat_model()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the checkpoint and its sites."""
    return shared_site(tmp_path_factory)


@pytest.fixture(scope="module")
def site(place) -> Path:
    return place / "site"


@pytest.fixture(scope="module")
def engine(site):
    """Calls a method of the engine of engine.js, which runs under node."""
    if not shutil.which("node"):
        lacking("node")
    command = ["node", "--expose-gc", ROOT / "tests" / "web_engine.mjs", find_files(site)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, encoding="utf-8", **pipes) as process:

        def call(method: str, *args):
            process.stdin.write(json.dumps([method, *args]) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            if "error" in answer:
                raise ValueError(answer["error"])
            return answer["result"]

        yield call
        process.stdin.close()


@pytest.fixture
def server(place) -> StreamingServer:
    return StreamingServer(place / "tiny.pt", "cpu")


def text_of(events: list[dict]) -> str:
    return "".join(event["text"] for event in events)


def tokens_of(events: list[dict]) -> list[dict]:
    return [token for event in events for token in event["tokens"]]


def settings(**given) -> tuple[dict, dict]:
    """The same settings for the engine and for Python."""
    return given, {{"max_tokens": "max_new_tokens"}.get(n, n): v for n, v in given.items()}


# ------------------------------------------------------------------------------------ answers


def test_300_greedy_tokens_are_those_of_onnx_generate_and_of_the_model(engine, site, server):
    model, prompt = server.model, "the theme of"
    given, known = settings(max_tokens=300, temperature=0.0)
    ids, session = server.tokenizer.encode(prompt), engine("create", {})["id"]
    events = engine("generate", session, {"prompt": prompt, **given})
    made = [token["id"] for token in tokens_of(events)]
    assert len(set(made)) > 1 and len(made) == 300
    assert made == [*OnnxModel(find_files(site)).generate(ids, 300)]
    assert made == generate(model, torch.tensor([ids]), 300, 0.0)[0, len(ids) :].tolist()
    assert text_of(events) == server.generate_text(prompt, **known)


def test_seeds_forks_undo_and_later_turns_are_those_of_the_server(engine, server):
    web, own = engine("create", {"seed": 7})["id"], server.create_session(seed=7)
    turns = [("und so", 40, {}), ("", 30, {"temperature": 1.2}), ("für Köln", 25, SAMPLED)]
    turns += [("x", 20, {"top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.3}), ("y", 0, {})]
    for prompt, count, more in turns:
        given, known = settings(max_tokens=count, **more)
        events = engine("generate", web, {"prompt": prompt, **given})
        assert text_of(events) == server.generate_text(prompt, own, **known)
    info = events[-1]["session"]
    place = server.get_session_info(own)
    assert [info["tokens"], info["turns"]] == [place["position"], place["turns"]]
    assert info["turns"] == 5
    fork, python_fork = engine("fork", web, {"seed": 9})["id"], server.fork_session(own, seed=9)
    server.rollback(own)
    assert engine("rollback", web)["tokens"] == server.get_session_info(own)["position"]
    given, known = settings(max_tokens=30)
    for a, b in ((web, own), (fork, python_fork)):
        assert text_of(engine("generate", a, given)) == server.generate_text("", b, **known)


def test_every_turn_can_be_undone(engine):
    session, before = engine("create", {"seed": 1})["id"], []
    for prompt in "abc":
        before.append(engine("sessions")[-1]["tokens"])
        engine("generate", session, {"prompt": prompt, "max_tokens": 5})
    for tokens in reversed(before):
        assert engine("rollback", session)["tokens"] == tokens
    with pytest.raises(ValueError, match="session: has no turn to undo; generate something first"):
        engine("rollback", session)


def test_a_stopped_answer_is_exactly_the_text_that_was_given_out(engine, server):
    session, own = engine("create", {"seed": 5})["id"], server.create_session(seed=5)
    given, known = settings(max_tokens=100, **SAMPLED)
    events = engine("generate", session, {"prompt": "12 plus", "stop_after": 9, **given})
    answer = server.answer("12 plus", own, **known)
    with contextlib.closing(answer):
        text = "".join(next(answer).text for _ in range(len(events) - 1))
    assert text_of(events) == text and events[-1]["finish_reason"] == "stop"
    given, known = settings(max_tokens=20)
    assert text_of(engine("generate", session, given)) == server.generate_text("", own, **known)


def test_answers_at_once_do_not_change_each_other(engine):
    """Nor the stack that all of them use: what one leaves there would in time overwrite weights."""
    before = engine("heap")["stack"]
    calls = [
        ["generate", engine("create", {"seed": n})["id"], {"prompt": "the", "max_tokens": 30}]
        for n in (1, 2, 1)
    ]
    first, second, third = (text_of(events) for events in engine("together", *calls))
    assert first == third != second
    alone = engine("create", {"seed": 2})["id"]
    assert text_of(engine("generate", alone, {"prompt": "the", "max_tokens": 30})) == second
    assert engine("heap")["stack"] == before


@torch.no_grad()
def test_gates_and_norms_are_those_from_which_a_token_was_drawn(engine, model):
    tokenizer = SimpleTokenizer.from_dict(model.tokenizer)
    given = {"prompt": "the theme", "max_tokens": 4, "temperature": 0}
    tokens = tokens_of(engine("generate", engine("create", {})["id"], given))
    ids, state = tokenizer.encode("the theme"), model.init_state(1)
    for token in tokens:
        _, state, gates = model.run(torch.tensor([ids]), state)
        layer = state.layers[0]
        norms = [*layer.ssm[0].flatten(1).norm(dim=1), *layer.memory[0].flatten(1).norm(dim=1)]
        np.testing.assert_allclose(token["norms"], [norms], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(token["gates"], gates[:, 0, -1], atol=1e-5)
        ids = [token["id"]]
        assert token["text"] == tokenizer.decode(ids, skip_special_tokens=False)
    heads = engine("about")["heads"]
    assert heads == [layer.ssm.shape[1], layer.memory.shape[1]]


def test_chats_are_those_of_chat_sessions(engine, server):
    """Also where the template cuts what was said, so that the session has to go back."""
    chats = ChatSessions(server, {"max_new_tokens": 12, **SAMPLED})
    own = server.create_session()
    chats.set_system(own, "Be kind.")
    web = engine("create", {"chat": True, "system": "Be kind."})["id"]
    given = {"max_tokens": 12, **SAMPLED}
    for said in ("Hello there", "und <|im_end|> weiter", "42?"):
        with contextlib.closing(chats.ask(own, said)) as turn:
            text = "".join(chunk.text for chunk in turn)
        events = engine("generate", web, {"prompt": said, **given})
        assert text_of(events) == text
        assert events[-1]["session"]["tokens"] == server.get_session_info(own)["position"]
    server.rollback(own)
    info = engine("rollback", web)
    assert [info["tokens"], info["turns"]] == [server.get_session_info(own)["position"], 2]
    assert [*chats.history(own).messages] == python_chat(engine, web)["messages"]


def python_chat(engine, session: str) -> dict:
    """The chat in the file of a session."""
    data = base64.b64decode(engine("save", session)["base64"])
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["session"])["chat"]


def test_a_turn_that_is_stopped_before_its_text_changes_nothing(engine):
    session = engine("create", {"chat": True})["id"]
    engine("generate", session, {"prompt": "Hello", "max_tokens": 8, "seed": 1})
    before, packed = engine("sessions")[-1], engine("save", session)
    turn = ["generate", session, {"prompt": "x " * 700, "max_tokens": 8}]
    with pytest.raises(ValueError, match="session: is answering; wait until it is done"):
        engine("together", turn, turn, ["stop", session])
    [events, _] = engine("together", turn, ["stop", session])
    assert text_of(events) == "" and events[-1]["session"] == before
    assert engine("sessions")[-1] == before and engine("save", session) == packed


# -------------------------------------------------------------------------------------- files


def test_a_session_goes_to_python_and_back(engine, server, tmp_path):
    web = engine("create", {"seed": 2**53 - 1})["id"]
    engine("generate", web, {"prompt": "für 日本", "max_tokens": 20})
    (tmp_path / "web.safetensors").write_bytes(base64.b64decode(engine("save", web)["base64"]))
    own = server.load_session(tmp_path / "web.safetensors")
    given, known = settings(max_tokens=25)
    text = server.generate_text("und", own, **known)
    assert text_of(engine("generate", web, {"prompt": "und", **given})) == text
    packed = {"base64": base64.b64encode(server.pack_session(own)).decode()}
    again = engine("load", packed)
    assert again["tokens"] == server.get_session_info(own)["position"]
    assert engine("save", again["id"]) == packed  # the same bytes
    text = server.generate_text("x", own, **known)
    assert text_of(engine("generate", again["id"], {"prompt": "x", **given})) == text


def test_a_session_of_another_version_keeps_its_settings_or_is_refused(engine, server):
    """An earlier version had no penalties and no form; a later one may have what is not known."""
    own = server.create_session(seed=5, config=StreamingConfig(temperature=0.9))
    server.generate_text("the", own, max_new_tokens=5)
    whole = server.pack_session(own)
    text = server.generate_text("und", own, max_new_tokens=12)

    def packed(lacks: tuple = (), **more) -> dict:
        tensors, notes = unpack_tensors(whole, "file", server.tensors(server.blank()), {}, 1)
        about = json.loads(notes["session"])
        kept = {n: v for n, v in about["config"].items() if n not in lacks}
        about["config"] = {**kept, **more}
        notes = {"model": notes["model"], "session": json.dumps(about)}
        return {"base64": base64.b64encode(pack_tensors(tensors, notes)).decode()}

    lacks = ("structured_outputs", "presence_penalty", "frequency_penalty")
    old = engine("load", packed(lacks))["id"]
    assert engine("save", old) == packed()
    assert text_of(engine("generate", old, {"prompt": "und", "max_tokens": 12})) == text
    for setting, value in (("adapter", "poems"), ("structured_outputs", {"regex": "a"})):
        with pytest.raises(ValueError, match=f"file: the session has {setting}; open it in"):
            engine("load", packed(**{setting: value}))
    with pytest.raises(ValueError, match="file: the session has the setting top_n; export"):
        engine("load", packed(top_n=2))


@pytest.mark.parametrize(
    "call, problem",
    [
        (("fork", "x"), 'session: there is no "x"; create it first'),
        (("create", {"seed": -1}), "seed: -1 is invalid; it must be from 0 to 2"),
        (("create", {"system": "a"}), "system: is only for a chat; leave it out"),
        (("load", {"base64": "AAAA"}), "file: is not a session; choose another file"),
        (("new", {"temperature": -1}), "temperature: -1 is out of range; pass a number from 0"),
        (("new", {"top_k": 1.5}), "top_k: 1.5 is out of range; pass a whole number"),
        (("new", {"best_of": 3}), "best_of: is not a setting; use max_new_tokens"),
    ],
)
def test_errors_are_one_line(engine, call, problem):
    method, *args = call
    if method == "new":
        method, args = "generate", [engine("create", {})["id"], *args]
    with pytest.raises(ValueError) as error:
        engine(method, *args)
    assert str(error.value).startswith(problem) and "\n" not in str(error.value)


def test_memory_is_flat(engine):
    """Also where an answer is stopped within a character, and its last state is not kept."""
    session = engine("create", {"seed": 1})["id"]

    def answer(count: int, **given) -> None:
        engine("generate", session, {"prompt": "für 日本", "max_tokens": count, **SAMPLED, **given})

    answer(100)
    before = engine("heap")
    answer(400)
    for seed in range(40):
        answer(5, seed=seed, stop_after=3)
    after = engine("heap")
    for kind in ("heapUsed", "arrayBuffers"):
        assert after[kind] < before[kind] + 3_000_000
    assert after["wasm"] < before["wasm"] + 50_000 and after["stack"] == before["stack"]


# --------------------------------------------------------------------------------------- site


def test_the_command_checks_what_it_has_written(place):
    text = (place / "said.txt").read_text(encoding="utf-8")
    for said in ("60 of 60 in a row", "--- web\nimport os\n", "speedup of a step"):
        assert said in text


def test_a_site_loads_nothing_from_elsewhere(site):
    """Its addresses are relative; only copied packages name hosts, in messages and comments."""
    copied = {name for package in (RUNTIME | CHAT).values() for name in package.files}
    for path in (p for p in site.rglob("*") if p.is_file()):
        if path.suffix in (".js", ".html") and path.name not in copied:
            text = path.read_text(encoding="utf-8")
            assert not re.findall(r"""https?://|["'(]//\w|(?:src|href)="(?!data:)""", text), path
    page = (site / "index.html").read_text(encoding="utf-8")
    facts = json.loads(re.search('<script id="site"[^>]*>(.*?)</script>', page)[1])
    worker = site / facts["worker"]
    assert {path.name for path in worker.parent.iterdir()} == facts["files"].keys()
    assert all((worker.parent / name).is_file() for name in facts["files"].values())
    assert page.index('id="site"') < page.index("<script>\n")
    policy = re.search('Security-Policy" content="(.*?)">', page)[1]
    scripts = re.findall("<script>(.*?)</script>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in scripts]
    assert re.findall("'sha256-(.*?)'", policy.partition("style-src")[0]) == digests
    assert len(scripts) == 2 and "unsafe-inline" not in policy
    kept = (site / "service_worker.js").read_text(encoding="utf-8")
    assert all(f'"{worker.parent.name}/{name}"' in kept for name in facts["files"])
    licenses = (site / "LICENSES.txt").read_text(encoding="utf-8")
    assert all(
        f"{name} {package.version}" in licenses for name, package in (RUNTIME | CHAT).items()
    )


def test_another_model_is_another_folder_and_another_cache(site, place, monkeypatch):
    """So a page never mixes files of two exports, and its worker replaces what it has kept."""
    graphs = reuse_graphs(monkeypatch, site)
    other = free_copy(wide(vocab_size=320, n_layer=1, memory_every=1, tie_embeddings=False))
    other.tokenizer = SimpleTokenizer().to_dict()
    save_model(place / "other.pt", other)
    words = ["--format", "web", "--runtime", NPM_PACKAGES, "--output_dir", place / "again"]
    for name in ("tiny", "other"):
        done = run_main(export_model.main, "--checkpoint", place / f"{name}.pt", "--force", *words)
        assert done.returncode == 0, done.stderr
        same = files(place / "again") == files(site) - {"benchmark.json"}
        assert same == (name == "tiny")
    assert graphs and not (find_files(place / "again") / "chat.js").exists()
    done = run_main(export_model.main, "--checkpoint", "none.pt", "--force", *words)
    assert_refused(done, "none.pt: no such checkpoint")
    for name in (".git", "pytorch"):
        (place / "again" / name).mkdir()
        done = run_main(export_model.main, "--checkpoint", "none.pt", "--force", *words)
        assert_refused(done, "again", f"has {name}, which is of no export and would be deleted")
        (place / "again" / name).rmdir()


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_single_file_holds_everything(site, place):
    [page] = (place / "single").iterdir()
    text = page.read_text(encoding="utf-8")
    inlined = re.findall('data-file="([^"]*)" data-type="[^"]*">([A-Za-z0-9+/=]*)</script>', text)
    names = [name for name, _ in inlined]
    assert page.name == "tiny.html" and sorted(names) == sorted(os.listdir(find_files(site)))
    for name, data in inlined:  # a module comes after those that it imports
        if name.endswith(".js"):
            imported = re.findall(r'"\./([\w.-]+\.js)"', base64.b64decode(data).decode())
            assert {*imported} <= {*names[: names.index(name)]}, name
    assert "serviceWorker" not in text and "http://" not in text.split("data-file")[0]
    words = ["--checkpoint", place / "tiny.pt", "--format", "web", "--single_file"]
    words += ["--output_dir", place / "single", "--runtime", NPM_PACKAGES]
    assert_refused(run_main(export_model.main, *words), "tiny.html", "exists already")


class LoginServer(BaseHTTPRequestHandler):
    """A page with the site's service worker; it asks for a login once that is needed."""

    needs_login = False
    head = b'<link rel="icon" href="data:,">'
    page = head + b'<script>navigator.serviceWorker.register("worker.js")</script>the page'
    files = {
        "/": ("text/html", page),
        "/login": ("text/html", head + b"log in"),
        "/worker.js": ("text/javascript", b'const VERSION = "1", FILES = [];\n' + SERVICE_WORKER),
    }

    def do_GET(self):
        moved = self.path == "/" and LoginServer.needs_login
        kind, body = self.files.get(self.path, ("text/plain", b""))
        self.send_response(302 if moved else 200 if body else 404)
        self.send_header("Location" if moved else "Content-Type", "/login" if moved else kind)
        self.end_headers()
        self.wfile.write(b"" if moved else body)

    def log_message(self, *_):
        """Say nothing."""


def test_a_page_that_is_redirected_later_is_not_an_error(browse, monkeypatch):
    """A browser refuses a page that a service worker got from another address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), LoginServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        page = browse(url)
        page.evaluate("navigator.serviceWorker.ready.then(() => null)")
        page.wait_for_function("() => navigator.serviceWorker.controller")
        monkeypatch.setattr(LoginServer, "needs_login", True)
        page.goto(url)
        assert page.url == f"{url}login" and page.text_content("body") == "log in"
        server.shutdown()


# ------------------------------------------------------------------------------------- errors


def fake_packages(folder: Path, version: str) -> Path:
    """A folder node_modules with the files of the packages, of which one has this version."""
    for name, package in (RUNTIME | CHAT).items():
        for file in package.files.values():
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / file).touch()
        (folder / name / "package.json").write_text(json.dumps({"version": package.version}))
    (folder / "onnxruntime-web" / "package.json").write_text(json.dumps({"version": version}))
    return folder


def test_a_missing_or_other_runtime_is_one_line_with_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    install = "`npm install --no-package-lock onnxruntime-web@1.30.0 @huggingface/jinja@0.5.11`"

    def refused(folder: Path, *fragments: str) -> None:
        words = ["--format", "web", "--checkpoint", "none.pt", "--runtime", folder]
        done = run_main(export_model.main, *words, "--output_dir", "made")
        assert_refused(done, "--runtime: ", install, *fragments)
        assert not Path("made").exists()

    refused(Path("none"), "there is no folder none")
    Path("empty").mkdir()
    refused(Path("empty"), "empty has no onnxruntime-web")
    refused(fake_packages(Path("old"), "1.29.0"), "onnxruntime-web is 1.29.0")
    whole = fake_packages(Path("part"), "1.30.0")
    (whole / "@huggingface" / "jinja" / "dist" / "index.js").unlink()
    refused(whole, "jinja has no dist/index.js")
    (whole / "onnxruntime-web" / "package.json").write_text("{")
    refused(whole, "part has no onnxruntime-web")


@pytest.mark.parametrize(
    "words, fragments",
    [
        (["--format", "onnx", "--single_file"], ["--single_file", "does nothing for onnx"]),
        (["--format", "all", "--runtime", "x"], ["--runtime", "does nothing for all"]),
        (["--format", "web", "--quantize", "both"], ["--quantize", "a site has one model"]),
        (["--format", "web", "--quantize", "int4"], ["--calibration_data", "int4 needs it"]),
        (["--format", "web", "--batch_size", "2"], ["--batch_size", "read one text"]),
        (["--format", "web", "--single_file", "--benchmark"], ["--benchmark", "of a folder"]),
        (["--format", "web"], ["site", "exists already", "pass --force"]),
        (["--format", "web", "--force"], ["site", "is not an exported model"]),
        (["--format", "web", "--output_dir", "file"], ["file", "exists already"]),
        (["--format", "web", "--output_dir", "file/in"], ["file/in"]),
        (["--format", "web", "--checkpoint", "plain.pt", "--output_dir", "new"], ["--vocab_file"]),
    ],
)
def test_commands_that_cannot_be_done(words, fragments, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "plain.pt", free_copy(wide(n_layer=1)))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "own.txt").touch()
    (tmp_path / "file").touch()
    fake_packages(tmp_path / "node_modules", "1.30.0")
    before = files(tmp_path)
    done = run_main(export_model.main, "--checkpoint", place / "tiny.pt", *words)
    assert_refused(done, *fragments)
    assert files(tmp_path) == before


def test_a_tokenizer_that_the_page_cannot_read_is_refused(tmp_path, monkeypatch):
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    other = free_copy(wide(n_layer=1))
    other.tokenizer = {"name": "tokenizer.json", "content": words.to_str(), "sha256": "0"}
    other.tokenizer |= {"chat_template": None, "special_tokens": {}}
    save_model(tmp_path / "words.pt", other)
    monkeypatch.chdir(tmp_path)
    fake_packages(tmp_path / "node_modules", "1.30.0")
    done = run_main(export_model.main, "--checkpoint", "words.pt", "--format", "web")
    assert_refused(done, "--vocab_file", "WordLevel does not work in a browser")
    assert not Path("site").exists()


def test_a_site_is_named_as_users_name_the_model(tmp_path):
    (tmp_path / "model-v1.5").mkdir()
    for path in ("model-v1.5", "model-v1.5.pt"):
        options = export_model.Options(str(tmp_path / path), output_dir=tmp_path)
        assert options.single_page() == tmp_path / "model-v1.5.html"


def test_a_web_app_of_something_else_is_not_replaced(tmp_path):
    for name in ("index.html", "service_worker.js", "LICENSES.txt", "app/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert not is_site(tmp_path) and find_foreign(tmp_path) == "app"
    (tmp_path / "app").rename(tmp_path / "0123456789abcdef")
    assert is_site(tmp_path) and find_foreign(tmp_path) is None


def test_web_is_not_among_all_formats():
    assert "web" not in export_model.Options(format="all").formats()
    assert "web" not in export_model.Options(format="all", quantize="int8").formats()


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_quantized_site_runs(bits, place, tmp_path):
    (np.arange(4000, dtype=np.int32) % 320).tofile(tmp_path / "train.bin")
    data = ["--calibration_data", tmp_path / "train.bin", "--calibration_tokens", "2048"]
    data += ["--group_size", "16"]
    data = data if bits == "int4" else []
    words = ["--checkpoint", place / "tiny.pt", "--format", "web", "--quantize", bits, *data]
    done = run_main(
        export_model.main,
        *words,
        "--output_dir",
        place / bits,
        "--runtime",
        NPM_PACKAGES,
        "--verify",
    )
    assert done.returncode == 0, done.stderr
    folder = find_files(place / bits)
    command = ["node", "--expose-gc", ROOT / "tests" / "web_engine.mjs", folder]
    lines = '["create", {}]\n["sessions"]\n'
    ran = subprocess.run(command, input=lines, capture_output=True, text=True)
    assert ran.returncode == 0 and len(ran.stdout.splitlines()) == 2, ran.stderr
    web = json.loads((folder / "config.json").read_bytes())["web"]
    assert web["parameters"] == sum(p.numel() for p in load_model(place / "tiny.pt").parameters())
