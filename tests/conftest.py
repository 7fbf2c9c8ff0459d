"""What the tests share: a small config, small data, and a way to run a script as a user does."""

import contextlib
import io
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from testv2 import Config, SimpleTokenizer, main, run_cli

torch.set_num_threads(1)  # the models are tiny, and tests run side by side

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "d_model": 32, "n_layer": 2, "vocab_size": 257, "dropout": 0.0, "num_heads": 2,
    "ssm_head_dim": 8, "d_state": 8, "window_size": 8, "chunk_size": 16, "block_size": 32,
    "batch_size": 4, "gradient_accumulation_steps": 1, "use_compile": False, "device": "cpu",
    "warmup_steps": 2,
}
BRIEF = {"generate_samples": False, "enable_validation": False, "log_interval": 1}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)


def tiny_config(**changes) -> Config:
    return Config(**{**TINY, **changes}).validate()


def flags(**values) -> list[str]:
    """{"d_model": 32} -> ["--d_model", "32"]; lists give several words."""
    words = []
    for name, value in values.items():
        words.append(f"--{name}")
        words += [str(v) for v in (value if isinstance(value, list) else [value])]
    return words


def run_script(script: str, *words, cwd: Path, env: dict | None = None, timeout: float = 300):
    """Run a script of the repository in `cwd` as a user would; the CompletedProcess, as text."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True,
                          timeout=timeout)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def assert_refused(done, *fragments: str) -> None:
    """One line on stderr that begins with "error: " and holds every fragment; exit code 2."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for fragment in fragments:
        assert fragment in lines[0]


def call(*words) -> subprocess.CompletedProcess:
    """testv2.py with these words on the command line, in this process; warnings go to stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        ended = stack.enter_context(pytest.raises(SystemExit))
        run_cli(lambda: main([str(word) for word in words]))
    shown = [w for w in caught if not issubclass(w.category, DeprecationWarning | FutureWarning)]
    err.write("".join(f"{w.category.__name__}: {w.message}\n" for w in shown))
    return subprocess.CompletedProcess(words, ended.value.code, out.getvalue(), err.getvalue())


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_refuses(*words, naming=()) -> str:
    """The command is refused in one line with every fragment, and no file changes; the line."""
    before = files_below(Path.cwd())
    done = call(*words)
    assert_refused(done, *naming)
    assert files_below(Path.cwd()) == before
    return done.stderr.strip()


def write_tokens(path: Path, text_or_ids, dtype=np.int32) -> Path:
    """A .bin of the ids given, or of the bytes of a text."""
    ids = text_or_ids
    if isinstance(ids, str):
        ids = SimpleTokenizer().encode(ids)
    np.asarray(ids, dtype=dtype).tofile(path)
    return path


@pytest.fixture
def data(tmp_path):
    """Byte-level train.bin and val.bin of an easy text in tmp_path/data/text; gives tmp_path."""
    folder = tmp_path / "data" / "text"
    folder.mkdir(parents=True)
    lines = [f"{a} plus {b} is {a + b}.\n" for a in range(30) for b in range(30)]
    write_tokens(folder / "train.bin", "".join(lines[::2]))
    write_tokens(folder / "val.bin", "".join(lines[1::2]))
    return tmp_path
