"""What the tests share: small models and data, and a way to run a script as a user does."""

import contextlib
import copy
import functools
import importlib
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tomllib
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import settings
from torch.utils._python_dispatch import TorchDispatchMode

from peft import AdapterConfig, adapter_tensors, attach
from testv2 import Config, RotaryEmbedding, SequenceContext, TinyMambaModel, Trainer, main
from tinymamba.__main__ import COMMANDS  # noqa: F401
from tinymamba.checkout import find_scripts
from tinymamba.checkpoint import load_checkpoint
from tinymamba.cli import run_cli
from tinymamba.tokenizer import EOS_TOKEN, SimpleTokenizer, byte_level

torch.set_num_threads(1)  # the models are tiny, and tests run side by side

ROOT = Path(__file__).resolve().parent.parent
NPM_PACKAGES = ROOT / "node_modules"
TINY = {
    "d_model": 32,
    "n_layer": 2,
    "vocab_size": 257,
    "dropout": 0.0,
    "state_noise": 0.0,
    "num_heads": 2,
    "ssm_head_dim": 8,
    "d_state": 8,
    "window_size": 8,
    "chunk_size": 16,
    "block_size": 32,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "use_compile": False,
    "device": "cpu",
    "warmup_steps": 2,
}
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals, limits or a shell")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
GATES = ("softmax", "top_k", "sparsemax")
FIRST_FORM = {"bc_conv": False, "rotating": 1.0, "k_conv": False, "qv_conv": False,
              "memory": False, "memory_every": 1, "memory_products": 0, "min_decay": 0.0,
              "state_noise": 0.0}  # fmt: skip
FORMS = {"today's": {}, "first": FIRST_FORM}
EOS = 0
DOCUMENTS = {"document_mask": True, "eos_id": EOS}
BRIEF = {"generate_samples": False, "enable_validation": False, "log_interval": 1}


def tiny_config(**changes) -> Config:
    return Config(**{**TINY, **changes}).validate()


def examples(count: int):
    """How many examples hypothesis tries, the same ones every time."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


# ------------------------------------------------------------------------------------- models


class ExactRotary(RotaryEmbedding):
    """RoPE in float64: the rounding of float32 tables would hide what is tested."""

    def forward(self, positions):
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64)
        angles = positions.double()[..., None] * self.theta ** (-pairs / self.head_dim)
        return angles.cos(), angles.sin()


@functools.cache
def wide(double=False, **changes) -> TinyMambaModel:
    """A model whose weights are far from their first values, so that every mistake shows.

    Shared between tests: copy it before changing it.
    """
    model = TinyMambaModel(tiny_config(**changes))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("A_log"):
                p.uniform_(-2.0, 2.7)
            elif name.endswith("dt_bias"):
                p.uniform_(-4.0, 0.5)
            elif name.endswith(("norm.weight", ".D")):
                p.normal_(1.0, 0.3)
            elif name.endswith("residual_scale"):
                p.normal_(0.7, 0.1)
            elif "controller" in name:
                p.normal_(0.0, 0.5)
            elif name.endswith("conv.weight"):
                p.normal_(0.0, 0.25)
            elif "angle_proj" in name:
                p.normal_(0.0, 0.3)  # most angles are not 0
            elif ".ssm.in_proj" in name and ".down" not in name:
                p.normal_(0.0, 0.1)  # its parts are multiplied: more would drown the other branches
            else:
                p.normal_(0.0, 0.2)
    model.eval().requires_grad_(False)
    if double:
        model.double().rotary = ExactRotary(model.rotary.head_dim, model.rotary.theta)
    return model


def free_copy(module):
    """A copy that may be changed and trained."""
    return copy.deepcopy(module).requires_grad_(True)


def adapted(config: AdapterConfig, stirred=True, name="default", **changes) -> TinyMambaModel:
    """A model with an adapter; its weights are far from their first values if `stirred`."""
    model = attach(free_copy(wide(**changes)), config, name)
    if stirred:
        stir(model, name)
    return model.eval()


def stir(model: TinyMambaModel, name: str, seed: int = 5) -> None:
    """Add noise to all tensors of an adapter."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter_tensors(model, name).values():
            tensor += 0.2 * torch.randn(tensor.shape, generator=random)


def piece_of(model, length: int, starts=None, lengths=None) -> SequenceContext:
    """The context of `length` tokens: by default one document without padding."""
    ids = torch.zeros(1, length, dtype=torch.int64)
    return model.make_context(ids, None, starts, lengths, model.config.document_mask)


def some_ids(rows, length, vocab=257, seed=0):
    """Random ids without EOS."""
    return torch.randint(1, vocab, (rows, length), generator=torch.manual_seed(seed))


def close(got, want, tolerance, scale=None):
    """|got - want| <= tolerance * scale: the largest |want|, at least 1e-3, unless it is given."""
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    if want.numel() == 0:
        return
    scale = max(want.abs().max().item(), 1e-3) if scale is None else scale
    error = (got - want).abs().max().item()
    assert error <= tolerance * scale, f"off by {error:.3g} at scale {scale:.3g}"


def close_angles(got, want, tolerance):
    """The same for angles in half turns, of which 0 and 2 are the same."""
    got, want = (torch.polar(torch.ones_like(t), math.pi * t) for t in (got, want))
    difference = (got - want).abs()
    close(difference, torch.zeros_like(difference), tolerance, scale=1.0)


def most_memory() -> int:
    """The most bytes this process has held so far; the test is skipped where that is unknown."""
    resource = pytest.importorskip("resource")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Census(TorchDispatchMode):
    """Counts the tensor operations run under it, and the numbers in the largest result."""

    def __init__(self):
        super().__init__()
        self.operations, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.layout == torch.strided:
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return out


# ------------------------------------------------------------------------------ training runs

LATEST = Path("tinymamba_model_latest.pt")
STEP = re.compile(r"^step (\d+)/(\d+) \| loss (\S+) .*$", re.M)


def brief_config(**changes) -> Config:
    return tiny_config(**{"amp_dtype": torch.float32, **BRIEF, **changes})


def brief_flags(**changes) -> list[str]:
    return flags(**{**TINY, **BRIEF, "amp_dtype": "float32", **changes})


def after_step(trainer: Trainer, step: int, act) -> None:
    """Call `act` once, in the middle of the given optimizer step of this run."""
    seen = []

    def hook(*_):
        seen.append(1)
        if len(seen) == step:
            act()

    trainer.optimizer.register_step_post_hook(hook)


def assert_compiled(said: str) -> None:
    """What a run printed shows that it was compiled, and did not fall back."""
    assert "compilation included" in said and "torch.compile" not in said, said


def go_on(stop_after: int | None = None) -> Trainer:
    """Resume as main does, and stop in the middle of that step of this run."""
    saved = load_checkpoint(LATEST)
    trainer = Trainer(Config.from_dict(saved["config"]), saved=saved)
    if stop_after:
        after_step(trainer, stop_after, lambda: signal.raise_signal(signal.SIGINT))
    assert trainer.run() == (130 if stop_after else 0)
    return trainer


# --------------------------------------------------------------------- commands and their data


def flags(**values) -> list[str]:
    """{"d_model": 32} -> ["--d_model", "32"]; lists give several words."""
    words = []
    for name, value in values.items():
        words.append(f"--{name}")
        words += [str(v) for v in (value if isinstance(value, list) else [value])]
    return words


def run_script(
    script: str,
    *words,
    cwd: Path,
    env: dict | None = None,
    timeout: float = 300,
    input: str | None = None,
):
    """Run a script of the repository in `cwd` as a user would; the CompletedProcess, as text.

    A name without .py is a module: run_script("benchmarks.scan", ...).
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    if not script.endswith(".py"):
        command[1:2], env["PYTHONPATH"] = ["-m", script], str(ROOT)
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, input=input
    )


def heed_signals() -> None:
    """Heed the signals that a shell has its background jobs, and so their children, ignore.

    `nohup` does the same. Tests send them to processes that they start.
    """
    for name in ("SIGINT", "SIGHUP", "SIGQUIT"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) is signal.SIG_IGN:
            normal = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
            signal.signal(number, normal)


# Below 32768 no system gives out ports by itself. Each process of pytest has a hundred of its own.
PORTS = itertools.cycle(range(100 * os.getpid() % 20_000 + 10_000, 30_000))


def killed_before(run, after: int, places: list[tuple[object, str]]) -> bool:
    """Run in a child that kills itself with -9 before one of its calls of the places, which are
    (object, name); False if it ended first. The calls are then counted in the file "writes"."""
    pid = os.fork()
    if pid == 0:
        done = []

        def killing(call):
            def act(*args, **kwargs):
                if len(done) == after:
                    os.kill(os.getpid(), signal.SIGKILL)
                done.append(call)
                return call(*args, **kwargs)

            return act

        for owner, name in places:
            setattr(owner, name, killing(getattr(owner, name)))
        try:
            run()
            Path("writes").write_text(str(len(done)))
        except BaseException as error:
            os.write(2, f"child: {error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def free_port() -> int:
    """A port that stays free until a slow process binds it: seconds pass while it imports torch."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as s:
            port = next(PORTS)
            s.bind(("127.0.0.1", port))
            return port


def start_fork(main, *words, env: dict | None = None, **streams) -> subprocess.Popen:
    """A process that runs the `main(argv)` of a script: a fork, which need not import PyTorch.

    Where nothing can be forked it is a new process.
    """
    import torch._dynamo  # noqa: F401  an optimizer does: once, rather than in each fork

    command = [sys.executable, str(inspect.getsourcefile(main)), *map(str, words)]
    how = {"env": {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, "text": True, **streams}
    if os.name == "posix":
        how |= {"preexec_fn": functools.partial(become_script, main, command[2:], how["env"])}
        how |= {"restore_signals": False}
    return subprocess.Popen(command, **how)


def become_script(main, words: list[str], env: dict) -> None:
    """In a fork: run `main` in place of a new program, without what pytest has set."""
    # Nothing may keep the test's pipes open; Popen waits for the end of its own. Their numbers stay
    # taken: objects of the test may close them at any time, and must not close others' files.
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/dev/fd")):
        if number > 2:
            os.dup2(nothing, number)
    os.environ.update(env)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    logging.getLogger().handlers.clear()
    warnings.resetwarnings()
    for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", hidden)
    warnings.showwarning = lambda text, kind, *_: print(kind.__name__, text, file=sys.stderr)
    code = 1
    try:
        run_cli(lambda: main(words))
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


@contextlib.contextmanager
def two_ranks(*words, script="testv2.py"):
    """Two processes that train together, without a launcher, which would end them itself."""
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    main, both = importlib.import_module(script.removesuffix(".py")).main, []
    for rank in ("0", "1"):
        both.append(start_fork(main, *words, env={**env, "RANK": rank}, **pipes))
    try:
        yield both
    finally:
        for process in both:
            process.kill()
            process.communicate()


def run_two_ranks(*words, script="testv2.py") -> None:
    """Let them train to the end."""
    with two_ranks(*words, script=script) as both:
        done = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], done


def fork_group(size: int, work: Callable[[int], dict], folder: Path) -> list[dict]:
    """What `work` returns in each of `size` processes that a launcher could have started."""
    import torch._dynamo  # noqa: F401  as in start_fork

    port = str(free_port())

    def run(rank: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo")
        code = 1
        try:
            torch.save(work(rank), folder / f"{rank}.found")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    context: Any = multiprocessing.get_context("fork")  # torch need not be imported again
    processes = [context.Process(target=run, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        if process.exitcode != 0:  # the others would wait for it
            for other in processes:
                other.kill()
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.found", weights_only=True) for rank in range(size)]


def assert_refused(done, *fragments: str) -> None:
    """One line on stderr that begins with "error: " and holds every fragment; exit code 2."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for fragment in fragments:
        assert fragment in lines[0]


def run_main(main, *words, cwd: Path | None = None, input: str = "") -> subprocess.CompletedProcess:
    """Run the `main(argv)` of a script in this process, as run_cli would: much faster than a
    process, and the same CompletedProcess. Warnings go to stderr."""
    out, err = io.StringIO(newline=None), io.StringIO(newline=None)  # "\r" as in text pipes
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(cwd or Path.cwd()))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(sys, "stdin", io.StringIO(input))
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        ended = stack.enter_context(pytest.raises(SystemExit))
        run_cli(lambda: main([str(word) for word in words]))
    shown = [w for w in caught if not issubclass(w.category, DeprecationWarning | FutureWarning)]
    err.write("".join(f"{w.category.__name__}: {w.message}\n" for w in shown))
    return subprocess.CompletedProcess(words, ended.value.code, out.getvalue(), err.getvalue())


def call(*words) -> subprocess.CompletedProcess:
    """testv2.py with these words on the command line, in this process."""
    return run_main(main, *words)


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


def write_conversations(folder: Path, side: str, conversations: list, facts: dict) -> Path:
    """The files of `data/prepare.py --chat` for (ids, mask) of each conversation; the .bin.

    `facts` are added to the .json, or take the place of what it says.
    """
    ids = np.concatenate([np.asarray(each, np.int64) for each, _ in conversations])
    mask = np.concatenate([np.asarray(each, bool) for _, each in conversations])
    ends = np.cumsum([len(each) for each, _ in conversations])
    known = {"dtype": "int32", "kind": "chat", "tokens": len(ids), "bytes": len(ids)}
    known |= {"conversations": len(conversations), "counted": int(mask.sum()), **facts}
    ids.astype(known["dtype"]).tofile(folder / f"{side}.bin")
    np.packbits(mask, bitorder="little").tofile(folder / f"{side}.mask.bin")
    np.array([0, *ends], np.int64).tofile(folder / f"{side}.index.bin")
    (folder / f"{side}.json").write_text(json.dumps(known))
    return folder / f"{side}.bin"


# --------------------------------------------------------------------- the package and its image

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}


def lacking(what: str) -> None:
    """Skip a test for want of this program or package; in CI, which installs both, fail."""
    message = f"{what} is missing: run tests/browser.sh"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def npm_file(name: str) -> Path:
    """A file or folder of an npm package that package.json names."""
    file = NPM_PACKAGES / name
    if not file.exists():
        lacking(f"node_modules/{name}")
    return file


def build_sources() -> set[str]:
    """Every file that a build of the package takes."""
    package = ROOT / "tinymamba"
    files = (*package.glob("*.py"), *package.glob("web/*.js"))
    own = {path.relative_to(ROOT).as_posix() for path in files}
    rest = {"LICENSE", "README.md", "MANIFEST.in", "pyproject.toml", "requirements.txt", "setup.py"}
    return {*find_scripts(ROOT)} | own | rest


def build(tree: Path, *what: str) -> None:
    """Run `python -m build` on a copy of the repository, without network."""
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *what],
        cwd=tree,
        env={**os.environ, **OFFLINE, "SOURCE_DATE_EPOCH": "1750000000"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------------------------- tokenizers

CORPUS = [
    "the theme of the other: 12 plus 30 is 42.\n",
    "  and so on, und so weiter, für Köln\n",
] * 9
WORDS = ["the", " ", "theme", "th", "e", "word", "é", "日本"]


def train_bpe(*special: str):
    """A small byte-level BPE tokenizer of the library `tokenizers`; special tokens come first."""
    from tokenizers import models, pre_tokenizers, trainers

    bpe = byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return bpe


def write_vocab(path: Path, lines: list[str]) -> Path:
    """A vocab.txt of one token per line."""
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    return path


def make_tokenizers(folder: Path, bpe) -> dict[str, SimpleTokenizer]:
    """One tokenizer of every kind by name; their files are in `folder`."""
    bpe.save(str(folder / "tokenizer.json"))
    in_order = sorted(bpe.get_vocab(), key=bpe.get_vocab().get)
    byte_tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *WORDS]
    return {
        "bytes": SimpleTokenizer(),
        "gpt2": SimpleTokenizer(write_vocab(folder / "gpt2.txt", in_order)),
        "words": SimpleTokenizer(write_vocab(folder / "words.txt", [*WORDS, EOS_TOKEN])),
        "byte tokens": SimpleTokenizer(write_vocab(folder / "byte_tokens.txt", byte_tokens)),
        "json": SimpleTokenizer(folder / "tokenizer.json"),
    }
