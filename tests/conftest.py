"""What every test has: fixed seeds, one thread, and folders with data where it asks for them."""

import gc
import os

import numpy as np
import pytest
import torch
from helpers import heed_signals, make_tokenizers, train_bpe, write_tokens

from tinymamba.tokenizer import EOS_TOKEN

# The files that take longest, the longest first. A file is run by one process: begun last, one of
# these would keep it busy long after the others have ended.
LONGEST = ["reliability", "readme", "training", "model", "hf_integration", "peft", "export_model",
           "streaming", "restarts", "serve", "tied_weights", "session_store", "benchmark",
           "surroundings", "sharded_checkpoint", "quantize", "carried_state", "onnx_engine",
           "preferences", "context_parallel", "prepare_documents", "web", "testv2",
           "page", "web_page"]  # fmt: skip

heed_signals()


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Imports make no garbage: it is not searched for meanwhile, and never among what they made."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(700, 10, 100)  # a search of everything takes long, and finds little
        gc.enable()


def pytest_unconfigure():
    gc.freeze()  # nor at the end


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)
    yield
    # Weights & Biases tells child processes to use this process's service, and benchmark.py how to
    # allocate memory. Other tests' must not.
    for name in ("WANDB_SERVICE", "MALLOC_MMAP_THRESHOLD_"):
        os.environ.pop(name, None)


@pytest.fixture
def data(tmp_path):
    """Byte-level train.bin and val.bin of an easy text in tmp_path/data/text; gives tmp_path."""
    folder = tmp_path / "data" / "text"
    folder.mkdir(parents=True)
    lines = [f"{a} plus {b} is {a + b}.\n" for a in range(30) for b in range(30)]
    write_tokens(folder / "train.bin", "".join(lines[::2]))
    write_tokens(folder / "val.bin", "".join(lines[1::2]))
    return tmp_path


@pytest.fixture
def place(data, monkeypatch):
    """A fresh working folder with data, where a plain run looks for it."""
    monkeypatch.chdir(data)
    return data


@pytest.fixture(scope="session")
def bpe():
    """A trained byte-level BPE tokenizer of the library `tokenizers`."""
    return train_bpe(EOS_TOKEN)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory, bpe):
    """One SimpleTokenizer of every kind: bytes, gpt2, words, byte tokens, json."""
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"), bpe)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder without data/text, whose tokenizer a model without one would take."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def chromium():
    """Headless Chromium, one for a file: while it runs, the main thread has an event loop."""
    from browser import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture
def browse(chromium):
    """Opens pages (tests/browser.py): an error, or a request to another host, fails the test."""
    from browser import Tabs

    tabs = Tabs(chromium)
    yield tabs
    tabs.close()
