"""tests/browser.py: a page's errors, wherever they happen, fail its test."""

import re

import browser
import helpers
import pytest
from browser import DARK, PHONE, Tabs, sideways, violations
from helpers import npm_file

from benchmarks import web


@pytest.fixture
def write(tmp_path):
    """Writes a page with this script; gives its address."""

    def page(script="", body="<main><h1>Hello</h1></main>"):
        text = f'<!doctype html><html lang="en"><title>A</title>{body}<script>{script}</script>'
        (tmp_path / "page.html").write_text(text, encoding="utf-8")
        return (tmp_path / "page.html").as_uri()

    return page


END = "document.title = 'B'"
WORKER = f"new Worker(URL.createObjectURL(new Blob([`%s`]))).onmessage = () => {END}"
FAULTS = {
    "uncaught: page": f"setTimeout(() => {{ {END}; throw Error('page') }})",
    "uncaught: promise": f"Promise.reject(Error('promise')); {END}",
    "uncaught: worker": WORKER % "setTimeout(() => postMessage(1)); throw Error('worker')",
    "console: complaint": f"console.error('complaint'); {END}",
    "another host: http://a.com/": f"fetch('http://a.com/').catch(() => {END})",
    "another host: https://10.1.2.3/": WORKER
    % "fetch('https://10.1.2.3/').catch(() => postMessage(1))",
}


@pytest.mark.parametrize("error", FAULTS)
def test_an_error_of_a_page_or_its_worker_fails_the_test(chromium, write, error):
    tabs = Tabs(chromium)
    page = tabs(write(FAULTS[error]))
    page.wait_for_function("document.title == 'B'")
    with pytest.raises(AssertionError, match=re.escape(error)):
        tabs.close()


def test_an_expected_error_must_come(chromium, write):
    tabs = Tabs(chromium)
    tabs(write("console.error('complaint')"))
    tabs.expect("complaint")
    tabs.close()
    tabs = Tabs(chromium)
    tabs.expect("complaint")
    with pytest.raises(AssertionError, match="no error matched"):
        tabs.close()


def test_what_a_page_breaks_is_found(browse, write):
    assert violations(browse(write())) == []
    wide = '<meta name="viewport" content="width=device-width"><main><h1>A</h1>'
    wide += '<img style="width: 500px; color: red"></main>'
    page = browse(write(body=wide), **PHONE, **DARK)
    assert [v.split(":")[0] for v in violations(page)] == ["image-alt"]
    assert sideways(page) == 500 + 8 - 360
    assert page.evaluate("() => matchMedia('(prefers-color-scheme: dark)').matches")


@pytest.mark.parametrize("ci, outcome", [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_without_chromium_or_packages_tests_fail_in_ci_and_are_skipped_elsewhere(
    monkeypatch, tmp_path, ci, outcome
):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(web, "PLACES", ())
    monkeypatch.setattr(helpers, "NPM_PACKAGES", tmp_path)
    with pytest.raises(outcome, match="Chromium is missing: run tests/browser.sh"):
        browser.chromium().__enter__()
    with pytest.raises(outcome, match="node_modules/axe-core/axe.min.js is missing"):
        npm_file("axe-core/axe.min.js")
