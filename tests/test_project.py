"""What the files around the code promise: versions, workflow, guide, rules of the layout."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import textwrap
import tomllib
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml
from conftest import LONGEST
from helpers import POSIX, ROOT

import tinymamba
from benchmarks import ledger
from testv2 import Config
from tinymamba.cli import UserError, parse_flags

SCRIPTS = {path.stem: path for path in ROOT.glob("*.py") if path.name != "setup.py"}
PACKAGE = sorted((ROOT / "tinymamba").glob("*.py"))
FOLDERS = sorted(path for name in ("benchmarks", "data") for path in (ROOT / name).glob("*.py"))
CODE = [*SCRIPTS.values(), *PACKAGE, *FOLDERS]
TESTS = sorted((ROOT / "tests").glob("*.py"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT).as_posix()}:{node.lineno}"


def tracked_files() -> list[Path]:
    """The files of the repository; the test is skipped where git does not know them."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    files = (ROOT / name for name in done.stdout.decode().split("\0") if name)
    return [file for file in files if file.is_file()]


# ---------------------------------------------------------------------- versions and metadata

PROJECT = tomllib.loads(read("pyproject.toml"))["project"]
CHANGELOG = read("CHANGELOG.md")


def test_the_citation_says_what_the_package_says():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "type"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["version"] == tinymamba.__version__
    assert citation["license"] == PROJECT["license"] == "MIT"
    assert citation["authors"] == PROJECT["authors"]
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert citation["keywords"] == PROJECT["keywords"]


def test_the_changelog_keeps_its_form_and_ends_with_this_version():
    headings = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", CHANGELOG, re.M)
    assert headings[0] == ("Unreleased", "")
    assert headings[1][0] == tinymamba.__version__
    assert len(headings) == CHANGELOG.count("\n## ")
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in headings[1:])
    numbers = [tuple(map(int, version.split("."))) for version, _ in headings[1:]]
    assert numbers == sorted(numbers, reverse=True)
    kinds = set(re.findall(r"^### (.+)$", CHANGELOG, re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    links = dict(re.findall(r"^\[(.+?)\]: (\S+)$", CHANGELOG, re.M))
    assert links.keys() == {version for version, _ in headings}
    assert all(url.startswith(PROJECT["urls"]["Repository"] + "/") for url in links.values())


# ------------------------------------------------------------------- workflow, hooks and forms

WORKFLOW = yaml.safe_load(read(".github/workflows/test.yml"))
JOB, SPEED = WORKFLOW["jobs"]["test"], WORKFLOW["jobs"]["speed"]


def make_commands(target: str) -> list[str]:
    """What `make TARGET` runs in a fresh checkout, without the folder of the environment."""
    rules, names = {}, []  # target: (what it needs, its commands)
    for line in read("Makefile").splitlines():
        if rule := re.match(r"([\w./ -]+?): *([^#]*)", line):
            names = rule[1].split()
            for name in names:
                rules.setdefault(name, ([], []))[0].extend(rule[2].replace("|", " ").split())
        elif line.startswith("\t"):
            command = line.strip().partition("  #")[0]
            for name in names:
                rules[name][1].append(command.replace("$(BIN)/", "").replace("$(PYTHON)", "python"))

    def commands(name: str) -> list[str]:
        needs, own = rules.get(name, ([], []))
        own = [command.replace("$<", "".join(needs[:1])) for command in own]
        return [*(c for need in needs for c in commands(need)), *own]

    found = dict.fromkeys(commands(target))
    return [command for command in found if not command.startswith("touch ")]


def windows_step() -> dict:
    return next(step for step in JOB["steps"] if step.get("if") == "runner.os == 'Windows'")


def test_windows_runs_the_commands_of_make_test():
    step = windows_step()
    given = "".join(f"{name}={value} " for name, value in step["env"].items())
    commands = [command.removeprefix(given) for command in make_commands("test")]
    assert commands != make_commands("test"), "the same environment"
    run = step["run"].replace(".venv/Scripts/", "").splitlines()
    assert run == commands
    assert step["shell"] == "bash", "others go on after an error"


def test_the_workflow_runs_make_test_on_every_system():
    runs = [step["run"] for step in JOB["steps"] if step.get("if") == "runner.os != 'Windows'"]
    assert runs == ["make test"]
    every = [step["run"] for step in JOB["steps"] if "run" in step and "if" not in step]
    assert every == ["tests/browser.sh"]
    matrix = JOB["strategy"]["matrix"]
    assert set(matrix["os"]) == {"ubuntu-latest", "macos-latest", "windows-latest"}
    assert PROJECT["requires-python"] == f">={matrix['python'][0]}"
    assert JOB["timeout-minutes"] and WORKFLOW["concurrency"]["cancel-in-progress"]
    assert WORKFLOW["permissions"] == {"contents": "read"}
    used = [step for step in JOB["steps"] if "uses" in step]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in used)
    [python] = [step["with"] for step in used if "setup-python" in step["uses"]]
    assert python["cache"] == "pip"
    assert all((ROOT / name).is_file() for name in python["cache-dependency-path"].split())
    assert (WORKFLOW.keys() - {"name"}) == {True, "permissions", "concurrency", "jobs"}  # on: True


@POSIX
@pytest.mark.parametrize(
    "browser, user, asked", [("", 0, True), ("", 1000, False), ("google-chrome", 0, False)]
)
def test_root_on_debian_installs_chromium_where_no_browser_is(tmp_path, browser, user, asked):
    for name in ("bash", "env", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    log = f"echo ${{0##*/}} $* >> {shlex.quote(str(tmp_path / 'log'))}"
    programs = {"apt-get": log, "npm": log, "id": f"echo {user}", browser or "unused": ""}
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    subprocess.run([ROOT / "tests/browser.sh"], check=True, env={"PATH": str(tmp_path)})
    *install, npm = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[1] for line in install] == ["update", "install"] * asked
    assert npm.startswith("npm install --no-package-lock")


def test_the_workflow_compares_speed_with_the_commit_before():
    checkout, python, make, before, after = SPEED["steps"]
    assert checkout["with"]["fetch-depth"] == 2
    [tests_python] = [s["with"] for s in JOB["steps"] if "setup-python" in s.get("uses", "")]
    assert python["with"].items() >= {n: v for n, v in tests_python.items() if "cache" in n}.items()
    assert make["run"] == "make .venv/dev"
    there, measure, back = before["run"].splitlines()
    assert (there, back) == ("git checkout -q HEAD^", "git checkout -q -")
    check, warn = after["run"].split(" | ")
    assert check == measure.replace("ledger --output", "ledger --check --output")
    options = parse_flags(ledger.Options, shlex.split(check)[3:], "", "")
    assert options.check and options.output == Path("../ledger.jsonl")
    assert warn == "sed 's/^warning:/::warning::/'" and after["shell"] == "bash"


def test_the_hooks_run_the_ruff_of_the_requirements():
    pin = re.search(r"^ruff==(\S+)$", read("requirements-dev.txt"), re.M)[1]
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))
    found = {repo["repo"].rsplit("/", 1)[1]: repo for repo in hooks["repos"]}
    assert found["ruff-pre-commit"]["rev"] == f"v{pin}"
    ids = {hook["id"] for repo in hooks["repos"] for hook in repo["hooks"]}
    assert ids == {"ruff-check", "ruff-format", "end-of-file-fixer", "trailing-whitespace"}


def test_files_are_as_the_hooks_would_leave_them():
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))
    [spaces] = [h for r in hooks["repos"] for h in r["hooks"] if h["id"] == "trailing-whitespace"]
    for file in tracked_files():
        data, name = file.read_bytes(), file.relative_to(ROOT).as_posix()
        if b"\0" in data or re.search(hooks["exclude"], name):
            continue
        assert not data or re.search(rb"[^\n]\n\Z", data), f"{name}: does not end with one newline"
        if not re.search(spaces["exclude"], name):
            assert not re.search(rb"[ \t\r]$", data, re.M), f"{name}: space at the end of a line"


def test_the_forms_are_complete():
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = {f.stem: yaml.safe_load(f.read_text(encoding="utf-8")) for f in folder.glob("*.yml")}
    assert forms.keys() == {"bug", "feature", "config"}
    config = forms.pop("config")
    assert all(link.keys() == {"name", "url", "about"} for link in config["contact_links"])
    for name, form in forms.items():
        assert form["name"] and form["description"] and form["labels"], name
        assert len({field["id"] for field in form["body"]}) == len(form["body"])
        assert all(field["attributes"]["label"] for field in form["body"])
    asked = [field["id"] for field in forms["bug"]["body"] if field["validations"]["required"]]
    assert asked == ["command", "error", "versions", "config"]
    assert all(words in str(forms["bug"]) for words in ("python -V", "torch.__version__", "error:"))


# ---------------------------------------------------------------------- the contributing guide

GUIDE = read("CONTRIBUTING.md")
QUOTED = set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", GUIDE, flags=re.S)))


def names_in(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """What the statements of a module or a class define."""
    found = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {n.id: node for t in targets if t for n in ast.walk(t) if isinstance(n, ast.Name)}
    return found


def test_functions_that_the_guide_names_exist():
    references = [q.split(":") for q in QUOTED if re.fullmatch(r"[\w/]+\.py:[\w.]+", q)]
    assert len(references) > 30
    for path, name in references:
        body, found = parsed(ROOT / path).body, None
        for part in name.split("."):
            found = names_in(body).get(part)
            assert found, f"CONTRIBUTING.md: {path}:{name} does not exist"
            body = getattr(found, "body", [])


def test_files_that_the_guide_names_exist():
    quoted = {q for q in QUOTED if re.fullmatch(r"\w[\w./-]*(\.(py|md|txt|html|json)|/)", q)}
    links = set(re.findall(r"\]\(([^)#]+)\)", GUIDE))
    commands = set(re.findall(r"\btests/\w+\.py\b", GUIDE)) - {"tests/test_NAME.py"}
    names = (quoted | links | commands) - {"tests/test_NAME.py"}
    assert len(names) > 15
    assert not [name for name in names if not (ROOT / name).exists()]
    anchors = {re.sub(r"[^\w -]", "", h).replace(" ", "-").lower()
               for h in re.findall(r"^#+ (.+)$", GUIDE, re.M)}  # fmt: skip
    assert set(re.findall(r"\]\(#([^)]+)\)", GUIDE)) <= anchors


def test_tests_and_targets_that_the_guide_names_exist():
    tests = {q for q in QUOTED if re.fullmatch(r"test_\w+", q)}
    defined = {name for path in TESTS for name in names_in(parsed(path).body)}
    assert tests and tests <= defined
    targets = {q.removeprefix("make ") for q in QUOTED if q.startswith("make ")}
    assert {"test", "test-slow", "test-gpu", "chaos"} <= targets
    assert all(make_commands(target) for target in targets)


def test_the_error_and_the_code_that_the_guide_shows_are_real():
    with pytest.raises(UserError) as caught:
        Config(d_model=192, num_heads=5).validate()
    assert f"    error: {caught.value}\n" in GUIDE
    [snippet] = re.findall(r"^```python\n(.*?)^```", GUIDE, re.M | re.S)
    assert textwrap.indent(snippet, " " * 8) in read("testv2.py")


# -------------------------------------------------------------------------- rules of the layout


def imported(path: Path) -> set[str]:
    """The modules that a file imports anywhere, by their full names."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and re.search(r"\b(import_module|need)$", name_of(node)):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return found


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func)


def scripts_in(path: Path) -> set[str]:
    """The scripts that a file imports."""
    return {name.partition(".")[0] for name in imported(path)} & SCRIPTS.keys()


def test_the_package_imports_no_script():
    for path in PACKAGE:
        found = {name.partition(".")[0] for name in imported(path)}
        assert not found & {*SCRIPTS, "data", "benchmarks"}, f"{path.name} imports {found}"


def test_testv2_imports_no_script():
    assert not scripts_in(SCRIPTS["testv2"])


def test_scripts_import_each_other_without_cycles():
    graph = {name: scripts_in(path) - {name} for name, path in SCRIPTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(f"a cycle of imports: {' -> '.join(e.args[1])}")
    for path in SCRIPTS.values():
        found = {name.partition(".")[0] for name in imported(path)}
        assert not found & {"data", "benchmarks"}, f"{path.name} imports {found}"


def test_prepare_runs_without_the_scripts():
    assert not scripts_in(ROOT / "data" / "prepare.py")


def test_no_test_file_imports_another():
    for path in TESTS:
        found = {n for n in imported(path) if re.fullmatch(r"(tests\.)?test_\w+", n)}
        assert not found, f"{path.name} imports {found}"


def test_the_files_that_begin_first_exist():
    assert {f"test_{name}" for name in LONGEST} <= {path.stem for path in TESTS}


def changes_path(node: ast.AST) -> bool:
    """Whether a statement or a call changes sys.path."""
    if isinstance(node, ast.Call):
        return bool(re.fullmatch(r"sys\.path\.(?!index|count|copy)\w+", name_of(node)))
    targets = [*getattr(node, "targets", []), getattr(node, "target", None)]
    texts = [ast.unparse(target) for target in targets if isinstance(target, ast.expr)]
    return any(re.match(r"sys\.path(\[|$)", text) for text in texts)


def test_only_prepare_changes_sys_path():
    """As a script, data/prepare.py is one folder below the modules that it imports."""
    found = [
        place(path, node)
        for path in [*CODE, *TESTS]
        for node in ast.walk(parsed(path))
        if changes_path(node)
    ]
    assert [where for where in found if not where.startswith("data/prepare.py:")] == []


def test_the_research_file_and_every_function_stay_short():
    assert len(read("testv2.py").splitlines()) < 2200
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    long = [
        f"{place(path, node)} {node.name}: {lines} lines"
        for path in CODE
        for node in ast.walk(parsed(path))
        if isinstance(node, functions) and (lines := node.end_lineno - node.lineno + 1) > 70
    ]
    assert not long, "\n".join(long)


# -------------------------------------------------------------------------------------- safety


def notebook_code() -> list[ast.Module]:
    cells = [
        cell
        for path in (ROOT / "examples").glob("*.ipynb")
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
    ]
    return [ast.parse("".join(c["source"])) for c in cells if c["cell_type"] == "code"]


def test_no_file_can_run_code_when_it_is_read():
    trees = [parsed(path) for path in [*CODE, *TESTS]] + notebook_code()
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loads = [call for call in calls if name_of(call) == "torch.load"]
    assert loads, "checkpoints are read with torch.load"
    for call in calls:
        values = {k.arg: k.value for k in call.keywords}
        flags = {name: ast.unparse(value) for name, value in values.items()}
        if name_of(call) == "torch.load":
            assert flags.get("weights_only") == "True", ast.unparse(call)
        assert flags.get("trust_remote_code") != "True", ast.unparse(call)
