"""How scripts start: what they import, help without PyTorch, and loading without random numbers."""

import gc
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_main, run_script, tiny_config

import peft
import streaming
from testv2 import Config, TinyMambaModel, load_model, save_folder
from tinymamba.checkpoint import save_model
from tinymamba.cli import class_lines, run_cli
from tinymamba.tokenizer import SimpleTokenizer

BENCHMARKS = [f"benchmarks.{file.stem}" for file in sorted(ROOT.glob("benchmarks/*.py"))
              if "\ndef main(" in file.read_text(encoding="utf-8")]  # fmt: skip
QUICK = ["testv2.py", "streaming.py", "serve.py", "peft.py", "quantize.py", "benchmark.py",
         "export_model.py", "hf_integration.py", "hf_integration.py push", *BENCHMARKS]  # fmt: skip
LARGE = {"torch", "numpy", "transformers", "fastapi", "uvicorn", "pydantic", "tokenizers",
         "onnx", "onnxruntime", "datasets", "tiktoken", "matplotlib", "scipy"}  # fmt: skip


def quick_help(script: str, *words: str) -> tuple[str, set[str]]:
    """What a script prints for --help, and the packages that it imports."""
    env = {"PYTHONPROFILEIMPORTTIME": "1"}
    done = run_script(script, *words, "--help", cwd=ROOT, env=env)
    lines = done.stderr.splitlines()
    others = [line for line in lines if not line.startswith("import time:")]
    assert (done.returncode, others) == (0, [])
    return done.stdout, {line.split("|")[2].strip().partition(".")[0] for line in lines}


def ordinary_help(script: str, *words: str) -> str:
    """The same from the script's own main, once all is imported."""
    main = importlib.import_module(script.removesuffix(".py")).main
    done = run_main(main, *words, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("command", QUICK)
def test_help_is_the_ordinary_one_without_large_imports(command, monkeypatch):
    script, *words = command.split()
    said, packages = quick_help(script, *words)
    monkeypatch.setattr(sys, "argv", [script, *words])  # the name of a script without usage text
    assert said == ordinary_help(script, *words)
    assert not packages & LARGE


@pytest.mark.parametrize("script", ["onnx_generate.py", "data/prepare.py"])
def test_help_of_scripts_without_a_model_needs_no_torch(script):
    assert not quick_help(script)[1] & {"torch", "transformers", "onnx", "datasets"}


def test_help_of_the_package_is_as_quick():
    said, packages = quick_help("tinymamba", "generate")
    assert said == ordinary_help("streaming.py").replace(
        "python streaming.py", "tinymamba generate"
    )
    assert not packages & LARGE


def test_the_lines_of_a_class_are_those_that_inspect_finds():
    for cls in (Config, streaming.Options, streaming.StreamingConfig, peft.Options):
        decorated = inspect.getsource(cls).partition("\n")
        assert decorated[0] == "@dataclass"
        assert "".join(class_lines(cls)).rstrip("\n") == decorated[2].rstrip("\n")


# ------------------------------------------------------------------------------------- imports


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with m.pt, a checkpoint of random weights with a tokenizer."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    model = TinyMambaModel(tiny_config())
    model.tokenizer = SimpleTokenizer().to_dict()
    save_model(folder / "m.pt", model)
    return folder


ANSWER = """
import sys, torch
before = set(sys.modules)
import streaming
streaming.main(["--checkpoint", "m.pt", "--prompt", "import os", "--max_tokens", "2"])
answered = set(sys.modules) - before
import serve
print("\\n" + " ".join(answered), " ".join(set(sys.modules) - before), sep="\\n")
"""
OURS = {"testv2", "streaming", "serve", "tinymamba", *sys.stdlib_module_names}
OF_SERVERS = {"fastapi", "starlette", "pydantic", "pydantic_core", "uvicorn", "prometheus_client",
              "anyio", "click", "h11", "opentelemetry", "idna", "sniffio", "annotated_types",
              "annotated_doc", "typing_extensions", "typing_inspection"}  # fmt: skip


def test_an_answer_imports_no_more_of_torch_and_a_server_only_what_it_serves_with(place):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ANSWER]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    answered, served = (line.split() for line in done.stdout.splitlines()[-2:])
    loading = {name for name in answered if name.startswith("torch.utils.serialization")}
    packages = {name.partition(".")[0] for name in {*answered} - loading}
    assert packages - OURS <= {"tokenizers"}, packages - OURS
    packages = {name.partition(".")[0] for name in {*served} - loading}
    packages -= {name for name in packages if name.startswith("_sysconfigdata")}
    assert packages - OURS - {"tokenizers"} <= OF_SERVERS, packages - OURS - OF_SERVERS


def test_garbage_is_searched_for_again_when_the_command_begins():
    gc.disable()
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: 0 if gc.isenabled() and gc.get_freeze_count() else 1)
    assert ended.value.code == 0 and gc.isenabled()


# ------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("changes", [{}, {"low_rank": 4, "gate": "top_k", "deepnet": False}])
def test_a_model_is_loaded_without_random_numbers_and_is_complete(tmp_path, changes):
    model = TinyMambaModel(tiny_config(**changes))
    save_model(tmp_path / "m.pt", model)
    save_folder(tmp_path, model)
    state = torch.get_rng_state()
    for path in (tmp_path / "m.pt", tmp_path):
        loaded = load_model(path)
        assert torch.equal(torch.get_rng_state(), state)
        for kind in ("named_parameters", "named_buffers"):
            want, got = dict(getattr(model, kind)()), dict(getattr(loaded, kind)())
            assert want.keys() == got.keys()
            assert all(torch.equal(want[name], got[name]) for name in want)
