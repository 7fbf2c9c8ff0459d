"""The page of `export_model.py --format web` in headless Chromium, against ONNX Runtime in Python.

    python export_model.py --format web --output_dir site
    pip install playwright  # and Chromium or Chrome
    python -m benchmarks.web --site site

first_token   seconds from opening the page to the first token on it, if "Generate" is pressed at
              once; the browser has nothing of the site yet
page          tokens per second of the page, everything that it draws included
native        tokens per second of the same graphs in Python, on one thread as in the page
memory        MB of the page's process after one answer and after --long tokens (Linux)

In every round the page and Python generate in turn. Medians count; of the ratio also the smallest
and the largest. The row goes to --output.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import numpy as np

from benchmark import append_row
from onnx_generate import OnnxModel, open_tokenizer
from tinymamba.cli import need, parse_flags, require, run_cli
from tinymamba.web_site import find_files

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PLACES = (  # where it is not on the path
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
)
# Writes the prompt and generates as soon as the page is there; notes when the first token is.
AT_ONCE = """() => {
  new MutationObserver((_, observer) => {
    if (!document.querySelector(".token")) return;
    window.firstToken = performance.now() / 1000;
    observer.disconnect();
  }).observe(document, {childList: true, subtree: true});
  addEventListener("DOMContentLoaded", () => {
    document.getElementById("prompt").value = PROMPT;
    document.getElementById("max_tokens").value = 64; // the first may be a part of a character
    document.getElementById("temperature").value = 0;
    document.getElementById("go").click();
  });
}"""
# Generates, and gives the seconds until all is drawn.
ANSWER = """([prompt, count]) => new Promise((done) => {
  const surface = document.getElementById("surface");
  Object.assign(document.getElementById("max_tokens"), {value: count});
  Object.assign(document.getElementById("temperature"), {value: 0});
  document.getElementById("prompt").value = prompt;
  const began = performance.now();
  new MutationObserver((_, observer) => {
    if (surface.getAttribute("aria-busy") === "true") return;
    observer.disconnect();
    done((performance.now() - began) / 1000);
  }).observe(surface, {attributeFilter: ["aria-busy"]});
  document.getElementById("go").click();
})"""


@dataclass
class Options:
    """The command line."""

    site: Path = Path("site")  # a folder of --format web
    prompt: str = "import os\n"  # text to continue
    tokens: int = 300  # tokens of an answer
    rounds: int = 5  # answers of each, of which the medians count
    long: int = 0  # tokens generated to see whether the memory grows; 0 leaves it out
    output: str = "web.jsonl"  # file of rows

    LIMITS: ClassVar = {**dict.fromkeys(("tokens", "rounds"), (1, math.inf)), "long": (0, math.inf)}


class Quiet(SimpleHTTPRequestHandler):
    """Files without a line for each."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder, while it is served on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def find_chromium() -> str | None:
    """The program of Chromium or Chrome on this system."""
    on_path = (shutil.which(name) for name in PROGRAMS)
    return next(filter(None, (*on_path, *filter(os.path.exists, PLACES))), None)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Headless Chromium, or Chrome."""
    playwright = need("playwright.sync_api").sync_playwright
    program = find_chromium()
    require(program, "chromium", "is not installed", f"install one of {', '.join(PROGRAMS)}")
    with playwright() as library:
        chromium = library.chromium.launch(executable_path=program)
        yield chromium
        chromium.close()


def first_token(chromium: Any, url: str, prompt: str) -> float:
    """Seconds from opening the page in a new browser profile to its first token."""
    context = chromium.new_context(service_workers="block")
    page = context.new_page()
    page.add_init_script(f"({AT_ONCE.replace('PROMPT', json.dumps(prompt))})()")
    page.goto(url)
    page.locator(".token").first.wait_for(state="attached")
    seconds = page.evaluate("() => window.firstToken")
    context.close()
    return seconds


def page_rate(page: Any, prompt: str, count: int, tokens: int) -> float:
    """Tokens per second of an answer to a prompt of `count` tokens; eos may end it early."""
    page.get_by_role("button", name="New text").click()
    seconds = page.evaluate(ANSWER, [prompt, tokens])
    status = page.locator("#status").text_content()
    return (int(status.partition(" tokens")[0].replace(",", "")) - count) / seconds


def native_rate(model: OnnxModel, ids: np.ndarray, tokens: int) -> float:
    """Tokens per second with which Python continues the same ids by the same graphs."""
    began = time.perf_counter()
    for _ in model.generate(ids, tokens):
        continue
    return tokens / (time.perf_counter() - began)


def megabytes_of_pages() -> float | None:
    """Resident memory of the largest process of a page; None where the system does not say."""
    sizes = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            if b"--type=renderer" in (status.parent / "cmdline").read_bytes():
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
                sizes.append(int(fields["VmRSS"].split()[0]) / 1e3)
    return max(sizes, default=None)


def measure(options: Options) -> dict:
    """The row of a site."""
    folder, prompt, tokens = find_files(options.site), options.prompt, options.tokens
    model = OnnxModel(folder, threads=1)
    ids = np.array(open_tokenizer(folder).encode(prompt, add_special_tokens=False).ids)
    page_rates, native_rates = [], []
    with served(options.site) as url, browser() as chromium:
        firsts = [first_token(chromium, url, prompt) for _ in range(options.rounds)]
        page = chromium.new_page()
        page.goto(url)
        for _ in range(options.rounds):
            page_rates.append(page_rate(page, prompt, len(ids), tokens))
            native_rates.append(native_rate(model, ids, tokens))
        memory = [megabytes_of_pages()]
        if options.long:
            page_rate(page, prompt, len(ids), options.long)
            memory.append(megabytes_of_pages())
    ratios = [page / native for page, native in zip(page_rates, native_rates, strict=True)]
    return {
        "site": str(options.site),
        "tokens": tokens,
        "rounds": options.rounds,
        "first_token_seconds": round(statistics.median(firsts), 3),
        "page_tokens_per_second": round(statistics.median(page_rates), 1),
        "native_tokens_per_second": round(statistics.median(native_rates), 1),
        "page_by_native": [round(f(ratios), 3) for f in (statistics.median, min, max)],
        "memory_mb": memory,
        "site_mb": round(sum(f.stat().st_size for f in folder.iterdir()) / 1e6, 1),
    }


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    usage = "python -m benchmarks.web [--FLAG VALUE ...]"
    options = parse_flags(Options, argv, usage, __doc__)
    for package in ("onnxruntime", "tokenizers", "playwright"):
        need(package)
    index = options.site / "index.html"
    remedy = "pass a folder of export_model.py --format web"
    require(index.is_file(), "--site", f"{index} does not exist", remedy)
    append_row(options.output, measure(options))
    return 0


if __name__ == "__main__":
    run_cli(main)
