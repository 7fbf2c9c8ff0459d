"""Builds the package `tinymamba` from the scripts of this folder; pyproject.toml says the rest.

The scripts lie here side by side and run in place. In the package they are modules: what one
imports of another becomes relative, and `python testv2.py` in its texts becomes `tinymamba train`.
Nothing else differs, and src/tinymamba/ holds what is in the package only.
"""

import ast
import re
import runpy
import shutil
import symtable
import typing
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
SHARED = {"peft"}  # names that a module here and a package elsewhere both have


def find_scripts(root: Path) -> list[str]:
    """What goes into the package, by its path here and there."""
    files = [*root.glob("*.py"), *root.glob("*.html"), *root.glob("data/*.py")]
    return sorted(f.relative_to(root).as_posix() for f in files if f.name != "setup.py")


def names_in(text: str) -> set[str]:
    """The names that a module has once it is imported."""
    symbols = symtable.symtable(text, "", "exec").get_symbols()
    return {s.get_name() for s in symbols if s.is_assigned() or s.is_imported() or s.is_namespace()}


def asked_of(node: ast.Import | ast.ImportFrom, tree: ast.Module) -> set[str]:
    """The names of its module that an import takes, or of which the script makes use; if known."""
    if isinstance(node, ast.ImportFrom):
        return {alias.name for alias in node.names} - {"*"}
    name = node.names[0].asname or node.names[0].name
    return {
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == name
    }


def is_ours(node: ast.Import | ast.ImportFrom, tree: ast.Module, name: str, names: set) -> bool:
    """Does an import mean the module here, and not the package of the same name?"""
    asked = asked_of(node, tree)
    if name not in SHARED or (asked and asked <= names):
        return True
    if not asked or asked & names:
        refuse(
            node,
            f"does not tell which {name} it means",
            f"write `from {name} import ...` once for the names of each",
        )
    return False


def refuse(node: ast.AST, problem: str, remedy: str) -> typing.NoReturn:
    raise SystemExit(f"error: line {node.lineno}: `{ast.unparse(node)}` {problem}; {remedy}")


def relative(path: str, text: str, modules: dict[str, set[str]]) -> str:
    """The text of a script with what it imports of `modules`, its siblings, made relative."""
    dots, tree, lines = "." * (1 + path.count("/")), ast.parse(text, path), text.splitlines(True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom) or getattr(node, "level", 0):
            continue
        whole = isinstance(node, ast.Import)
        found = [alias.name for alias in node.names] if whole else [node.module]
        name = next((n for n in found if n in modules), None)
        if name is None or not is_ours(node, tree, name, modules[name]):
            continue
        old, new = (
            (f"import {name}", f"from {dots} import {name}")
            if whole
            else (f"from {name}", f"from {dots}{name}")
        )
        line, at = lines[node.lineno - 1], node.col_offset
        if len(found) > 1 or (whole and "." in name) or not line.startswith(old, at):
            refuse(node, "cannot be made relative", f"write `from {name} import ...`")
        lines[node.lineno - 1] = line[:at] + new + line[at + len(old) :]
    return "".join(lines)


def installed_commands(text: str, scripts: dict[str, str]) -> str:
    """The text with the commands of a checkout put as those of the package; code has none."""
    for name, script in scripts.items():
        text = re.sub(rf"\bpython {re.escape(script)}(?![\w/])", f"tinymamba {name}", text)
    return re.sub(r"(--nproc_per_node=\S+) testv2\.py\b", r"\1 -m tinymamba.testv2", text)


def package_files(root: Path) -> dict[str, bytes]:
    """Every file that the build adds to those of src/tinymamba/, by its path in the package."""
    files = {path: (root / path).read_bytes() for path in find_scripts(root)}
    texts = {path: data.decode() for path, data in files.items() if path.endswith(".py")}
    modules = {path.removesuffix(".py").replace("/", "."): names_in(t) for path, t in texts.items()}
    modules["data"] = {path.split("/")[1] for path in texts if "/" in path}
    table = runpy.run_path(str(root / "src" / "tinymamba" / "__main__.py"))["COMMANDS"]
    scripts = {name: script for name, (script, _) in table.items()}
    return files | {
        path: installed_commands(relative(path, text, modules), scripts).encode()
        for path, text in texts.items()
    }


class BuildPackage(build_py):
    """The files of src/tinymamba/, and the scripts beside them."""

    def run(self) -> None:
        target = Path(self.build_lib, "tinymamba")
        if target.exists():
            shutil.rmtree(target)  # what an earlier build has left would be shipped too
        super().run()
        for path, data in package_files(ROOT).items():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_bytes(data)


class RefuseEditable(editable_wheel):
    """A checkout needs no installing."""

    def run(self) -> None:
        raise SystemExit(
            "error: --editable: the package is made from these scripts by a build; "
            "run them here as they are, or use `pip install .` after each change"
        )


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildPackage, "editable_wheel": RefuseEditable})
