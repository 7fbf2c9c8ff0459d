"""Models outside of training: folders of plain tensors, and graphs that fit every length."""

import copy
import json

import pytest
import torch
from conftest import DOCUMENTS, close, close_angles, some_ids, wide
from safetensors.torch import load_file, save_file

from testv2 import LayerState, ModelState, UserError, load_model, save_folder

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 513)


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_gives_back_the_very_model(tmp_path, tied):
    model = wide(tie_embeddings=tied, **DOCUMENTS)
    save_folder(tmp_path, model)
    again = load_model(tmp_path)
    assert again.fingerprint() == model.fingerprint() and not again.training
    assert again.config.eos_id == model.config.eos_id
    ids = some_ids(2, 40)
    assert torch.equal(again(ids), model(ids))


def test_a_damaged_or_foreign_folder_is_refused(tmp_path):
    save_folder(tmp_path, wide())
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good, about = weights.read_bytes(), json.loads(config.read_text())

    def refused(fragment: str):
        with pytest.raises(UserError, match=fragment):
            load_model(tmp_path)

    for at in range(len(good) // 2, len(good), len(good) // 9):
        weights.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        refused("model.safetensors: is damaged")
    weights.write_bytes(good[: len(good) // 2])
    refused("model.safetensors: cannot be read")
    weights.write_bytes(good)
    save_file(load_file(weights), weights)  # without the checksum
    refused("model.safetensors: is damaged")
    weights.write_bytes(good)
    for other in ({**about, "n_layer": about["n_layer"] + 1}, {**about, "format_version": 99},
                  {**about, "model_type": "llama"}, {"model_type": "tinymamba"}, []):
        config.write_text(json.dumps(other))
        refused("does not fit" if other and other.get("n_layer", 0) > about["n_layer"]
                else "config.json")
    config.unlink()
    refused("config.json: cannot be read")


class Graph(torch.nn.Module):
    """A step of any length as a function of tensors: ids and a state to last logits and a state."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, *tensors):
        layers = [LayerState(*tensors[i : i + 5]) for i in range(0, len(tensors) - 2, 5)]
        logits, state = self.model.advance(ids, ModelState(layers, *tensors[-2:]), last_only=True)
        return logits, *state.tensors().values()


def assert_fits_every_length(graph, model):
    for batch in (1, 3):
        _, state = model.advance(some_ids(batch, 70), model.init_state(batch))
        for length in LENGTHS:
            ids = some_ids(batch, length, seed=length)
            got = graph(ids, *state.tensors().values())
            logits, after = model.advance(ids, state, last_only=True)
            close(got[0], logits, 1e-4)
            for (name, want), tensor in zip(after.tensors().items(), got[1:], strict=True):
                if name.endswith("phase"):
                    close_angles(tensor, want, 1e-4)
                else:
                    close(tensor, want, 1e-4, scale=1.0)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, DOCUMENTS, {"gate": "top_k"},
                                     {"gate": "sparsemax", "low_rank": 4, "bias": False}], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_a_traced_graph_fits_every_length(changes):
    model = copy.deepcopy(wide(**changes)).requires_grad_(False)
    example = (some_ids(2, 37), *model.init_state(2).tensors().values())
    assert_fits_every_length(torch.jit.trace(Graph(model), example, check_trace=False), model)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, DOCUMENTS], ids=["one_text", "documents"])
def test_an_exported_graph_fits_every_length(changes):
    model = copy.deepcopy(wide(n_layer=1, **changes)).requires_grad_(False)
    example = (some_ids(2, 37), *model.init_state(2).tensors().values())
    batch, length = (torch.export.Dim(name, min=1) for name in ("batch", "length"))
    shapes = ({0: batch, 1: length}, tuple({0: batch} for _ in example[1:]))
    program = torch.export.export(Graph(model).eval(), example, dynamic_shapes=shapes, strict=False,
                                  prefer_deferred_runtime_asserts_over_guards=True)
    assert_fits_every_length(program.module(), model)
