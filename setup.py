"""Builds the package tinymamba: its own folder, and the scripts as modules of it.

    pip install .                # builds, as `python -m build` does
    pip install --editable .     # nothing is copied: tinymamba/checkout.py finds the scripts

pyproject.toml has the rest.
"""

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a build runs this file without its folder on the path
from tinymamba.checkout import package_files  # noqa: E402


class BuildPackage(build_py):
    """Writes the files of the package as `package_files` gives them."""

    def run(self) -> None:
        """Replace what an earlier build has left, which would be shipped too."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "tinymamba")
        shutil.rmtree(target)
        for path, data in package_files(ROOT).items():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_bytes(data)


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildPackage})
