"""The package tinymamba: how scripts become its modules, what a build holds, and that it works
from a wheel, from a checkout and from an editable install."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from helpers import (
    COMMANDS,
    EXTRAS,
    OFFLINE,
    ROOT,
    assert_refused,
    build,
    build_sources,
    files_below,
    flags,
    free_port,
    write_tokens,
)

from tinymamba.checkout import ScriptLoader, as_module, find_scripts, package_files

SMALL = flags(preset="demo", d_model=32, n_layer=1, num_heads=2, ssm_head_dim=8, vocab_size=257,
              batch_size=2, block_size=16, max_steps=2, validation_steps=1, generation_length=5,
              gradient_accumulation_steps=1, use_compile="false", device="cpu")  # fmt: skip
BOOK = "Once there was a book, and this was its text.\n" * 80
SCRIPTS = ["data/prepare.py", "page.html", "peft.py", "testv2.py"]
NAMES = "|".join(p.removesuffix(".py").replace("/", ".") for p in find_scripts(ROOT))

# ------------------------------------------------------------------------ scripts become modules


def test_imports_of_scripts_name_the_package():
    for script, module in (
        ("from testv2 import Config\n", "from tinymamba.testv2 import Config\n"),
        ("x = 1\n\tfrom peft import y\n", "x = 1\n\tfrom tinymamba.peft import y\n"),
        ("if 1:\r\n    from peft import (\r\n", "if 1:\r\n    from tinymamba.peft import (\r\n"),
        ("from data.prepare import x\n", "from tinymamba.data.prepare import x\n"),
    ):
        assert as_module(script, SCRIPTS) == module
        assert as_module(module, SCRIPTS) == module


def test_other_imports_stay():
    for text in (
        "import testv2x, peft\n",
        "from testv2x import Config\n",
        "from peft.tuners import LoraLayer\n",
        "from .testv2 import Config\n",
        "from data import prepare\n",
        "x = 1  # from testv2 import Config\n",
    ):
        assert as_module(text, SCRIPTS) == text


def test_scripts_import_each_other_only_in_the_form_that_is_replaced():
    for path, data in package_files(ROOT).items():
        text = data.decode() if path.endswith(".py") else ""
        left = re.findall(rf"^[ \t]*(?:from|import) +(?:\w+, *)*(?:{NAMES})\b.*", text, re.M)
        called = rf"\b(?:need|import_module|find_spec|run_module)\(\s*\"(?!peft\b)(?:{NAMES})\b.*"
        assert not left + re.findall(called, text), path


def test_nothing_in_the_folder_of_the_package_imports_a_script():
    for path in {*(ROOT / "tinymamba").glob("*.py")} - {ROOT / "tinymamba/__init__.py"}:
        text = path.read_text(encoding="utf-8")
        up = rf"^[ \t]*(?:from|import) (?:tinymamba\.)?(?:{NAMES})\b.*"
        assert not re.findall(up, text, re.M), path


def test_commands_in_texts_are_those_of_the_package():
    for text, put in (
        ("run python data/prepare.py once", "run tinymamba prepare once"),
        ("python hf_integration.py convert --x", "tinymamba convert --x"),
        (
            "torchrun --nproc_per_node=2 testv2.py --x",
            "torchrun --nproc_per_node=2 -m tinymamba.testv2 --x",
        ),
        ("python onnx_generate.py; exported/testv2.py", None),
    ):
        assert as_module(text, SCRIPTS) == (put or text)


def test_every_file_beside_the_scripts_is_taken_by_being_there(tmp_path):
    for folder in ("tinymamba/web", "data", "tests"):
        (tmp_path / folder).mkdir(parents=True)
    for name, text in {
        "serve.py": "from testv2 import Config\n",
        "testv2.py": "class Config: pass\n",
        "page.html": "<p>from testv2 import Config",
        "data/prepare.py": "",
        "tinymamba/cli.py": '"python testv2.py"\n',
        "tinymamba/web/engine.js": "python testv2.py",
        "setup.py": "1 / 0",
        "tests/test_serve.py": "1 / 0",
        "notes.txt": "python testv2.py",
    }.items():
        (tmp_path / name).write_text(text)
    assert package_files(tmp_path) == {
        "serve.py": b"from tinymamba.testv2 import Config\n",
        "testv2.py": b"class Config: pass\n",
        "page.html": b"<p>from testv2 import Config",
        "data/prepare.py": b"",
        "cli.py": b'"tinymamba train"\n',
        "web/engine.js": b"python testv2.py",
    }


def test_a_checkout_loads_what_a_build_writes():
    built = package_files(ROOT)
    for path in (p for p in find_scripts(ROOT) if p.endswith(".py")):
        loader = ScriptLoader(ROOT / path)
        assert loader.get_data(loader.get_filename("")) == built[path], path


# ------------------------------------------------------------------------------------- the build


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """A copy of the repository with more files in it, among them those of an earlier build."""
    folder = tmp_path_factory.mktemp("tree")
    for path in build_sources():
        (folder / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    for path in ("tests", "benchmarks", "docs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / path, folder / path, ignore=ignored)
    (folder / "data" / "text").mkdir()
    (folder / "data" / "text" / "train.bin").write_bytes(b"1234")
    (folder / "build" / "lib" / "tinymamba").mkdir(parents=True)
    (folder / "build" / "lib" / "tinymamba" / "stale.py").write_text("1 / 0")
    return folder


@pytest.fixture(scope="session")
def wheel(tree) -> Path:
    build(tree, "--wheel", "--outdir", "wheel")
    return next((tree / "wheel").iterdir())


@pytest.fixture(scope="session")
def sdist(tree) -> Path:
    """With the wheel that is built from it in the same folder."""
    build(tree, "--outdir", "both")
    return next((tree / "both").glob("*.tar.gz"))


def test_the_wheel_holds_the_package_and_nothing_more(wheel, tree):
    with zipfile.ZipFile(wheel) as file:
        found = {name: file.read(name) for name in file.namelist() if "dist-info/" not in name}
    expected = package_files(tree)
    assert found == {f"tinymamba/{path}": data for path, data in expected.items()}
    assert {"cli.py", "testv2.py", "page.html", "data/prepare.py"} <= expected.keys()
    assert b"\nfrom tinymamba.testv2 import" in found["tinymamba/peft.py"]
    assert b"tinymamba prepare" in found["tinymamba/testv2.py"]
    for name in ("onnx_generate.py", "page.html"):  # neither imports a script
        assert found[f"tinymamba/{name}"] == (tree / name).read_bytes()


def test_the_sdist_holds_what_a_build_takes_and_gives_the_same_wheel(wheel, sdist):
    with tarfile.open(sdist) as file:
        names = {m.name.partition("/")[2] for m in file if m.isfile()}
    made = {"PKG-INFO", "setup.cfg"} | {n for n in names if "egg-info/" in n}
    assert names - made == build_sources()
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


def test_mypy_reads_every_file_that_is_not_a_test():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    read = {path for pattern in project["tool"]["mypy"]["files"] for path in ROOT.glob(pattern)}
    scripts = [ROOT / path for path in find_scripts(ROOT) if path.endswith(".py")]
    for path in (*scripts, *ROOT.glob("tinymamba/*.py"), *ROOT.glob("benchmarks/*.py")):
        assert {path, path.parent} & read, path


# ----------------------------------------------------------------------------- where it is run


class Environment:
    """Runs Python where the package is found, in a folder where the repository is not."""

    def __init__(self, python: Path | str, command: Path, **variables: str):
        self.python, self.command = python, command
        self.variables = {**OFFLINE, "OMP_NUM_THREADS": "1", **variables}

    def run(self, *words, cwd: Path, program: Path | None = None) -> subprocess.CompletedProcess:
        """Run Python, or another program, with these words."""
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(
            [program or self.python, *map(str, words)],
            cwd=cwd,
            env={**inherited, **self.variables},
            capture_output=True,
            encoding="utf-8",
            timeout=300,
        )

    def run_code(self, code: str, cwd: Path) -> str:
        done = self.run("-c", code, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run_commands(self, *commands: list[str], cwd: Path) -> subprocess.CompletedProcess:
        """Run commands of the package in one process, as each has to import PyTorch."""
        code = f"""
import sys
from tinymamba.__main__ import main
for words in {commands!r}:
    sys.argv = ["tinymamba", *words]
    try:
        main()
    except SystemExit as e:
        print("exit code", e.code or 0, flush=True)
"""
        done = self.run("-c", code, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done


@pytest.fixture(scope="session")
def site(wheel, tmp_path_factory) -> Path:
    """A folder of installed packages that holds this one alone."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-compile", "--target", folder]
    command = [sys.executable, "-m", "pip", "install", *options, wheel]
    subprocess.run(command, env={**os.environ, **OFFLINE}, check=True)
    return folder


@pytest.fixture(scope="session")
def installed(site) -> Environment:
    command = next((site / "bin").iterdir())
    variables = {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    return Environment(sys.executable, command, **variables)


@pytest.fixture(scope="session")
def editable(tree, tmp_path_factory) -> Environment:
    """A virtual environment with the tree installed in place, and the packages of this one."""
    folder = tmp_path_factory.mktemp("editable")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    paths = sysconfig.get_paths("venv", vars={"base": str(folder), "platbase": str(folder)})
    also = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    Path(paths["purelib"], "also.pth").write_text(also)
    python = shutil.which("python", path=paths["scripts"])
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-compile"]
    command = [sys.executable, "-m", "pip", "--python", python, "install", *options]
    subprocess.run([*command, "--editable", tree], env={**os.environ, **OFFLINE}, check=True)
    return Environment(python, Path(shutil.which("tinymamba", path=paths["scripts"])))


@pytest.fixture(params=["installed", "editable"])
def environment(request) -> Environment:
    return request.getfixturevalue(request.param)


SLOW_IF_INSTALLED = pytest.mark.parametrize(  # its sources are those that the checkout loads
    "environment", ["editable", pytest.param("installed", marks=pytest.mark.slow)], indirect=True
)


def test_nothing_else_lands_among_the_packages(site):
    info = next(site.glob("*.dist-info"))
    assert {p.name for p in site.iterdir()} == {"tinymamba", "bin", info.name}
    assert [p.stem for p in (site / "bin").iterdir()] == ["tinymamba"]


@SLOW_IF_INSTALLED
def test_names_come_from_the_package_and_peft_is_hugging_faces(environment, tmp_path):
    environment.run_code(
        """
import inspect, sys
from importlib.util import find_spec
import tinymamba
assert not {"torch", "numpy", "argparse"} & sys.modules.keys()
assert tinymamba.__version__ and "TinyMambaModel" in dir(tinymamba)
from tinymamba import *
from tinymamba import Config, OnnxModel, StreamingServer, TinyMambaModel, testv2
import tinymamba.data.prepare, tinymamba.export_model, tinymamba.quantize
assert TinyMambaModel is testv2.TinyMambaModel and tinymamba.streaming.StreamingServer
assert tinymamba.peft.TinyMambaModel is TinyMambaModel
assert LoRALinear.__module__ == "tinymamba.peft"
for name in tinymamba.__all__:
    value = getattr(tinymamba, name)
    home = getattr(value, "__module__", "tinymamba.x")
    assert home == "tinymamba." + tinymamba.HOMES.get(name, "x"), (name, home)
assert "d_model: int" in inspect.getsource(Config)  # from which --help is made
model = apply_lora_to_model(TinyMambaModel(Config(d_model=32, n_layer=1, num_heads=2)))
set_adapter(model, "default")
try:
    tinymamba.nothing
    raise SystemExit("found")
except AttributeError as e:
    assert "nothing" in str(e)
assert find_spec("peft").origin.replace("\\\\", "/").endswith("/peft/__init__.py")  # ours is a file
ours = {"testv2", "streaming", "serve", "quantize", "data", "benchmark", "benchmarks",
        "export_model", "hf_integration", "onnx_generate", "tests", "setup", "cli", "kernels"}
assert not (ours | {"peft"}) & sys.modules.keys()
assert not [name for name in ours if find_spec(name)]
assert not [n for n in ("setup", "tests", "benchmarks", "nothing") if find_spec("tinymamba." + n)]
""",
        tmp_path,
    )


def test_the_tables_of_names_list_every_script(installed, tmp_path):
    scripts = {path.split("/")[0].removesuffix(".py") for path in find_scripts(ROOT)}
    listed = installed.run_code("import tinymamba; print(*tinymamba.MODULES)", tmp_path)
    assert {name for name in scripts if "." not in name} <= {*listed.split()}


def test_help_version_and_unknown_commands(environment, tree, tmp_path):
    def tinymamba(*words):
        return environment.run(*words, cwd=tmp_path, program=environment.command)

    version = re.search('__version__ = "(.*)"', (tree / "tinymamba/__init__.py").read_text())[1]
    assert tinymamba("--version").stdout.strip() == f"tinymamba {version}"
    done = tinymamba("--help")
    assert done.returncode == 0 and not done.stderr
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\w", done.stdout, flags=re.M)
    assert_refused(tinymamba("trian"), "trian: unknown command; did you mean train?")
    assert_refused(tinymamba("--bits", "8"), "--bits: unknown command; tinymamba --help")
    assert_refused(tinymamba(), "COMMAND: is missing")


def test_every_command_is_its_script(installed, tmp_path):
    each = [[[name, "--help"], [name, "--no_such_flag"]] for name in sorted(COMMANDS)]
    out = installed.run_commands(*sum(each, []), cwd=tmp_path).stdout
    assert re.findall(r"^usage: tinymamba (\w+)", out, flags=re.M) == sorted(COMMANDS)
    assert re.findall(r"^exit code (.*)", out, flags=re.M) == ["0", "2"] * len(COMMANDS)
    own = ("python onnx_generate.py", "python exported_models/onnx/onnx_generate.py")
    assert {*re.findall(r"python \S+\.py", out)} <= {*own}


def test_packages_that_are_missing_are_named(installed, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['tinymamba', 'train']\n"
        "from tinymamba.__main__ import main; main()"
    )
    done = installed.run("-c", code, cwd=tmp_path)
    assert_refused(done, "torch: is not installed; pip install torch")


def test_from_a_text_to_a_quantized_and_an_exported_model(installed, site, tmp_path):
    """First without the text: the built-in corpus would replace a file that is there."""
    before = files_below(site)
    (tmp_path / "book.txt").write_text(BOOK)
    (tmp_path / "data" / "text").mkdir(parents=True)
    (tmp_path / "data" / "text" / "vocab.txt").write_text("mine")
    done = installed.run_commands(
        ["train", *SMALL],
        ["prepare", "--input", "book.txt", "--tokenizer", "byte", "--force"],
        ["train", *SMALL, "--num_workers", "2"],
        ["generate", "--prompt", "Once", "--max_tokens", "3"],
        ["quantize", "--bits", "8", "--output_dir", "int8_model"],
        ["export", "--checkpoint", "int8_model", "--format", "pytorch"],
        cwd=tmp_path,
    )
    outputs = re.split(r"exit code (\d+)\n", done.stdout)
    assert outputs[1::2] == ["2", "0", "0", "0", "0", "0"], done.stdout + done.stderr
    refused, prepared, trained, said, quantized, exported, _ = outputs[::2]
    assert "preparing the built-in corpus" in refused
    assert "error: data/text/vocab.txt: " in done.stderr  # by tinymamba.data.prepare
    assert "bytes per token" in prepared and "saved" in trained and said
    assert "of float32" in quantized and "MB" in exported
    assert (tmp_path / "exported_models" / "pytorch" / "model.safetensors").is_file()
    assert files_below(site) == before


# ------------------------------------------------------------------------------ in the checkout


def test_python_m_tinymamba_works_without_installing(tree):
    done = Environment(sys.executable, tree).run("-m", "tinymamba", "--help", cwd=tree)
    assert done.returncode == 0 and "  benchmark " in done.stdout and not done.stderr


def test_a_script_and_its_module_have_bytecode_of_their_own(tree):
    """Each of testv2 and tinymamba.testv2 is loaded before and after the other is compiled."""
    code = """
import importlib.util, inspect, pathlib, sys
import tinymamba.peft, tinymamba.testv2
assert not [*pathlib.Path("__pycache__").glob("*")] + [*pathlib.Path("data").rglob("*.pyc")]
import peft, testv2
cached = [path.name.split(".")[0] for path in pathlib.Path("__pycache__").iterdir()]
assert {"peft", "testv2"} <= {*cached} and len({*cached}) == len(cached)
assert tinymamba.peft.TinyMambaModel is tinymamba.testv2.TinyMambaModel
assert peft.TinyMambaModel is testv2.TinyMambaModel is not tinymamba.testv2.TinyMambaModel
assert testv2.UserError is tinymamba.UserError is tinymamba.testv2.UserError
assert inspect.getsource(testv2.Config) == inspect.getsource(tinymamba.testv2.Config)
for name, command in (("testv2", "python testv2.py"), ("tinymamba.testv2", "tinymamba train")):
    code = importlib.util.find_spec(name).loader.get_code(name)
    assert command in code.co_consts[0], name
sys.argv = ["tinymamba", "train", "--help"]
from tinymamba.__main__ import main
main()
"""
    shutil.rmtree(tree / "__pycache__", ignore_errors=True)
    out = Environment(sys.executable, tree, PYTHONDONTWRITEBYTECODE="").run_code(code, tree)
    assert out.startswith("usage: tinymamba train ")
    assert "    tinymamba train --preset demo" in out and "--d_model" in out


# ------------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_torchrun(environment, tmp_path):
    (tmp_path / "data" / "text").mkdir(parents=True)
    for name in ("train.bin", "val.bin"):
        write_tokens(tmp_path / "data" / "text" / name, BOOK)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", free_port()]
    done = environment.run(*launcher, "-m", "tinymamba.testv2", *SMALL, cwd=tmp_path)
    assert done.returncode == 0 and "saved" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("start", ["tinymamba", "tinymamba.benchmark"])
def test_processes_that_are_spawned(environment, start, tmp_path):
    command = ["benchmark"] if start == "tinymamba" else []
    small = flags(benchmark_type="memory", models_to_compare="llama", d_model=32, n_layer=1,
                  vocab_size=64, sequence_lengths=16, test_iterations=1,
                  output_dir="results")  # fmt: skip
    done = environment.run("-m", start, *command, *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"memory, 256 x 16, llama: [\d.,]+", done.stdout), done.stdout
