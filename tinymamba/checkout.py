"""The scripts at the top of the repository as modules of the package tinymamba.

Scripts import each other by plain names, `testv2`; modules of the package by `tinymamba.testv2`.
`as_module` turns the text of the one into the other. It has two users:

- setup.py copies the scripts into the package that it builds;
- `ScriptFinder` loads them from where they are, in a checkout and after `pip install --editable .`
"""

import importlib.abc
import importlib.util
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def find_scripts(root: Path) -> list[str]:
    """The files that the package has besides those of its own folder, by relative path."""
    files = [*root.glob("*.py"), *root.glob("*.html"), *root.glob("data/*.py")]
    return sorted(f.relative_to(root).as_posix() for f in files if f.name != "setup.py")


def as_module(text: str, scripts: Iterable[str]) -> str:
    """The text of a file as a module: imports of scripts, and the commands in messages and help."""
    # Not at the head: runpy warns if importing the package imports the module that it is to run.
    from tinymamba.__main__ import COMMANDS

    names = "|".join(s.removesuffix(".py").replace("/", r"\.") for s in scripts)
    imports = rf"^([ \t]*)from ({names}) import\b"
    text = re.sub(imports, r"\1from tinymamba.\2 import", text, flags=re.MULTILINE)
    for name, (script, _) in COMMANDS.items():
        text = re.sub(rf"\bpython {re.escape(script)}(?![\w/])", f"tinymamba {name}", text)
    return re.sub(r"(--nproc_per_node=\S+) testv2\.py\b", r"\1 -m tinymamba.testv2", text)


def package_files(root: Path) -> dict[str, bytes]:
    """Every file of the package, by its path in it."""
    scripts = find_scripts(root)
    paths = {path: root / path for path in scripts}
    own = root / "tinymamba"
    paths |= {p.relative_to(own).as_posix(): p for p in (*own.glob("*.py"), *own.glob("web/*.js"))}
    files = {name: path.read_bytes() for name, path in paths.items()}
    modules = [name for name in files if name.endswith(".py")]
    return files | {name: as_module(files[name].decode(), scripts).encode() for name in modules}


class ScriptLoader(importlib.abc.SourceLoader):
    """Loads one script as a module of the package.

    It has no `path_stats`, so no bytecode is written or read: that file belongs to the script.
    """

    def __init__(self, path: Path):
        self.path = path

    def get_filename(self, fullname: str) -> str:
        """The script."""
        return str(self.path)

    def get_data(self, path: str) -> bytes:  # type: ignore[override]
        """Its text as a module."""
        return as_module(Path(path).read_bytes().decode(), find_scripts(ROOT)).encode()


class ScriptFinder(importlib.abc.MetaPathFinder):
    """Finds `tinymamba.testv2` at ../testv2.py, and so on."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a script or of a folder of scripts; None for any other module."""
        package, _, name = fullname.partition(".")
        if package != "tinymamba":
            return None
        scripts, stem = find_scripts(ROOT), name.replace(".", "/")
        if f"{stem}.py" in scripts:
            return importlib.util.spec_from_loader(fullname, ScriptLoader(ROOT / f"{stem}.py"))
        if any(script.startswith(f"{stem}/") for script in scripts):
            return ModuleSpec(fullname, None, is_package=True)
        return None


def install() -> None:
    """Make the scripts importable; the package calls this unless it was built with them."""
    sys.meta_path.append(ScriptFinder())
