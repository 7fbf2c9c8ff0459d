"""The exported site in headless Chromium, from a file server, without a network, and from file://."""

import contextlib
import http.server
import json
import re
import shutil
import threading
from pathlib import Path

import pytest
from browser import DARK, PHONE, Tabs, sideways, violations
from helpers import NPM_PACKAGES, run_main, run_script
from page_helpers import fill, generate, make_fork, settle, text
from playwright.sync_api import Page, expect
from web_helpers import shared_site

import streaming
from onnx_generate import OnnxModel
from streaming import StreamingServer
from tinymamba.chat_session import ChatSessions
from tinymamba.onnx_engine import GRAPH_FILES
from tinymamba.web_site import find_files, write_site

PATH = "/some/folder/"
GREEDY = {"temperature": 0.0}
NO_SIMD = b"WebAssembly.validate = () => false;\n"


class Site(http.server.ThreadingHTTPServer):
    """A file server of this machine, with a site below a folder of its root."""

    daemon_threads = True

    def __init__(self, folder: Path):
        self.folder = folder
        self.down = False  # as if there were no network
        self.changed: dict = {}  # what other content, or None, files of these names have
        self.weights = threading.Event()  # once it is set, weights.data is sent
        self.weights.set()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}{PATH}"

    def handle_error(self, request, client_address):
        """A browser that closes a connection is no error."""


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Site

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        assert name != "weights.data" or self.server.weights.wait(60)
        if self.server.down:
            self.connection.close()
        elif name not in self.server.changed:
            super().do_GET()
        elif self.server.changed[name] is None:
            self.send_error(404)
        else:
            self.send_content(name, self.server.changed[name])

    def send_content(self, name: str, content: bytes):
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(name))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def translate_path(self, path):
        inside = path.startswith(PATH)
        return str(self.server.folder / path.removeprefix(PATH)) if inside else "/none"

    def end_headers(self):
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, *_):
        """Nothing is printed."""


@contextlib.contextmanager
def served(folder: Path):
    with Site(folder) as site:
        thread = threading.Thread(target=site.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield site
        finally:
            site.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return shared_site(tmp_path_factory)


@pytest.fixture(scope="module")
def site(place):
    with served(place / "site") as site:
        yield site


@pytest.fixture(scope="module")
def tabs(chromium):
    tabs = Tabs(chromium)
    yield tabs
    tabs.close()


@pytest.fixture(scope="module")
def opened(site, tabs) -> Page:
    """The page, opened once: to compile the runtime takes a second."""
    page = tabs("about:blank", service_workers="block")
    return load(page, site.url)


@pytest.fixture
def page(opened, tabs):
    """The page at a new text; no branch of another test is listed."""
    remove = opened.get_by_role("button", name="Delete")
    for _ in range(opened.get_by_role("treeitem").count()):
        remove.click()
        settle(opened)
    expect(opened.get_by_role("treeitem")).to_have_count(0)
    opened.get_by_role("button", name="New text").click()
    opened.locator("#prompt").fill("")
    fill(opened, seed="", temperature=0.8, min_p=0)
    yield opened
    assert tabs.errors == []


@pytest.fixture(scope="module")
def server(place) -> StreamingServer:
    return StreamingServer(place / "tiny.pt", "cpu")


@pytest.fixture(scope="module")
def greedy(place, server):
    """The text after a prompt as onnx_generate.py continues it, and the ASCII characters of it."""
    model = OnnxModel(find_files(place / "site"))

    def continued(prompt: str, count: int) -> str:
        ids = [*model.generate(server.tokenizer.encode(prompt), count)]
        return visible(server.tokenizer.decode(ids))

    return continued


def visible(text: str) -> str:
    """Text without what bytes that are no characters have become."""
    return re.sub("[^ -~]", "", text)


def load(page: Page, url: str, name: str = "tiny") -> Page:
    page.goto(url)
    return begin(page, name)


def begin(page: Page, name: str = "tiny") -> Page:
    """A new text, once the page has loaded its model: it would begin with a chat."""
    expect(page.locator("#model")).to_have_text(name)
    page.get_by_role("button", name="New text").click()
    return page


def download(page: Page, file: Path) -> Path:
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save").click()
    saved.value.save_as(file)
    return file


# ------------------------------------------------------------------------------------- texts


def test_texts_are_those_of_onnx_generate_also_after_fork_undo_save_and_open(
    page, server, greedy, tmp_path
):
    def python(prompt: str, session: str, count: int = 30) -> str:
        return prompt + server.generate_text(prompt, session, max_new_tokens=count, **GREEDY)

    own = server.create_session()
    first = python("the theme of", own, 300)
    generate(page, "the theme of", 300, **GREEDY)
    assert text(page) == first and len({*first}) > 50
    assert visible(first) == "the theme of" + greedy("the theme of", 300)
    forked = first + python("und", server.fork_session(own))
    make_fork(page)
    generate(page, "und", 30, **GREEDY)
    assert text(page) == forked
    page.get_by_role("treeitem").first.click()
    generate(page, "x", 20, **GREEDY)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#prompt")).to_have_value("x")
    expect(page.locator(".mine:text-is('x')")).to_have_count(0)
    assert text(page) == first
    file = download(page, tmp_path / "a.safetensors")
    generate(page, "und", 30, **GREEDY)
    assert text(page) == forked
    page.locator("#file").set_input_files(file)
    expect(page.get_by_role("treeitem")).to_have_count(3)
    generate(page, "und", 30, **GREEDY)
    assert text(page).endswith(forked.removeprefix(first))


def test_a_session_goes_to_streaming_and_back(page, place, tmp_path):
    generate(page, "für 日本", 20, seed=1)
    file, back = download(page, tmp_path / "web.safetensors"), tmp_path / "python.safetensors"
    words = ["--checkpoint", place / "tiny.pt", "--device", "cpu", "--load_session", file]
    words += ["--save_session", back, "--prompt", "und", "--max_tokens", 12]
    done = run_main(streaming.main, *words)
    assert done.returncode == 0, done.stderr
    page.locator("#file").set_input_files(back)
    expect(page.get_by_role("treeitem")).to_have_count(2)
    settle(page)
    assert download(page, tmp_path / "again.safetensors").read_bytes() == back.read_bytes()


def test_a_chat_is_that_of_chat_sessions(page, server):
    chats = ChatSessions(server, {"max_new_tokens": 12, "temperature": 0.0})
    own = server.create_session()
    chats.set_system(own, "Be kind.")
    fill(page, system="Be kind.")
    page.get_by_role("button", name="New chat").click()
    for said in ("Hello there", "42?"):
        with contextlib.closing(chats.ask(own, said)) as turn:
            want = "".join(chunk.text for chunk in turn)
        generate(page, said, 12, **GREEDY)
        assert page.locator(".turn").last.text_content().replace("\u200b", "") == want


# --------------------------------------------------------------------------- without a network


def test_the_site_works_offline_and_a_new_export_replaces_it(place, tmp_path, browse):
    shutil.copytree(place / "site", tmp_path / "site")
    with served(tmp_path / "site") as site:
        page = load(browse("about:blank"), site.url)
        generate(page, "the", 20, **GREEDY)
        want = text(page)
        old = expect_caches(page, [])
        site.down = True
        page.context.set_offline(True)
        page.reload()
        begin(page)
        generate(page, "the", 20, **GREEDY)
        assert text(page) == want
        site.down = False
        page.context.set_offline(False)
        site.folder = renamed(place / "site", tmp_path / "new", "other")
        page.reload()
        begin(page, "other")
        generate(page, "the", 20, **GREEDY)
        assert text(page) == want
        expect_caches(page, old)


def expect_caches(page: Page, old: list[str]) -> list[str]:
    """The caches, once there is one that is not among the old, and none of those."""
    state = """async () => [await caches.keys(),
        (await navigator.serviceWorker.getRegistration())?.active?.state ?? "none"]"""
    for _ in range(600):
        names, worker = page.evaluate(state)
        if worker == "activated" and len(names) == 1 and not {*names} & {*old}:
            return names
        page.wait_for_timeout(50)
    pytest.fail(f"the service worker is {worker}, the caches are {names}")


def renamed(site: Path, new: Path, name: str) -> Path:
    """Another export of the same model, of another name."""
    files = find_files(site)
    config = json.loads((files / "config.json").read_bytes())
    config["web"]["name"] = name
    new.mkdir()
    for file in (*GRAPH_FILES, config["web"]["tokenizer_file"]):
        shutil.copy(files / file, new)
    write_site(new, Path(streaming.__file__).with_name("page.html"), NPM_PACKAGES, config)
    return new


def test_a_single_file_works_without_a_server(place, browse, greedy):
    page = load(browse("about:blank"), (place / "single" / "tiny.html").as_uri())
    generate(page, "the theme", 60, **GREEDY)
    assert visible(text(page)) == "the theme" + greedy("the theme", 60)


# ----------------------------------------------------------------------- one page for everyone


def test_a_phone_in_the_dark_has_all_of_it(site, browse):
    page = load(browse("about:blank", service_workers="block", **PHONE, **DARK), site.url)
    generate(page, "the", 60, seed=1)
    assert page.evaluate("() => performance.now()") < 10_000
    first = page.locator(".token").count()
    page.locator("#settings summary").click()
    assert first > 20 and sideways(page) == 0 and violations(page) == []


def test_the_page_says_that_it_loads_and_keeps_what_is_written_meanwhile(site, browse):
    page = browse("about:blank", service_workers="block")
    site.weights.clear()
    try:
        page.goto(site.url)
        expect(page.locator("#status")).to_have_text(re.compile(r"^Loading the model: \d+ MB …$"))
        fill(page, **GREEDY)
        page.locator("#prompt").fill("Hel")
        page.keyboard.press("Control+Enter")
        expect(page.locator("#surface")).to_have_attribute("aria-busy", "true")
        page.locator("#prompt").press_sequentially("lo")
    finally:
        site.weights.set()
    settle(page)
    expect(page.locator(".paper p").first).to_have_text("You")  # the model has a chat template
    assert page.locator(".turn.mine").text_content() == "Hello"
    expect(page.get_by_role("treeitem")).to_have_text(re.compile("^Hello .+"))
    assert page.locator("#prompt").input_value() == ""


class WorkerMemory:
    """What the worker of a page holds, by the debugger's protocol."""

    def __init__(self, page: Page):
        self.session = page.context.new_cdp_session(page)
        self.answers: list[dict] = []
        self.attached: list[str] = []
        on = self.session.on
        on("Target.attachedToTarget", lambda e: self.attached.append(e["sessionId"]))
        on("Target.receivedMessageFromTarget", self.receive)
        attach = {"autoAttach": True, "waitForDebuggerOnStart": False, "flatten": False}
        self.session.send("Target.setAutoAttach", attach)

    def receive(self, event: dict):
        message = json.loads(event["message"])
        if "id" in message:
            self.answers.append(message)

    def call(self, page: Page, method: str) -> dict:
        message = json.dumps({"id": 1, "method": method})
        where = {"sessionId": self.attached[0]}
        self.session.send("Target.sendMessageToTarget", {"message": message, **where})
        for _ in range(600):
            if self.answers:
                return self.answers.pop()["result"]
            page.wait_for_timeout(10)
        raise TimeoutError(method)

    def used(self, page: Page) -> float:
        """Bytes of objects and buffers after a collection."""
        self.call(page, "HeapProfiler.collectGarbage")
        usage = self.call(page, "Runtime.getHeapUsage")
        return usage["usedSize"] + usage["backingStorageSize"]


def test_5000_tokens_take_no_memory_and_typing_goes_on_meanwhile(page):
    page.evaluate("""() => {
        window.tasks = [];
        const observer = new PerformanceObserver(list => tasks.push(...list.getEntries()));
        observer.observe({entryTypes: ["longtask"]}); }""")
    memory = WorkerMemory(page)
    generate(page, "the theme of", 200, **GREEDY)
    before = memory.used(page)
    started = page.evaluate("() => performance.now()")
    page.get_by_role("button", name="New text").click()
    fill(page, max_tokens=5000, seed=1, temperature=0.8, min_p=0.9)  # the eos does not come
    page.locator("#prompt").fill("the")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".token").nth(300)).to_be_attached()
    page.locator("#prompt").press_sequentially("what I write next")
    expect(page.locator("#surface")).to_have_attribute("aria-busy", "true")
    settle(page)
    assert page.locator("#prompt").input_value() == "what I write next"
    longest = page.evaluate("() => Math.max(0, ...tasks.map(task => task.duration))")
    whole = page.evaluate("() => performance.now()") - started
    assert "5,00" in page.locator("#status").text_content()
    assert memory.used(page) < before + 3e6 and longest < whole / 4


def test_the_policy_keeps_the_page_from_other_places(site, browse):
    browse.expect("Content Security Policy")
    page = load(browse("about:blank", service_workers="block"), site.url)
    with served(site.folder) as other:
        reached = page.evaluate(
            """async (url) => { const image = new Image(); image.src = url + "?image";
                const loads = new Promise((done) => {
                    image.onload = () => done(true); image.onerror = () => done(false); });
                return [await fetch(url).then(() => true, () => false), await loads,
                    await import(url + "worker.js").then(() => true, () => false)]; }""",
            other.url,
        )
    assert reached == [False, False, False]


# ------------------------------------------------------------------------------- broken sites


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    "name, damage, said",
    [
        ("weights.data", None, "weights.data: cannot be loaded (status 404); load the page"),
        ("weights.data", cut, "weights.data"),
        ("step.onnx", cut, "model: cannot be used ("),
        ("config.json", cut, "config.json: cannot be used ("),
        ("config.json", lambda _: b"{}", "config.json: is not that of a site; export the model"),
        ("tokenizer.json", cut, "tokenizer.json: cannot be used ("),
        ("ort.wasm", cut, "ort.wasm: cannot be used ("),
        ("worker.js", lambda own: NO_SIMD + own, "browser: has no WebAssembly SIMD; use a newer"),
        ("worker.js", None, "the model's worker failed: it cannot be read; reload the page"),
    ],
)
def test_what_is_wrong_with_a_site_is_one_line(name, damage, said, site, damaged):
    own = (find_files(site.folder) / name).read_bytes()
    site.changed = {name: damage and damage(own)}
    damaged.goto(site.url)
    alert = damaged.get_by_role("alert")
    expect(alert).to_contain_text(said)
    line = alert.text_content()
    assert "; " in line and "\n" not in line and len(line) < 300
    expect(damaged.locator("#status")).to_be_empty()
    damaged.locator("#prompt").fill("my words")
    damaged.keyboard.press("Control+Enter")
    if name != "worker.js" or damage:
        expect(alert).to_have_text(line)  # still, or again
        assert damaged.locator("#prompt").input_value() == "my words"


@pytest.fixture(scope="module")
def damaged_tabs(chromium):
    """Tabs in which errors are the point; only some of them reach the console."""
    tabs = Tabs(chromium)
    yield tabs
    pattern = "404|Aborted|CompileError|wasm"
    tabs.errors = [error for error in tabs.errors if not re.search(pattern, error)]
    tabs.close()


@pytest.fixture
def damaged(damaged_tabs, site):
    if not damaged_tabs.contexts:
        damaged_tabs("about:blank", service_workers="block")
    yield damaged_tabs.contexts[0].pages[0]
    site.changed = {}


def test_the_benchmark_measures_the_page_and_python(site, tmp_path):
    words = ["--site", site.folder, "--tokens", 8, "--rounds", 1, "--long", 9]
    done = run_script("benchmarks.web", *words, "--output", "rows.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["first_token_seconds"] > 0 and row["page_by_native"][0] > 0
    assert len(row["memory_mb"]) == 2
