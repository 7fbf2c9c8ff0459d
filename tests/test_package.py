"""The package tinymamba: what a build holds, and that it works where the repository is not."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from helpers import ROOT, assert_refused, files_below, flags, free_port, write_tokens

import setup
from setup import installed_commands, names_in, package_files, relative

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
COMMANDS = runpy.run_path(str(ROOT / "src" / "tinymamba" / "__main__.py"))["COMMANDS"]
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}
SMALL = flags(preset="demo", d_model=32, n_layer=1, num_heads=2, ssm_head_dim=8, vocab_size=257,
              batch_size=2, block_size=16, max_steps=2, validation_steps=1, generation_length=5,
              gradient_accumulation_steps=1, use_compile="false", device="cpu")  # fmt: skip
THERE = {name for name, (script, _) in COMMANDS.items() if (ROOT / script.split()[0]).is_file()}

# ------------------------------------------------------------------------- how scripts are changed

MODULES = {
    "testv2": {"Config"},
    "peft": {"LoRALinear", "set_adapter"},
    "serve": {"app"},
    "data.prepare": {"prepare"},
    "data": {"prepare"},
}


@pytest.mark.parametrize(
    ("script", "module"),
    [
        ("from testv2 import Config\n", "from .testv2 import Config\n"),
        ("from testv2 import (\n    Config,\n)\n", "from .testv2 import (\n    Config,\n)\n"),
        ("if 1:\n    from peft import set_adapter\n", "if 1:\n    from .peft import set_adapter\n"),
        ("import testv2\n", "from . import testv2\n"),
        ("import os; import testv2 as t\n", "import os; from . import testv2 as t\n"),
        ("from data.prepare import prepare\n", "from .data.prepare import prepare\n"),
        ("from data import prepare\n", "from .data import prepare\n"),
        ("import peft\npeft.set_adapter(1)\n", "from . import peft\npeft.set_adapter(1)\n"),
    ],
)
def test_imports_of_siblings_become_relative(script, module):
    assert relative("x.py", script, MODULES) == module


@pytest.mark.parametrize(
    "script",
    [
        "from peft import LoraConfig\n",
        "import peft\npeft.LoraConfig()\n",
        "import testv2x\n",
        "from .testv2 import Config\n",
        "from peft.tuners import LoraLayer\n",
        "import numpy, os\n",
        "TEXT = '''\nfrom testv2 import Config\n'''  # from testv2 import Config\n",
    ],
)
def test_other_imports_stay(script):
    assert relative("x.py", script, MODULES) == script


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("from peft import LoraConfig, set_adapter\n", "which peft"),
        ("import peft\npeft.LoraConfig; peft.set_adapter\n", "which peft"),
        ("import peft\n", "which peft"),
        ("from peft import *\n", "which peft"),
        ("import os, testv2\n", "relative"),
        ("import data.prepare\n", "relative"),
        ("from  testv2 import Config\n", "relative"),
    ],
)
def test_imports_that_could_go_wrong_end_the_build(script, reason):
    with pytest.raises(SystemExit, match=rf"(?s)error: line 1: .*{reason}"):
        relative("x.py", script, MODULES)


def test_a_folder_down_there_is_a_dot_more():
    assert (
        relative("data/x.py", "from testv2 import Config\n", MODULES)
        == "from ..testv2 import Config\n"
    )


def test_commands_in_texts_are_those_of_the_package():
    scripts = {name: script for name, (script, _) in COMMANDS.items()}
    for text, put in (
        ("run python data/prepare.py once", "run tinymamba prepare once"),
        ("python hf_integration.py convert --x", "tinymamba convert --x"),
        (
            "torchrun --nproc_per_node=2 testv2.py --x",
            "torchrun --nproc_per_node=2 -m tinymamba.testv2 --x",
        ),
        ("python onnx_generate.py; exported/testv2.py", None),
    ):
        assert installed_commands(text, scripts) == (put or text)


def test_every_file_beside_the_scripts_is_taken_by_being_there(tmp_path):
    (tmp_path / "src/tinymamba").mkdir(parents=True)
    shutil.copy(ROOT / "src/tinymamba/__main__.py", tmp_path / "src/tinymamba")
    (tmp_path / "serve.py").write_text("from testv2 import Config\n")
    (tmp_path / "testv2.py").write_text("class Config: pass\n")
    (tmp_path / "page.html").write_text("<p>from testv2 import Config")
    (tmp_path / "setup.py").write_text("1 / 0")
    assert package_files(tmp_path) == {
        "serve.py": b"from .testv2 import Config\n",
        "testv2.py": b"class Config: pass\n",
        "page.html": b"<p>from testv2 import Config",
    }


def test_the_names_of_the_package_are_names_of_its_modules():
    package = runpy.run_path(str(ROOT / "src" / "tinymamba" / "__init__.py"))
    for module, names in (package["NAMES"] | package["OF_EXTRAS"]).items():
        path = ROOT / f"{module}.py"
        assert not path.is_file() or {*names.split()} <= names_in(path.read_text()), module
    scripts = {path.removesuffix(".py").split("/")[0] for path in setup.find_scripts(ROOT)}
    assert {name for name in scripts if "." not in name} <= package["MODULES"]


def test_modules_ask_for_siblings_by_relative_imports_alone():
    modules = {Path(path).stem for path in setup.find_scripts(ROOT)} | {"data"}
    for path, data in package_files(ROOT).items():
        for node in ast.walk(ast.parse(data)) if path.endswith(".py") else ():
            asked = []
            if isinstance(node, ast.Import):
                asked = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                asked = [node.module]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
                "need",
                "import_module",
                "find_spec",
                "run_module",
            ):
                asked = [a.value for a in node.args if isinstance(a, ast.Constant)]
            found = {str(name).split(".")[0] for name in asked} & modules - setup.SHARED
            assert not found, f"{path}:{node.lineno}: {found}"


# ------------------------------------------------------------------------------------- the build


def build(tree: Path, *what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *what],
        cwd=tree,
        env={**os.environ, **OFFLINE, "SOURCE_DATE_EPOCH": "1750000000"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the repository, in which an earlier build has left something."""
    folder = tmp_path_factory.mktemp("tree")
    for path in ("LICENSE", "README.md", "MANIFEST.in", "pyproject.toml", "requirements.txt",
                 *(p.name for p in (*ROOT.glob("*.py"), *ROOT.glob("*.html")))):  # fmt: skip
        shutil.copy(ROOT / path, folder)
    for path in ("src", "tests", "benchmarks", "docs"):
        shutil.copytree(
            ROOT / path, folder / path, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    (folder / "data" / "text").mkdir(parents=True)
    shutil.copy(ROOT / "data" / "prepare.py", folder / "data")
    (folder / "data" / "text" / "train.bin").write_bytes(b"1234")
    (folder / "build" / "lib" / "tinymamba").mkdir(parents=True)
    (folder / "build" / "lib" / "tinymamba" / "stale.py").write_text("1 / 0")
    return folder


@pytest.fixture(scope="module")
def wheel(tree) -> Path:
    build(tree, "--wheel", "--outdir", "wheel")
    return next((tree / "wheel").iterdir())


@pytest.fixture(scope="module")
def sdist(tree) -> Path:
    """With the wheel that is made from it beside it."""
    build(tree, "--outdir", "both")
    return next((tree / "both").glob("*.tar.gz"))


def test_the_wheel_holds_the_scripts_as_modules_and_nothing_more(wheel):
    scripts = package_files(ROOT)
    own = files_below(ROOT / "src" / "tinymamba")
    expected = scripts | {p: data for p, data in own.items() if "__pycache__" not in p}
    with zipfile.ZipFile(wheel) as file:
        held = {name: file.read(name) for name in file.namelist()}
    found = {n.removeprefix("tinymamba/"): d for n, d in held.items() if "dist-info/" not in n}
    assert found == expected
    assert {"testv2.py", "peft.py", "onnx_generate.py", "data/prepare.py"} <= found.keys()
    assert found["onnx_generate.py"] == (ROOT / "onnx_generate.py").read_bytes()
    assert ("page.html" in found) == (ROOT / "page.html").is_file()


def test_the_sdist_holds_what_a_build_takes_and_gives_the_same_wheel(wheel, sdist):
    with tarfile.open(sdist) as file:
        names = {m.name.partition("/")[2] for m in file if m.isfile()}
    made = {"PKG-INFO", "setup.cfg"} | {n for n in names if "egg-info/" in n}
    own = {f"src/tinymamba/{p}" for p in files_below(ROOT / "src/tinymamba") if ".pyc" not in p}
    assert names - made == own | {
        *setup.find_scripts(ROOT),
        "LICENSE",
        "README.md",
        "MANIFEST.in",
        "pyproject.toml",
        "requirements.txt",
        "setup.py",
    }
    assert sdist.with_name(wheel.name).read_bytes() == wheel.read_bytes()


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as file:
        path = next(n for n in file.namelist() if n.endswith("/METADATA"))
        facts = message_from_bytes(file.read(path))
    asked = facts.get_all("Requires-Dist")
    core = (ROOT / "requirements.txt").read_text().split()
    assert [line for line in asked if "extra ==" not in line] == core
    assert any(re.fullmatch(r"torch==[\d.]+", line) for line in core)
    assert facts.get_all("Provides-Extra") == list(EXTRAS)
    assert facts["License-Expression"] == "MIT" and facts["License-File"] == "LICENSE"
    assert facts["Version"] in wheel.name
    assert not any(line.startswith("License ::") for line in facts.get_all("Classifier"))


def test_extras_are_what_is_tested():
    tested = (ROOT / "requirements-dev.txt").read_text().split()
    for name, packages in EXTRAS.items():
        assert name == "all" or {*packages} <= {*tested}, name
    assert EXTRAS["all"] == [f"tinymamba[{','.join(n for n in EXTRAS if n != 'all')}]"]


def test_an_editable_install_is_refused_in_one_line(tree):
    code = "from setuptools.build_meta import build_editable; build_editable('.')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: --editable: ")


# ------------------------------------------------------------------------------------- installed


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder of packages with this one alone."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-compile",
            "--target",
            folder,
            wheel,
        ],
        env={**os.environ, **OFFLINE},
        check=True,
    )
    return folder


def run_python(words, site: Path, cwd: Path) -> subprocess.CompletedProcess:
    """Python, in a folder where the repository is not, with the package among those installed."""
    env = {
        **os.environ,
        **OFFLINE,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(site),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_code(code: str, site: Path, cwd: Path) -> str:
    done = run_python(["-c", code], site, cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def tinymamba(site, tmp_path):
    """Runs the command as it is installed: tinymamba("train", "--help")."""
    return lambda *words: run_python([site / "bin" / "tinymamba", *words], site, tmp_path)


def test_nothing_else_lands_among_the_packages(site):
    info = next(site.glob("*.dist-info"))
    assert {p.name for p in site.iterdir()} == {"tinymamba", "bin", info.name}
    assert [p.name for p in (site / "bin").iterdir()] == ["tinymamba"]


def test_names_come_from_the_package_and_peft_is_hugging_faces(site, tmp_path):
    run_code(
        """
import sys
import tinymamba
assert not {"torch", "numpy"} & sys.modules.keys()
assert tinymamba.__version__ and "TinyMambaModel" in dir(tinymamba)
from tinymamba import *
from tinymamba import Config, OnnxModel, StreamingServer, TinyMambaModel, testv2
import tinymamba.data.prepare, tinymamba.export_model, tinymamba.quantize
assert TinyMambaModel is testv2.TinyMambaModel and tinymamba.streaming.StreamingServer
assert LoRALinear.__module__ == "tinymamba.peft"
for name in tinymamba.__all__:
    assert hasattr(tinymamba, name), name
model = apply_lora_to_model(TinyMambaModel(Config(d_model=32, n_layer=1, num_heads=2)))
set_adapter(model, "default")
try:
    tinymamba.nothing
    raise SystemExit("found")
except AttributeError as e:
    assert "nothing" in str(e)
from importlib.util import find_spec
assert find_spec("peft").origin.endswith("/peft/__init__.py")  # ours is no folder
ours = {"testv2", "streaming", "data", "quantize", "ssm_kernels", "export_model", "peft"}
assert not ours & sys.modules.keys()
""",
        site,
        tmp_path,
    )


def test_help_version_and_commands_that_there_are_none_of(tinymamba, site):
    done = tinymamba("--help")
    assert done.returncode == 0 and not done.stderr
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\w", done.stdout, flags=re.M)
    version = next(site.glob("*.dist-info")).name.split("-")[1].removesuffix(".dist")
    assert tinymamba("--version").stdout.strip() == f"tinymamba {version}"
    assert_refused(tinymamba("trian"), "trian: unknown command; did you mean train?")
    assert_refused(tinymamba("--bits", "8"), "--bits: unknown command; tinymamba --help")
    assert_refused(tinymamba(), "COMMAND: is missing")


def test_every_command_is_its_script(site, tmp_path):
    """In one process, as each has to import PyTorch."""
    out = run_code(
        f"""
import sys
from tinymamba.__main__ import main
for name in {sorted(THERE)}:
    sys.argv = ["tinymamba", name, "--help"]
    try:
        main()
    except SystemExit as e:
        assert e.code == 0, name
    sys.argv = ["tinymamba", name, "--no_such_flag"]
    try:
        main()
    except SystemExit as e:
        assert e.code == 2, name
""",
        site,
        tmp_path,
    )
    assert re.findall(r"^usage: tinymamba (\w+)", out, flags=re.M) == sorted(THERE)
    assert not re.search(
        r"python \S+\.py",
        out.replace("python onnx_generate.py", "").replace(
            "python exported_models/onnx/onnx_generate.py", ""
        ),
    )


def test_packages_that_are_missing_are_named(site, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['tinymamba', 'prepare']\n"
        "from tinymamba.__main__ import main; main()"
    )
    assert_refused(
        run_python(["-c", code], site, tmp_path), "torch: is not installed; pip install torch"
    )


BOOK = "Once there was a book, and this was its text.\n" * 80


def test_from_a_text_to_a_quantised_and_an_exported_model(tinymamba, site, tmp_path):
    before = files_below(site)
    (tmp_path / "book.txt").write_text(BOOK)

    def succeed(done) -> str:
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "bytes per token" in succeed(
        tinymamba("prepare", "--input", "book.txt", "--tokenizer", "byte")
    )
    assert "saved" in succeed(tinymamba("train", *SMALL, *flags(num_workers=2)))
    assert succeed(tinymamba("generate", "--prompt", "Once", "--max_tokens", 3))
    assert "of float32" in succeed(
        run_python(
            ["-m", "tinymamba", "quantize", "--bits", 8, "--output_dir", "int8_model"],
            site,
            tmp_path,
        )
    )
    assert "MB" in succeed(tinymamba("export", "--checkpoint", "int8_model", "--format", "pytorch"))
    assert (tmp_path / "exported_models" / "pytorch" / "model.safetensors").is_file()
    assert files_below(site) == before


def test_the_built_in_corpus_is_made_where_the_run_is(site, tmp_path):
    (tmp_path / "data" / "text").mkdir(parents=True)
    (tmp_path / "data" / "text" / "vocab.txt").write_text("mine")
    done = run_python(["-m", "tinymamba.testv2", *SMALL], site, tmp_path)
    assert "preparing the built-in corpus" in done.stdout
    assert_refused(done, "data/text/vocab.txt", "--force")  # by tinymamba.data.prepare


@pytest.mark.slow
def test_several_processes(site, tmp_path):
    (tmp_path / "data" / "text").mkdir(parents=True)
    for name in ("train.bin", "val.bin"):
        write_tokens(tmp_path / "data" / "text" / name, BOOK)
    done = run_python(
        [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--master_port",
            free_port(),
            "-m",
            "tinymamba.testv2",
            *SMALL,
        ],
        site,
        tmp_path,
    )
    assert done.returncode == 0 and "saved" in done.stdout, done.stderr


@pytest.mark.slow
def test_processes_of_its_own_that_start_afresh(tinymamba):
    done = tinymamba(
        "benchmark",
        *flags(
            benchmark_type="memory",
            models_to_compare="llama",
            d_model=32,
            n_layer=1,
            vocab_size=64,
            sequence_lengths=16,
            test_iterations=1,
            output_dir="results",
        ),
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"memory, 256 x 16, llama: [\d.,]+", done.stdout), done.stdout
