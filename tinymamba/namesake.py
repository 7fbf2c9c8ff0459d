"""Lets a script have the name of an installed package without hiding it.

In a checkout, `import peft` finds the script peft.py before Hugging Face's package `peft`. Other
packages, such as transformers, import that package and must still get it. The script therefore
ends with

    if __name__ == "peft":
        __getattr__ = share_name(sys.modules[__name__])

and its module then serves as both:

- A name that the script defines is the script's. The package is not loaded for it.
- Any other name loads the package: its __init__.py runs inside the script's module. So there is
  one module `peft`, and each class of the package exists once.
- A submodule, such as `peft.tuners`, is found through the package's `__path__`. A finder in
  `sys.meta_path` runs the package's __init__.py first, as Python does for any package.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Collection
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


def share_name(module: ModuleType, stand_ins: Collection[str] = ()) -> Callable[[str], Any]:
    """Make `module` serve as the installed package of its name as well; return its `__getattr__`.

    `stand_ins`: classes that other packages pass to `isinstance`. If the package is not installed,
    the module has empty classes of these names.
    """
    spec = find_installed(module)
    if spec is None:
        return lambda name: stand_in(module, name, stand_ins)
    package = SharedPackage(module, spec)
    sys.meta_path.insert(0, package)
    return package.getattr


def find_installed(module: ModuleType) -> ModuleSpec | None:
    """The spec of the package of this name in another folder than the module's own."""
    here = Path(str(module.__file__)).resolve().parent
    elsewhere = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != here]
    spec = PathFinder.find_spec(module.__name__, elsewhere)
    return spec if spec and spec.loader and spec.submodule_search_locations else None


def no_attribute(module: ModuleType, name: str) -> AttributeError:
    """Python's own error for a missing name."""
    return AttributeError(f"module {module.__name__!r} has no attribute {name!r}")


def stand_in(module: ModuleType, name: str, names: Collection[str]) -> type:
    """A class without instances, so that `isinstance` is False for every object."""
    if name not in names:
        raise no_attribute(module, name)

    def reject(self: object, *args: Any, **kwargs: Any) -> None:
        raise ImportError(f"{name} needs the package: pip install {module.__name__}")

    cls = type(name, (), {"__init__": reject, "__module__": module.__name__})
    return vars(module).setdefault(name, cls)


class SharedPackage:
    """An installed package whose __init__.py runs in a script's module when it is first needed."""

    def __init__(self, module: ModuleType, spec: ModuleSpec):
        self.module, self.spec = module, spec
        self.lock, self.loaded = threading.RLock(), False
        self.own = [name for name in vars(module) if not name.startswith("__")]  # of the script
        module.__path__ = list(spec.submodule_search_locations or ())
        module.__package__ = module.__name__
        module.__spec__.submodule_search_locations = module.__path__  # type: ignore[union-attr]

    def load(self) -> None:
        """Run the package's __init__.py, once. The script's names keep their values."""
        with self.lock:
            if self.loaded:  # or being loaded, by this thread: its submodules import the package
                return
            self.loaded = True
            names: dict[str, Any] = vars(self.module)
            own = {name: names[name] for name in self.own if name in names}
            try:
                exec(self.spec.loader.get_code(self.spec.name), names)  # type: ignore[union-attr]
            except BaseException:
                self.loaded = False
                raise
            finally:
                names.update(own)

    def getattr(self, name: str) -> Any:
        """The module's `__getattr__`: a name that is not the script's is the package's."""
        private = name.startswith("__") and name not in ("__version__", "__all__")
        if not private:
            self.load()
        if private or name not in vars(self.module):
            raise no_attribute(self.module, name)
        return vars(self.module)[name]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """As a finder in `sys.meta_path`: load the package before its first submodule."""
        if self.loaded or not name.startswith(f"{self.spec.name}."):
            return None
        self.load()
        module = sys.modules.get(name)
        if module is None:
            return None  # the other finders find it
        # The package has imported this submodule while loading. Python does not look for that here,
        # and would run the submodule again with the loader of its own spec.
        module.__spec__ = ModuleSpec(name, ImportedModule(module))
        return module.__spec__


class ImportedModule(Loader):
    """Loader of a module that has been imported already: gives that module and runs nothing."""

    def __init__(self, module: ModuleType):
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module, as it is."""
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module back its own spec."""
        module.__spec__ = self.spec
