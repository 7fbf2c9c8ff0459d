"""--help of a script without its large imports: `import torch` alone takes about a second.

Of the script, and of the modules that it imports, only the statements run that define what the
command line is made of: the classes of options, and the constants and functions that they need.
`begin` of cli.py calls `print_help` before a script imports the rest.
"""

from __future__ import annotations
import __future__

import ast
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from tinymamba.cli import DTYPE_NAMES, dtypes, run_cli

PACKAGE = Path(__file__).resolve().parent
FOLDERS = [PACKAGE, PACKAGE / "data"]  # of the project's modules
if not (PACKAGE / "testv2.py").is_file():  # a checkout: scripts are one folder up
    FOLDERS += [PACKAGE.parent / name for name in (".", "data", "benchmarks")]


def print_help(file: str, spec: Any) -> NoReturn:
    """Print the help of a script, or of the module `spec`, and exit."""
    before = sys.modules.copy()
    text = "" if spec else Path(file).read_text(encoding="utf-8")
    try:
        part = part_of(spec) if spec else Part(Path(file).stem, file, text)
        run_cli(lambda: part.parser()(sys.argv[1:]))
    finally:  # who catches the exit may import the whole modules
        for name in [n for n, m in sys.modules.items() if isinstance(m, PartialModule)]:
            del sys.modules[name]
        sys.modules.update(before)
        dtypes.cache_clear()


def part_of(spec: Any) -> Part:
    """A module that was found and not imported."""
    return Part(spec.name, spec.origin, spec.loader.get_source(spec.name))


class PartialModule(types.ModuleType):
    """A module of which a part has run."""


class Part:
    """A module of the project, of which only the statements run whose names are asked for.

    So the options of a script are there, and its model is not.
    """

    def __init__(self, name: str, file: str, source: str):
        self.tree, self.file = ast.parse(source, file), file
        self.module = PartialModule(name, ast.get_docstring(self.tree, clean=False))
        vars(self.module).update(__file__=file, __getattr__=self.get)
        self.binding: dict[str, list[ast.stmt]] = {}  # the statements that bind a name
        for statement in self.tree.body:
            for bound in bound_names(statement):
                self.binding.setdefault(bound, []).append(statement)
        sys.modules[name] = self.module  # where dataclasses and their annotations look names up

    def parser(self) -> Any:
        """The function that parses the command line, without what follows in it."""
        functions = (s for s in reversed(self.tree.body) if isinstance(s, ast.FunctionDef))
        for function in functions:
            for end, statement in enumerate(function.body, 1):
                if parses(statement):
                    function.body = function.body[:end]
                    return self.get(function.name)
        raise LookupError(f"{self.file}: no function calls parse_flags or parse_args")

    def get(self, name: str) -> Any:
        """The value of a name."""
        self.define(name)
        if name not in vars(self.module):
            raise AttributeError(f"module {self.module.__name__!r} has no attribute {name!r}")
        return vars(self.module)[name]

    def define(self, name: str) -> None:
        """Run the statements that bind a name, and before them what they need."""
        for statement in self.binding.pop(name, ()):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                self.bring(statement, name)
                continue
            for other in used_names(statement):
                self.define(other)
            flag = __future__.annotations.compiler_flag
            code = compile(ast.Module([statement], []), self.file, "exec", flag, True)
            try:
                exec(code, vars(self.module))
            except (NameError, AttributeError):  # it needs what is not there
                return

    def bring(self, statement: ast.Import | ast.ImportFrom, name: str) -> None:
        """Bind one name of an import, unless it is of a large package."""
        alias = next(a for a in statement.names if name in (a.asname, a.name.partition(".")[0]))
        if isinstance(statement, ast.Import):
            found = find_module(alias.name if alias.asname else name)
        else:
            whole = find_module(str(statement.module))
            found = getattr(whole, alias.name, None)
            if found is None and hasattr(whole, "__path__"):
                found = find_module(f"{statement.module}.{alias.name}")
        if found is not None:
            setattr(self.module, name, found)


def find_module(name: str) -> Any:
    """A module of Python, or one of the project in part; None for a large package."""
    top = name.partition(".")[0]
    if name == "torch":
        return sys.modules.setdefault(name, small_torch())
    if name in sys.modules or top in sys.stdlib_module_names:
        return importlib.import_module(name)
    if top == "torch" or not is_ours(importlib.util.find_spec(top)):
        return None
    spec: Any = importlib.util.find_spec(name)
    if not is_ours(spec):
        return None
    packed = spec.submodule_search_locations is not None
    return importlib.import_module(name) if packed else part_of(spec).module


def is_ours(spec: Any) -> bool:
    """Whether a module is of the project."""
    return spec is not None and Path(spec.origin or "").resolve().parent in FOLDERS


def small_torch() -> types.ModuleType:
    """As much of PyTorch as options need: the dtypes that flags name, and what defines models."""

    class dtype(str):
        __module__ = "torch"

    module: Any = PartialModule("torch")
    module.nn = types.SimpleNamespace(Module=object)
    module.no_grad = lambda: lambda function: function
    module.dtype = dtype
    for name in DTYPE_NAMES:
        setattr(module, name, dtype(name))
    return module


def bound_names(statement: ast.stmt) -> set[str]:
    """The names that a statement of a module defines."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {a.asname or a.name.partition(".")[0] for a in statement.names}
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    names = (n for n in ast.walk(statement) if isinstance(n, ast.Name))
    return {n.id for n in names if isinstance(n.ctx, ast.Store)}


def used_names(node: ast.AST) -> Iterator[str]:
    """The names in a statement, but for the annotations of functions."""
    if isinstance(node, ast.Name):
        yield node.id
    for field, value in ast.iter_fields(node):
        if field == "returns" or (field == "annotation" and isinstance(node, ast.arg)):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from used_names(child)


def parses(statement: ast.stmt) -> bool:
    """Whether a statement calls parse_flags or parse_args."""
    calls = (node.func for node in ast.walk(statement) if isinstance(node, ast.Call))
    names = (getattr(f, "attr", getattr(f, "id", "")) for f in calls)
    return not {"parse_flags", "parse_args"}.isdisjoint(names)
