"""A site that runs a model in the browser, from its graphs: a folder of static files, or one page.

    site/index.html            page.html, and where it finds the files
    site/service_worker.js     keeps all files for the time without a network
    site/LICENSES.txt          of the copied packages
    site/HASH/                 everything else; the name is the hash of its content

The page and its scripts are those of this repository. ONNX Runtime and the reader of chat templates
are npm packages, of exactly one version each, which are copied from a folder node_modules.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from tinymamba.checkpoint import write_bytes, write_json
from tinymamba.cli import UserError, require
from tinymamba.onnx_engine import GRAPH_FILES

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE / "web"
# Modules come after those that they import: so single_file.js can give them their addresses.
MODULES = (
    "runtime.js",
    "sampling.js",
    "session_file.js",
    "tokenizer.js",
    "chat.js",
    "engine.js",
    "worker.js",
)
BEGIN = "<script>"  # of the page's own script
WORKER, SINGLE = "service_worker.js", "single_file.js"
TYPES = {".js": "text/javascript", ".json": "application/json"}  # others are compressed


class Package(NamedTuple):
    """An npm package: its version, its license, and files of it by their names in the site."""

    version: str
    license: str
    files: dict[str, str]


RUNTIME = {
    "onnxruntime-web": Package(
        "1.30.0",
        "Copyright (c) Microsoft Corporation",  # the package has no file of it
        {
            "ort-wasm.js": "dist/ort-wasm-simd-threaded.mjs",
            "ort.wasm": "dist/ort-wasm-simd-threaded.wasm",
        },
    )
}
CHAT = {"@huggingface/jinja": Package("0.5.11", "LICENSE", {"jinja.js": "dist/index.js"})}
MIT = """
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES
OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


# ------------------------------------------------------------------------------------ runtime


def find_runtime(given: str | None) -> Path:
    """The folder node_modules with all packages: the one given, or that here or of the checkout."""
    packages = {**RUNTIME, **CHAT}
    named = " ".join(f"{name}@{package.version}" for name, package in packages.items())
    remedy = f"run `npm install --no-package-lock {named}`"
    remedy += "" if given else ", or pass a folder node_modules"
    places = [Path(given)] if given else [Path("node_modules"), HERE.parent / "node_modules"]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise UserError("--runtime", f"there is no folder {places[0]}", remedy)
    for name, package in packages.items():
        found = read_version(folder / name)
        problem = f"{folder} has no {name}" if found is None else f"{folder / name} is {found}"
        require(found == package.version, "--runtime", problem, remedy)
        missing = [file for file in package.files.values() if not (folder / name / file).is_file()]
        require(not missing, "--runtime", f"{folder / name} has no {''.join(missing[:1])}", remedy)
    return folder


def read_version(package: Path) -> str | None:
    """The version of an installed npm package, or None."""
    try:
        return str(json.loads((package / "package.json").read_bytes())["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def used_packages(is_chat: bool) -> dict[str, Package]:
    """The packages of a site, by name."""
    return {**RUNTIME, **(CHAT if is_chat else {})}


def write_licenses(path: Path, runtime: Path, packages: dict[str, Package]) -> None:
    """The licenses of the copied packages."""
    texts = []
    for name, (version, license_, _) in packages.items():
        file = runtime / name / license_
        own = file.read_text(encoding="utf-8") if file.is_file() else ""
        text = own or f"MIT License\n\n{license_}\n{MIT}"
        texts.append(f"{name} {version}\n\n{text.strip()}\n")
    write_bytes(path, ("\n" + "-" * 80 + "\n\n").join(texts).encode())


# ------------------------------------------------------------------------------------ writing


def find_files(site: Path) -> Path:
    """The folder of a site that has its graphs and config.json."""
    return next(site.glob("*/config.json")).parent


def is_site(folder: Path) -> bool:
    """Whether `write_site` has made a folder."""
    return (folder / WORKER).is_file() and any(map(is_of_files, folder.iterdir()))


def find_foreign(site: Path) -> str | None:
    """The name of something in a site that no export has written, or None."""
    own = ("index.html", "LICENSES.txt", "benchmark.json", WORKER)
    names = [path.name for path in sorted(site.glob("*")) if not is_of_files(path)]
    return next((name for name in names if name not in own), None)


def is_of_files(path: Path) -> bool:
    """Whether this can be what `find_files` finds: its name is a hash."""
    return bool(re.fullmatch("[0-9a-f]{16}", path.name)) and (path / "config.json").is_file()


def write_site(site: Path, page: Path, runtime: Path, config: dict[str, Any]) -> None:
    """Make a site of a folder that has only the graphs and the tokenizer.

    `config` becomes config.json; see describe_site of export_model.py.
    """
    packages = used_packages(config["web"]["chat"] is not None)
    names = [config["web"]["tokenizer_file"], "config.json", *GRAPH_FILES]
    write_json(site / "config.json", config)
    for name, package in packages.items():
        for own, file in package.files.items():
            shutil.copyfile(runtime / name / file, site / own)
            names.append(own)
    modules = [name for name in MODULES if name != "chat.js" or len(packages) > len(RUNTIME)]
    for name in modules:
        shutil.copyfile(SCRIPTS / name, site / name)
    names += modules
    folder = site / hash_files([site / name for name in names])
    folder.mkdir()
    for name in names:
        (site / name).rename(folder / name)
    for rest in [path for path in site.iterdir() if path.is_file()]:
        rest.unlink()
    files = {name: name for name in names}  # relative to the worker
    size = sum((folder / name).stat().st_size for name in names)
    facts = {"files": files, "worker": f"{folder.name}/worker.js", "bytes": size}
    start = f'navigator.serviceWorker?.register("{WORKER}");'
    later = f'<script>addEventListener("load", () => {{ {start} }});</script>\n'
    write_bytes(site / "index.html", with_site(page, config, facts, later).encode())
    write_licenses(site / "LICENSES.txt", runtime, packages)
    version = hash_files([site / "index.html", *(folder / name for name in names)])
    kept = [f"{folder.name}/{name}" for name in names]
    head = f"const VERSION = {json.dumps(version)};\nconst FILES = {json.dumps(kept)};\n"
    write_bytes(site / WORKER, head.encode() + (SCRIPTS / WORKER).read_bytes())


def hash_files(paths: list[Path]) -> str:
    """A short hash of the names and contents of files."""
    whole = hashlib.sha256()
    for path in sorted(paths):
        with open(path, "rb") as file:
            whole.update(f"{path.name} ".encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16]


def with_site(page: Path, config: dict[str, Any], facts: dict[str, Any], more: str) -> str:
    """The page for a model: with what tells its script where the files are, and `more` after it."""
    head, own = page.read_text(encoding="utf-8").split(BEGIN, 1)
    data = json.dumps(facts).replace("<", "\\u003c")
    rest = f'<script id="site" type="application/json">{data}</script>\n{more}{BEGIN}{own}'
    title = f"<title>{html.escape(config['web']['name'])}</title>"
    policy = f'<meta http-equiv="Content-Security-Policy" content="{site_policy(head + rest)}">'
    return re.sub("<title>.*?</title>", lambda _: f"{policy}\n{title}", head) + rest


def site_policy(page: str) -> str:
    """A Content-Security-Policy: nothing is loaded from elsewhere, whatever a model writes.

    Modules of a single file have data: addresses.
    """
    return (
        f"default-src 'none'; script-src 'self' data: 'wasm-unsafe-eval' {hashes(page, 'script')}; "
        f"worker-src 'self' data:; connect-src 'self' data:; style-src {hashes(page, 'style')}; "
        "img-src blob: data:; base-uri 'none'; form-action 'none'"
    )


def hashes(page: str, tag: str) -> str:
    """The hashes, for a Content-Security-Policy, of what a page has in elements `<tag>`."""
    texts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in texts]
    return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)


def write_single_file(path: Path, site: Path, page: Path) -> None:
    """The files of a site as one page, which also works from file://."""
    folder = find_files(site)
    config = json.loads((folder / "config.json").read_bytes())
    modules = ["ort-wasm.js", "jinja.js", *MODULES]
    ranks = {name: rank for rank, name in enumerate(modules)}
    files = sorted(folder.iterdir(), key=lambda file: (ranks.get(file.name, -1), file.name))
    inline = "".join(map(inline_file, files))
    licenses = html.escape((site / "LICENSES.txt").read_text(encoding="utf-8"), quote=False)
    inline += f'<script type="text/plain" id="licenses">{licenses}</script>\n'
    start = f"<script>\n{(SCRIPTS / SINGLE).read_text(encoding='utf-8')}</script>\n"
    text = with_site(page, config, {"files": {}, "worker": ""}, inline + start)
    write_bytes(path, text.encode())


def inline_file(file: Path) -> str:
    """A file as a script element that does not run; what is large is compressed."""
    data, kind = file.read_bytes(), TYPES.get(file.suffix, "application/gzip")
    if kind == "application/gzip":
        data = gzip.compress(data, 9, mtime=0)
    text = base64.b64encode(data).decode()
    return f'<script type="text/plain" data-file="{file.name}" data-type="{kind}">{text}</script>\n'
