"""page.html in headless Chromium: over serve.py, and with a worker in the place of a server."""

import gzip
import json
import re

import pytest
from browser import PHONE, Tabs, sideways, violations
from helpers import ROOT, free_copy, train_bpe, wide
from page_helpers import fill, generate, make_fork, settle, text
from playwright.sync_api import Page, expect
from serve_helpers import NAME, running, wait_until

from streaming import StreamingServer
from tinymamba.tokenizer import EOS_TOKEN, SimpleTokenizer

PAGE = (ROOT / "page.html").read_text(encoding="utf-8")
END = "<|im_end|>"
CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{{- '<|im_end|>' + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
SETTINGS = {"temperature": 0.8, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
HTML = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
LOOKS = ".token.attention, .token.ssm, .token.mlp"
STATE_BYTES = "#status >> text=/state [\\d,]+ kB/"

expect.set_options(timeout=30_000)


def speaker() -> StreamingServer:
    """A model of two layers with a chat template."""
    content = train_bpe(END, "<|im_start|>", EOS_TOKEN).to_str()
    shape = {"name": "tokenizer.json", "content": content, "chat_template": CHATML}
    tokenizer = SimpleTokenizer.from_dict({**shape, "special_tokens": {}})
    return StreamingServer(free_copy(wide(vocab_size=320)), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def server():
    with running(library=speaker(), max_tokens=10**6) as server:
        yield server


@pytest.fixture(scope="module")
def tabs(chromium):
    tabs = Tabs(chromium)
    tabs("about:blank")
    yield tabs
    tabs.close()


def load(server, page: Page) -> Page:
    """Open the page at a new text; no session of another test is listed."""
    for info in server.http.get("/v1/sessions").json()["data"]:
        server.http.delete(f"/v1/sessions/{info['id']}")
    page.goto(server.url + "/")
    expect(page.locator("#model")).to_have_text(NAME)
    page.get_by_role("button", name="New text").click()
    return page


@pytest.fixture
def page(server, tabs):
    """The page, loaded anew in a tab that tests share: a tab of its own takes most of a second."""
    page = load(server, tabs.contexts[0].pages[0])
    yield page
    page.unroute_all()
    assert tabs.errors == []


def branches(page: Page) -> list[tuple[int, str]]:
    """The levels and the names in the tree."""
    items = page.get_by_role("treeitem").all()
    return [(int(i.get_attribute("aria-level")), i.text_content()) for i in items]


def accessible(page: Page) -> None:
    assert violations(page) == []


# ------------------------------------------------------------------------------- as a file


def test_the_page_is_self_contained():
    assert len(PAGE.encode()) < 44_000 and len(gzip.compress(PAGE.encode())) < 15_000
    assert not re.findall(r"https?:|//[a-z]|@import|\bsrc=|innerHTML|eval\(", PAGE)
    assert PAGE.count("<script>") == PAGE.count("<style>") == 1, "their hashes are in the policy"
    assert not re.findall(r"\sstyle=|\son[a-z]+=", PAGE.partition("<script>")[0])


# ------------------------------------------------------------------------------ with a server


def test_a_text_is_that_of_the_library(server, page):
    generate(page, "Once", 30, seed=5)
    want = speaker().generate_text("Once", seed=5, max_new_tokens=30, **SETTINGS)
    assert text(page) == "Once" + want and text(page, ".paper .mine") == "Once"
    (session,) = server.http.get("/v1/sessions").json()["data"]
    assert f"{session['tokens']} tokens" in page.locator("#status").text_content()
    assert page.locator(STATE_BYTES).count() == 1
    assert page.locator("#prompt").input_value() == ""
    assert page.evaluate("() => document.activeElement.id") == "prompt"
    looks = page.locator(".token").evaluate_all("all => all.map(t => t.className)")
    assert len({look for look in looks if " l" in look}) > 2


def test_gates_are_shown_by_color_and_by_underline(page):
    generate(page, "ab", 40, seed=1)
    token, switch = page.locator(LOOKS).first, page.get_by_role("switch")
    style = """t => { const s = getComputedStyle(t);
        return [s.textDecorationLine, s.textDecorationStyle, s.backgroundColor]; }"""
    kind = {"ssm": "solid", "attention": "dotted", "mlp": "wavy"}[
        token.get_attribute("class").split()[1]
    ]
    assert token.evaluate(style)[:2] == ["underline", kind]
    switch.click()
    assert token.evaluate(style) == ["none", "solid", "rgba(0, 0, 0, 0)"]
    assert switch.get_attribute("aria-checked") == "false"
    switch.press("Enter")
    assert token.evaluate(style)[1] == kind


def test_layers_and_state_are_those_of_the_token(server, page):
    generate(page, "ab", 40, seed=1)
    expect(page.locator("#layers caption")).to_have_text(re.compile("Mean of (39|40) tokens"))
    page.locator("#columns .paper").first.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    token = page.locator(".token.selected")
    quoted = json.dumps(token.text_content(), ensure_ascii=False)
    expect(page.locator("#readout")).to_have_text(re.compile(re.escape(quoted) + ": SSM 0"))
    cells = [float(c) for c in page.locator("#layers td").all_text_contents()]
    gates = token.evaluate("t => t.piece.gates")
    assert cells == [pytest.approx(g, abs=0.006) for layer in gates for g in layer]
    assert len(cells) == 3 * len(server.api.server.model.blocks)
    before, after = page.locator("#before"), page.locator("#after")
    before.click()
    after.click()
    assert json.dumps(token.text_content(), ensure_ascii=False) == quoted
    page.keyboard.press("Escape")
    assert token.count() == 0
    heads = server.http.get("/v1/models").json()["data"][0]["heads"]
    expect(page.locator("#changes")).to_have_text(
        re.compile(r"Of \d+ heads, \d+ have grown\. Most: layer")
    )
    assert page.evaluate("() => about.heads") == heads
    shades = page.locator("canvas").evaluate(
        "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
    )
    assert shades > 20, "the strip is drawn"


def test_branches_fork_undo_and_compare(server, page):
    generate(page, "One ", seed=1)
    generate(page, "Two ", seed=2)
    start = text(page)
    make_fork(page)
    generate(page, "Three ", seed=3)
    assert text(page).startswith(start + "Three ") and len(server.api.server.sessions) == 2
    (root, name), (level, fork) = branches(page)
    assert (root, level) == (1, 2) and name.startswith("One ") and fork.startswith("Three ")
    page.get_by_role("treeitem").first.click()
    generate(page, "Four ", seed=3)
    page.get_by_role("button", name="Compare").click()
    settle(page)
    columns = [text(page, f"#columns .paper >> nth={i}") for i in (0, 1)]
    assert [c.split()[0] for c in columns] == ["Four", "Three"], "without what they have in common"
    common = page.locator("#common")
    assert common.get_attribute("open") is None and text(page, "#common .paper") == start
    page.locator("#seed").fill("7")
    page.get_by_role("button", name="Generate in both").click()
    settle(page)
    assert [s.turns for s in server.api.server.sessions.values()] == [4, 4]
    page.get_by_role("button", name="Compare").click()
    settle(page)
    grown = text(page)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#undo")).to_have_attribute("aria-disabled", "true")
    generate(page, "Five", seed=4)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#prompt")).to_have_value("Five")
    expect(page.locator("#undo")).to_have_attribute("aria-disabled", "true")
    assert text(page) == start + columns[0] and grown.startswith(text(page))
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("treeitem")).to_have_count(1)
    assert len(server.api.server.sessions) == 1 and branches(page)[0][0] == 1


def test_a_chat_is_that_of_the_server(server, page):
    page.get_by_text("Settings").click()
    page.get_by_label("System message").fill("Be brief")
    page.get_by_role("button", name="New chat").click()
    asked, messages = [], [{"role": "system", "content": "Be brief"}]
    page.on(
        "request",
        lambda r: asked.append(r.post_data_json) if r.url.endswith("/chat/completions") else None,
    )
    for turn, words in enumerate(["Hello", "42?"]):
        generate(page, words, temperature=0)
        messages.append({"role": "user", "content": words})
        assert asked[turn]["messages"] == messages and asked[turn]["gates"] is True
        body = {"messages": messages, "max_tokens": 12, **SETTINGS, "temperature": 0}
        (choice,) = server.post("/v1/chat/completions", **body)["choices"]
        said = page.locator(".turn").last.text_content().replace("\u200b", "")
        assert said == choice["message"]["content"] and page.locator(".token").count() > turn
        messages.append({"role": "assistant", "content": said})
    assert page.locator(".paper p").all_text_contents() == ["System: Be brief", *["You", NAME] * 2]
    assert page.locator("#layers td").count() and not server.api.server.sessions
    make_fork(page)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#prompt")).to_have_value("42?")
    expect(page.locator(".turn.mine")).to_have_count(1)
    generate(page, "Why?")
    assert asked[-1]["messages"] == [*messages[:3], {"role": "user", "content": "Why?"}]
    generate(page, " ")
    assert "a chat needs words" in page.get_by_role("alert").text_content()
    accessible(page)


def test_an_answer_is_stopped_and_its_text_stays(server, page):
    fill(page, max_tokens=10**6, seed=1)
    for kind in ("New text", "New chat"):
        page.get_by_role("button", name=kind).click()
        page.locator("#prompt").fill("ab")
        page.keyboard.press("Control+Enter")
        expect(page.locator(".token").nth(3)).to_be_attached()
        expect(page.locator("#go")).to_have_attribute("aria-disabled", "true")
        page.locator("#prompt").press_sequentially("my next words")
        page.keyboard.press("Escape")
        settle(page)
        wait_until(lambda: server.busy() == 0)
        assert page.locator(".token").count() > 3 and "ab" in text(page)
        assert page.locator("#prompt").input_value() == "my next words"
        assert page.get_by_role("alert").text_content() == ""
    (session,) = server.api.server.sessions.values()
    assert session.turns == 1


def test_without_the_key_there_is_an_error_and_with_it_all_sessions(browse):
    with running(library=speaker(), api_key="secret") as server:
        server.ai.post("/sessions", body={"id": "old"}, cast_to=object)
        server.ai.post(
            "/sessions/old/completions", body={"prompt": "ab", "max_tokens": 3}, cast_to=object
        )
        browse.expect("console: Failed to load resource: .* 401")
        page = browse(server.url + "/")
        expect(page.get_by_role("alert")).to_contain_text("API key")
        page.get_by_label("API key").fill("secret")
        page.keyboard.press("Tab")
        expect(page.locator("#model")).to_have_text(NAME)
        expect(page.get_by_role("treeitem")).to_have_text("Session old")
        assert page.get_by_role("alert").text_content() == ""
        page.get_by_role("treeitem").click()
        assert re.match(r"\d tokens were written elsewhere", text(page))
        generate(page, "cd", 4, seed=1)
        assert server.api.server.sessions["old"].turns == 2


def test_a_turn_that_was_written_elsewhere_can_be_undone(server, page):
    server.http.post("/v1/sessions", json={"id": "old"})
    for prompt in ("ab", "cd"):
        server.post("/v1/sessions/old/completions", prompt=prompt, max_tokens=3)
    page.reload()
    page.get_by_role("treeitem").click()
    tokens = server.http.get("/v1/sessions/old").json()["tokens"]
    assert text(page).startswith(f"{tokens} tokens were written elsewhere")
    page.get_by_role("button", name="Undo").click()
    fewer = server.http.get("/v1/sessions/old").json()["tokens"]
    expect(page.locator("#columns .paper >> nth=0")).to_contain_text(f"{fewer} tokens were written")
    assert fewer < tokens


def test_errors_of_the_server_are_shown_and_lose_no_words(server, browse):
    page = load(server, browse("about:blank"))
    generate(page, "One", 5)
    before, (name,) = text(page), server.api.server.sessions
    alert = page.get_by_role("alert")
    generate(page, "more", temperature=3)
    assert "Temperature" in alert.text_content() and page.locator("#prompt").input_value() == "more"
    expect(page.locator("#temperature")).to_be_focused()
    browse.expect("console: Failed to load resource: .* 404")
    server.http.delete(f"/v1/sessions/{name}")
    generate(page, "more", temperature=1)
    assert name in alert.text_content()
    assert (text(page), page.locator("#prompt").input_value()) == (before, "more")
    page.route(
        "**/completions",
        lambda route: route.fulfill(body='data: {"choices": [{"text": "half"}]}\n\n'),
    )
    generate(page, "more")
    assert "the connection ended before the answer did" in alert.text_content()
    assert (text(page), page.locator("#prompt").input_value()) == (before, "more")
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("treeitem")).to_have_count(0)


def test_text_is_never_html(server, browse):
    page = load(server, browse("about:blank"))
    event = {
        "choices": [{"text": HTML, "tokens": [{"id": 1, "text": HTML, "gates": [[0.1, 0.2, 0.7]]}]}]
    }
    session = {"id": "x", "tokens": 1, "turns": 1, "seed": 2**63, "state_bytes": 1}
    parts = [event, {"choices": [], "session": session}]
    body = "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + "data: [DONE]\n\n"
    page.route("**/completions", lambda route: route.fulfill(body=body))
    generate(page, HTML)
    assert text(page) == HTML * 2
    page.locator(".token").click()
    expect(page.locator("#readout")).to_contain_text(json.dumps(HTML))
    assert page.get_by_role("treeitem").text_content().startswith("<img")
    assert page.locator("#seed").get_attribute("placeholder") == "any", (
        "it is no number of JavaScript"
    )
    page.unroute("**/completions")
    error = {"error": {"message": HTML}}
    browse.expect("console: Failed to load resource: .* 409")
    page.route("**/fork", lambda route: route.fulfill(status=409, body=json.dumps(error)))
    page.get_by_role("button", name="Fork").click()
    expect(page.get_by_role("alert")).to_have_text(HTML)
    assert page.title() == "TinyMamba" and page.locator("main img, main script").count() == 0


def test_a_session_is_saved_as_a_file_and_opened(server, page, tmp_path):
    generate(page, "Once upon", 20, seed=1)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert file.name.startswith("Once-upon") and file.suffix == ".safetensors"
    reader = speaker()
    want = reader.generate_text(
        " and", reader.load_session(file), seed=2, max_new_tokens=12, **SETTINGS
    )
    page.locator("#file").set_input_files(file)
    expect(page.get_by_role("treeitem")).to_have_count(2)
    generate(page, " and", 12, seed=2)
    assert text(page).endswith(" and" + want) and len(server.api.server.sessions) == 2
    drop = """bytes => { const files = new DataTransfer();
        files.items.add(new File([new Uint8Array(bytes)], "a.safetensors"));
        document.dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true})); }"""
    page.evaluate(drop, [*file.read_bytes()])
    expect(page.get_by_role("treeitem")).to_have_count(3)


def test_everything_works_by_keyboard(page):
    press = page.keyboard.press
    focused = """() => { const {id, role, tagName} = document.activeElement;
        return id || role || tagName; }"""
    generate(page, "One ", 20, seed=1)
    for name in ("fork", "compare"):
        page.locator("#" + name).focus()
        press("Enter")
        expect(page.get_by_role("treeitem")).to_have_count(2)
        expect(page.locator("#surface")).to_have_class("comparing" if name == "compare" else "")
    page.locator("#compare").press("Enter")
    reached = set()
    for _ in range(40):
        press("Tab")
        reached.add(page.evaluate(focused))
    wanted = {"new", "chat", "open", "fork", "undo", "compare", "save", "delete", "gates", "prompt"}
    wanted |= {
        "go",
        "all",
        "temperature",
        "seed",
        "SUMMARY",
        "treeitem",
        "before",
        "after",
        "group",
    }
    assert wanted <= reached
    page.locator("[role=treeitem][tabindex='0']").focus()
    for key, place in (
        ("Home", 0),
        ("ArrowRight", 1),
        ("ArrowLeft", 0),
        ("End", 1),
        ("ArrowUp", 0),
    ):
        press(key)
        expect(page.get_by_role("treeitem").nth(place)).to_be_focused()
    press("Enter")
    expect(page.get_by_role("treeitem").first).to_have_attribute("aria-selected", "true")
    press("ArrowDown")
    press("Space")
    expect(page.get_by_role("treeitem").nth(1)).to_have_attribute("aria-selected", "true")
    page.locator("#delete").press("Enter")
    expect(page.get_by_role("treeitem")).to_have_count(1)
    assert page.evaluate(focused) == "delete"


def test_keys_of_an_input_method_and_of_the_key_field_generate_nothing(server, page):
    page.locator("#prompt").fill("ab")
    key = {"key": "Enter", "ctrlKey": True, "bubbles": True}
    page.locator("#prompt").dispatch_event("keydown", {**key, "isComposing": True})
    page.get_by_text("Settings").click()
    page.get_by_label("API key").press("Enter")
    settle(page)
    assert page.locator("#prompt").input_value() == "ab" and not server.api.server.sessions
    page.locator("#prompt").dispatch_event("keydown", key)
    expect(page.locator("#prompt")).to_have_value("")
    settle(page)
    assert len(server.api.server.sessions) == 1


def test_a_screen_reader_hears_whole_sentences(page):
    pieces = ["One", " two", ". Th", "ree", " four.", "\nFive"]
    heard = page.evaluate(
        """pieces => {
            const heard = () => [...ui.spoken.children].map(p => p.textContent);
            for (const piece of pieces) speak(piece);
            const before = heard();
            speak("", true);
            return [before, heard()]; }""",
        pieces,
    )
    assert heard == [["One two.", "Three four."], ["One two.", "Three four.", "Five"]]
    assert page.locator("#spoken").get_attribute("aria-live") == "polite"


@pytest.mark.parametrize("options", [{}, PHONE], ids=["desk", "phone"])
def test_all_states_are_accessible(server, browse, options):
    page = load(server, browse("about:blank", **options))
    generate(page, "One\n", 60, seed=1)
    page.locator("#columns .paper").first.press("ArrowLeft")
    expect(page.locator(".token.selected")).to_have_count(1)
    if options is PHONE:
        assert page.locator("aside details[open]").count() == 0
        for part in page.locator("aside summary").all():
            part.press("Enter")
    page.locator("#settings summary").press("Enter")
    fill(page, max_tokens=10)
    make_fork(page)
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("button", name="Generate in both").click()
    expect(page.locator("#common")).to_be_visible()
    settle(page)
    page.locator("#common summary").press("Enter")
    if options is not PHONE:
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme)
            accessible(page)
    assert sideways(page) == 0
    boxes = [page.locator(".column").nth(i).bounding_box() for i in (0, 1)]
    assert (boxes[1]["y"] > boxes[0]["y"]) == (options is PHONE), "stacked on a phone only"


def test_the_place_to_write_continues_the_last_line(server, browse):
    page = load(server, browse("about:blank", **PHONE))
    places = """() => {
        const end = paper.end.getBoundingClientRect(), box = ui.prompt.getBoundingClientRect();
        const {textIndent, lineHeight} = getComputedStyle(ui.prompt);
        return [box.left + parseFloat(textIndent) - end.left,
            box.top + parseFloat(lineHeight) - end.bottom]; }"""
    for prompt in ("One", " two three four five six seven eight nine ten", "\n"):
        generate(page, prompt, 3, seed=1)
        across, down = page.evaluate(places)
        assert abs(across) < 1 and abs(down) < 8, prompt
    assert sideways(page) == 0


def stream_of(count: int) -> str:
    """The events of an answer of so many tokens."""
    gates, norms = [[0.2, 0.5, 0.3]] * 4, [[1.0] * 6] * 4
    shape = {"index": 0, "text": "", "tokens": []}
    parts = []
    for i in range(count):
        word = "\n" if i % 25 == 24 else f" {i}"
        token = {"id": i, "text": word, "gates": gates, "norms": norms}
        parts.append({"choices": [{**shape, "text": word, "tokens": [token]}]})
    session = {"id": "x", "tokens": count, "turns": 1, "seed": 1, "state_bytes": 1}
    parts.append({"choices": [], "session": session})
    return "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + "data: [DONE]\n\n"


def test_ten_thousand_tokens_at_once_do_not_hold_up_the_page(page):
    """The longest task is a small part of the work, however busy the machine is."""
    body = stream_of(10_000)
    page.route("**/completions", lambda route: route.fulfill(body=body))
    page.evaluate("""() => {
        window.tasks = [];
        const observer = new PerformanceObserver(list => tasks.push(...list.getEntries()));
        observer.observe({entryTypes: ["longtask"]}); }""")
    ticks = page.context.new_cdp_session(page)
    ticks.send("Performance.enable", {"timeDomain": "threadTicks"})

    def spent() -> float:
        """Seconds of CPU of the page's thread."""
        metrics = ticks.send("Performance.getMetrics")["metrics"]
        return next(m["value"] for m in metrics if m["name"] == "TaskDuration")

    def typing() -> float:
        before = spent()
        page.locator("#prompt").press_sequentially("x" * 20)
        return spent() - before

    empty = typing()
    started = page.evaluate("() => performance.now()")
    generate(page)
    expect(page.locator(".token")).to_have_count(10_000)
    tasks = page.evaluate("() => tasks.map(t => t.duration)")
    whole = page.evaluate("() => performance.now()") - started
    assert max(tasks, default=0) < whole / 5, "all at once would be most of it"
    assert typing() < 6 * empty + 0.1
    assert page.locator("#columns .paper > div").count() > 50, (
        "blocks that are skipped out of sight"
    )


# ------------------------------------------------------------------------------ with a worker

WORKER = """
let sessions = 0;
const info = (id, undo = 0) =>
  ({id, tokens: 3, turns: 1, seed: 7, state_bytes: 2000, chat: false, undo});
const token = (text) => ({id: 1, text, gates: [[0.6, 0.3, 0.1]], norms: [[1, 2]]});
const methods = {
  open: (files) => { if (!files["config.json"]) throw Error("no config.json"); },
  about: () => ({name: "in-browser", chat: false, layers: 1, heads: [1, 1], state_bytes: 2000}),
  sessions: () => [], create: () => info(`s${++sessions}`), fork: () => info(`s${++sessions}`),
  save: () => new TextEncoder().encode("state"),
  load: (bytes) => info("file" + new TextDecoder().decode(bytes)),
  remove: () => null, rollback: (id) => info(id), stop: () => { stopped = true; },
};
let stopped = false;
onmessage = async ({data: {call, method, args}}) => {
  try {
    if (method !== "generate") return postMessage({call, result: await methods[method](...args)});
    const [id, {prompt, max_tokens}] = args;
    stopped = false;
    if (prompt === "fail") throw Error("the worker says no");
    for (let i = 0; i < max_tokens && !stopped; i++) {
      postMessage({call, events: [{text: ` ${id}`, tokens: [token(` ${id}`)]}]});
      await new Promise((resolve) => setTimeout(resolve));
    }
    const session = info(id, 1);
    postMessage({call, events: [{text: "", tokens: [], finish_reason: "stop", session}]});
    postMessage({call, result: null});
  } catch (problem) { postMessage({call, error: problem.message}); }
};
"""


def test_the_same_page_runs_a_model_in_a_worker(browse, tmp_path):
    def answer(route) -> None:
        site = {"files": {"config.json": "config.json"}, "worker": "worker.js"}
        script = f'<script id="site" type="application/json">{json.dumps(site)}</script>'
        page = PAGE.replace("<script>", script + "<script>")
        if route.request.url.endswith("worker.js"):
            return route.fulfill(body=WORKER, content_type="text/javascript")
        return route.fulfill(body=page, content_type="text/html")

    context = browse("about:blank").context
    context.route("http://127.0.0.1:1/**", answer)
    page = context.pages[0]
    page.goto("http://127.0.0.1:1/some/path/")
    expect(page.locator("#model")).to_have_text("in-browser")
    generate(page, "ab", 3)
    assert text(page) == "ab s1 s1 s1" and page.locator(".token.ssm.l4").count() == 3
    assert "state 2 kB" in page.locator("#status").text_content()
    make_fork(page)
    fill(page, max_tokens=10**6)
    page.locator("#prompt").fill("!")
    page.get_by_role("button", name="Generate in all").click()
    expect(page.locator(".token").nth(9)).to_be_attached()
    page.keyboard.press("Escape")
    settle(page)
    assert text(page).startswith("ab s1 s1 s1! s2 s2")
    generate(page, "fail")
    expect(page.get_by_role("alert")).to_have_text("the worker says no")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    download.value.save_as(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_text() == "state"
    page.locator("#file").set_input_files(tmp_path / "a.safetensors")
    expect(page.locator("#name")).to_have_text("Session filestate")
    assert not page.get_by_label("API key").is_visible()


def test_a_worker_that_fails_is_an_error(browse):
    context = browse("about:blank").context
    site = '<script id="site" type="application/json">{"files": {}, "worker": "worker.js"}</script>'
    files = {
        "worker.js": "throw Error('no memory')",
        "": PAGE.replace("<script>", site + "<script>"),
    }
    kinds = {"worker.js": "text/javascript", "": "text/html"}

    def answer(route) -> None:
        name = route.request.url.rpartition("/")[2]
        route.fulfill(body=files[name], content_type=kinds[name])

    context.route("http://127.0.0.1:1/**", answer)
    browse.expect("no memory")
    page = context.pages[0]
    page.goto("http://127.0.0.1:1/")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("the model's worker failed: ")
    page.keyboard.press("Escape")
    expect(alert).to_be_empty()
    generate(page, "ab")
    expect(alert).to_contain_text("the model's worker failed: ")
    assert page.locator("#prompt").input_value() == "ab"
