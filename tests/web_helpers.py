"""A tiny model and its site, which all test processes share: to make the graphs takes seconds."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from helpers import NPM_PACKAGES, free_copy, npm_file, run_main, train_bpe, wide

import export_model
from testv2 import TinyMambaModel
from tinymamba.checkpoint import save_model
from tinymamba.onnx_engine import GRAPH_FILES
from tinymamba.tokenizer import EOS_TOKEN, SimpleTokenizer
from tinymamba.web_site import find_files

TEMPLATE = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{{- m.content if loop.last or m.role == 'system' else m.content[-3:] }}
{{- '<|im_end|>' + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
FEW = (1, 2, 17)  # lengths for --verify, which has ten


def tiny_chat_model() -> TinyMambaModel:
    """A tiny model with a memory, and with a chat template that cuts earlier messages."""
    content = train_bpe("<|im_end|>", "<|im_start|>", EOS_TOKEN).to_str()
    record = {"name": "tokenizer.json", "content": content, "special_tokens": {}}
    made = free_copy(wide(vocab_size=320, n_layer=1, memory_every=1, tie_embeddings=False))
    made.tokenizer = SimpleTokenizer.from_dict({**record, "chat_template": TEMPLATE}).to_dict()
    return made.requires_grad_(False)


def shared_site(factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.pt, its site, tiny.html as a single file, and what the command said.

    Node reads the scripts below it as modules.
    """
    npm_file("onnxruntime-web")
    return shared_folder(factory, "web", make_site)


def shared_folder(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], None]) -> Path:
    """A folder that the first test process to ask for it fills, for all."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, unfinished = base / name, base / f"{name}.unfinished"
    with FileLock(base / f"{name}.lock"):
        if not folder.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            fill(unfinished)
            unfinished.rename(folder)
    return folder


def make_site(place: Path) -> None:
    """The site, as the command makes it, with all checks; and as a single file."""
    save_model(place / "tiny.pt", tiny_chat_model())
    (place / "package.json").write_text('{"type": "module"}')
    words = ["--checkpoint", place / "tiny.pt", "--format", "web", "--runtime", NPM_PACKAGES]
    checks = ["--output_dir", place / "site", "--verify", "--generate", "--benchmark"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_model, "LENGTHS", FEW)
        patch.setattr(export_model, "STREAMED", 60)
        patch.setattr(export_model, "ROUNDS", 1)
        done = run_main(export_model.main, *words, *checks)
        assert done.returncode == 0, done.stderr
        reuse_graphs(patch, place / "site")
        single = run_main(
            export_model.main, *words, "--single_file", "--output_dir", place / "single"
        )
    assert single.returncode == 0, single.stderr
    (place / "said.txt").write_text(done.stdout, encoding="utf-8")


def reuse_graphs(patch: pytest.MonkeyPatch, site: Path) -> list[Path]:
    """From here on, an export writes the graphs of this site: to make them takes seconds."""
    graphs = [find_files(site) / name for name in GRAPH_FILES]

    def copy(folder: Path, *_) -> None:
        for graph in graphs:
            shutil.copy(graph, folder)

    patch.setattr(export_model, "write_onnx_graphs", copy)
    return graphs
