"""Headless Chromium for tests: the fixture `browse` of conftest.py opens pages in it."""

import contextlib
import json
import re
from urllib.parse import urlsplit

from helpers import lacking, npm_file
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.web import find_chromium

THIS_MACHINE = ("127.0.0.1", "localhost", "::1", "", None)  # file: and blob: have no host
OTHER_HOSTS_FAIL = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
DARK = {"color_scheme": "dark"}


@contextlib.contextmanager
def chromium():
    """Headless Chromium, that reaches no host but this machine."""
    program = find_chromium()
    if program is None:
        lacking("Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[OTHER_HOSTS_FAIL])
        yield browser
        browser.close()


class Tabs:
    """Opens pages of one test, each with storage of its own, and collects their errors."""

    def __init__(self, browser: Browser):
        self.browser = browser
        self.contexts: list = []
        self.errors: list[str] = []
        self.expected: list[str] = []

    def __call__(self, url: str, **options) -> Page:
        """A new page at this address; `options` are those of Playwright's new_context."""
        context = self.browser.new_context(**{"reduced_motion": "reduce", **options})
        self.contexts.append(context)
        context.set_default_timeout(30_000)
        context.on("weberror", lambda event: self.errors.append(f"uncaught: {event.error}"))
        context.on("console", self.on_console)
        context.on("request", self.on_request)
        page = context.new_page()
        page.goto(url)
        return page

    def on_console(self, message) -> None:
        if message.type == "error":
            self.errors.append(f"console: {message.text}")

    def on_request(self, request) -> None:
        if urlsplit(request.url).hostname not in THIS_MACHINE:
            self.errors.append(f"another host: {request.url}")

    def expect(self, error: str) -> None:
        """Say that errors which match this pattern belong to the test: at least one must come."""
        self.expected.append(error)

    def close(self) -> None:
        """Close all pages, and fail for what was not expected and for what did not come."""
        for context in self.contexts:
            context.close()
        wrong = [e for e in self.errors if not any(re.search(p, e) for p in self.expected)]
        assert not wrong, "\n".join(wrong)
        missed = [p for p in self.expected if not any(re.search(p, e) for e in self.errors)]
        assert not missed, f"no error matched {missed}"


def violations(page: Page) -> list[str]:
    """The rules of accessibility that the page breaks as it is, and where (axe-core)."""
    script = npm_file("axe-core/axe.min.js").read_text(encoding="utf-8")
    page.evaluate(f"() => {{ if (!window.axe) {{ {script} }} }}")  # past the page's script policy
    found = page.evaluate("async () => (await axe.run()).violations")
    return [f"{rule['id']}: {json.dumps([n['target'] for n in rule['nodes']])}" for rule in found]


def sideways(page: Page) -> int:
    """By how many pixels the page is wider than its window."""
    root = "document.documentElement"
    return page.evaluate(f"() => {root}.scrollWidth - {root}.clientWidth")
