"""Write a model of the form that was new when a field came, and a state of it.

It was run from the root of the repository as it stood then, and OUT was copied to the folder FIELD:

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/artifacts/make_form.py FIELD OUT

FIELD is bc_conv (B and C have a convolution), k_conv (so have the keys of attention), memory
(attention has a memory as well), memory_products (one block of four has it, with wider keys),
min_decay (a step of the SSM can be 0) or qv_conv (queries and values have a convolution as well).
tests/test_artifacts.py holds all later code to these files.

    plain.pt              a checkpoint
    folder/               the same model as a folder
    state.safetensors     its state after IDS
    expected.safetensors  its logits for IDS, and those of IDS again after that state
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from testv2 import Config, TinyMambaModel, save_folder
from tinymamba.checkpoint import save_checkpoint

SHAPE = {
    "d_model": 16, "n_layer": 2, "vocab_size": 24, "dropout": 0.0, "num_heads": 2,
    "ssm_head_dim": 8, "d_state": 12, "expand_factor": 1, "window_size": 4, "chunk_size": 8,
    "rotating": 0.4,
}  # fmt: skip
FORMS = {
    "bc_conv": {"k_conv": False},
    "k_conv": {},
    "memory": {"memory": True},
    "memory_products": {},
    "min_decay": {},
    "qv_conv": {},
}
IDS = torch.arange(40)[None] * 7 % 24


@torch.no_grad()
def make(form: dict, out: Path) -> None:
    """Write all files to a new folder."""
    (out / "folder").mkdir(parents=True)
    torch.manual_seed(0)
    model = TinyMambaModel(Config(**SHAPE, **form)).eval()
    for p in model.parameters():
        p.add_(0.3 * torch.randn_like(p))
    record = {"model": model.state_dict(), "config": model.config.to_dict()}
    save_checkpoint(out / "plain.pt", record)
    save_folder(out / "folder", model)
    first, state = model.advance(IDS, model.init_state(1))
    state.save(out / "state.safetensors", model)
    again, _ = model.advance(IDS, state)
    save_file({"first": first, "again": again}, out / "expected.safetensors")


if __name__ == "__main__":
    make(FORMS[sys.argv[1]], Path(sys.argv[2]))
