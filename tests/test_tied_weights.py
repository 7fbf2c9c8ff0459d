"""Head and embedding: tied, untied, or a head trained apart, in every file and for every reader.

The tables hold who writes a model and who reads it. Whatever the pair, the logits are those of the
model that was written, and the config that was read says whether the two matrices are one.
"""

import copy
import json
import shutil
import warnings

import pytest
import torch
from helpers import close, free_copy, some_ids, stir, wide
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import export_model
from export_model import Graph, OnnxEmbedding, Options, examples, with_onnx_layers, write_onnx
from hf_integration import TinyMambaConfig, TinyMambaHFModel, convert
from peft import AdapterConfig, attach, load_adapter, merge_adapter, plain_weights, save_adapter
from quantize import quantize_model
from testv2 import TinyMambaModel, load_model, save_folder
from tinymamba.checkpoint import save_checkpoint, save_model, write_json
from tinymamba.cli import UserError

SMALL = {"n_layer": 1, "vocab_size": 64}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IDS = some_ids(2, 19, vocab=64)
hf = TinyMambaHFModel.of

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_embeddings is true")  # has a test of its own


def new_head(model):
    """Another matrix for the head, as training it apart gives."""
    noise = torch.randn(model.head.weight.shape, generator=torch.manual_seed(3))
    return nn.Parameter(0.2 * noise.to(model.head.weight.dtype))


def model_of(state: str, dtype=torch.float32, **changes) -> TinyMambaModel:
    """A model with weights of a dtype; a head that is `apart` has a config that says tied."""
    model = free_copy(wide(**{**SMALL, "tie_embeddings": state != "untied", **changes}))
    if state == "apart":
        model.head.weight = new_head(model)
    return model.to(dtype).eval()


# -------------------------------------------------------------------------------------- writers


def write_checkpoint(model, folder):
    save_model(folder / "x.pt", model)
    return folder / "x.pt"


def write_old_checkpoint(model, folder):
    """As before configs were settled."""
    state = {"model": model.state_dict(), "config": model.config.to_dict()}
    save_checkpoint(folder / "x.pt", state)
    return folder / "x.pt"


def write_folder(model, folder):
    save_folder(folder, model)
    return folder


def write_hf(model, folder, **settings):
    """Their save_pretrained; a head apart comes into the model last, as an adapter's does."""
    tied = model.config.tie_embeddings
    plain = copy.deepcopy(model)
    plain.head.weight = plain.embedding.weight if tied else plain.head.weight
    made = hf(plain).to(model.embedding.weight.dtype)
    if not torch.equal(model.head.weight, plain.head.weight):
        made.model.head.weight = model.head.weight
    made.save_pretrained(folder, **settings)
    return folder


def write_shards(model, folder):
    write_hf(model, folder, max_shard_size="8KB")
    assert len([*folder.glob("model-*.safetensors")]) > 1
    return folder


def write_old_hf(model, folder):
    """As before tie_word_embeddings was written; a head apart was said to be tied."""
    tied = model.config.tie_embeddings
    write_hf(model, folder)
    about = json.loads((folder / "config.json").read_text())
    assert about.pop("tie_word_embeddings") == about["tie_embeddings"]
    write_json(folder / "config.json", {**about, "tie_embeddings": tied})
    return folder


def write_head_only(model, folder):
    """As a library that keeps the other one of two tied tensors."""
    write_hf(model, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if "model.head.weight" not in tensors:
        tensors["model.head.weight"] = tensors.pop("model.embedding.weight")
    save_file(tensors, file, {"format": "pt"})
    return folder


def write_converted(model, folder):
    save_model(folder / "first.pt", model)
    convert(str(folder / "first.pt"), str(folder / "hf"))
    return folder / "hf"


WRITERS = (write_checkpoint, write_old_checkpoint, write_folder, write_hf, write_shards,
           write_old_hf, write_head_only, write_converted)  # fmt: skip


# -------------------------------------------------------------------------------------- readers


def read_natively(path, place):
    return load_model(path)


def read_back(path, place):
    convert(str(path), str(place / "back.pt"))
    return load_model(place / "back.pt")


def read_as_folder(path, place):
    save_folder(place, load_model(path))
    return load_model(place)


def read_hf(path, place):
    if path.is_file():
        convert(str(path), str(place / "hf"))
        path = place / "hf"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    config = model.config
    assert config.tie_word_embeddings == config.tie_embeddings == model.model.config.tie_embeddings
    return model


def read_hf_saved_again(path, place):
    read_hf(path, place).save_pretrained(place / "again")
    return load_model(place / "again")


READERS = (read_natively, read_back, read_as_folder, read_hf, read_hf_saved_again)
STATES = ("tied", "untied", "apart")


def as_native(backbone):
    """A native model with the weights of one of theirs."""
    native = TinyMambaModel(backbone.config)
    native.load_state_dict(backbone.state_dict())
    return native.eval()


@torch.no_grad()
def logits(model):
    """Of a native model or theirs. A copy: a mapped file is not aligned, and rounds differently."""
    model = copy.deepcopy(model)
    return model(IDS, use_cache=False).logits if hasattr(model, "generate") else model(IDS)


def assert_reads(read, path, place, want, tied):
    """What `read` makes of the files is the model `want`."""
    place.mkdir()
    got = read(path, place)
    native = getattr(got, "model", got)
    assert native.config.tie_embeddings == tied, read.__name__
    assert native.fingerprint() == want.fingerprint(), read.__name__
    assert torch.equal(logits(got), logits(want)), read.__name__


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_reader_finds_the_model_that_was_written(write, state, dtype, tmp_path):
    (tmp_path / "made").mkdir()
    path = write(model_of(state, dtype), tmp_path / "made")
    want = model_of(state, dtype).float()  # every reader computes in float32
    for read in READERS:
        assert_reads(read, path, tmp_path / read.__name__, want, state == "tied")


@pytest.mark.parametrize("state", STATES)
def test_a_model_without_its_head_is_read_from_every_folder(state, tmp_path):
    """A file may hold a tied matrix under either name, and a head that is to be left out."""
    model = model_of(state)
    for write in (write_folder, write_hf, write_shards, write_old_hf, write_head_only):
        place = tmp_path / write.__name__
        place.mkdir()
        made, facts = AutoModel.from_pretrained(write(model, place), output_loading_info=True)
        assert not any(facts.values()), (write.__name__, facts)
        hidden = copy.deepcopy(made)(IDS, use_cache=False).last_hidden_state
        assert torch.equal(model.head(hidden), logits(model)), write.__name__
        assert made.config.tie_embeddings == (state == "tied")


def old_quantized(model, folder):
    """The folder of a quantized model, whose config says that it is tied."""
    save_folder(folder, model)
    about = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**about, "tie_embeddings": True})
    return folder


def write_quantized_hf(model, folder):
    hf(model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("state", STATES)
def test_every_reader_of_a_quantized_folder_finds_the_same_model(state, bits, tmp_path):
    model = quantize_model(model_of(state), bits, group_size=16)
    assert model.config.tie_embeddings == (state == "tied")
    assert torch.equal(model.embedding.weight, model.head.weight) == (state == "tied")
    embedding = with_onnx_layers(Graph(model)).model.embedding
    assert isinstance(embedding, OnnxEmbedding) == (state == "tied")
    writers = [write_folder, write_quantized_hf] + [old_quantized] * (state == "apart")
    for write in writers:
        place = tmp_path / write.__name__
        place.mkdir()
        path = write(model, place)
        for read in (read_natively, read_as_folder, read_hf, read_hf_saved_again):
            assert_reads(read, path, place / read.__name__, model, state == "tied")


@pytest.mark.parametrize("state", STATES)
def test_an_adapter_fits_its_base_wherever_that_is_read_from(state, tmp_path):
    targets = ["qkv", "in_proj"] + ["head"] * (state != "tied")
    model = attach(model_of(state), AdapterConfig(target_modules=targets))
    stir(model, "default")
    want = logits(model.eval())
    save_adapter(model, tmp_path / "adapter")
    for write in WRITERS:
        place = tmp_path / write.__name__
        place.mkdir()
        base = load_model(write(model_of(state), place))
        load_adapter(base, tmp_path / "adapter")
        assert torch.equal(logits(base), want), write.__name__
    merge_adapter(base)
    save_model(tmp_path / "merged.pt", base, plain_weights(base))
    merged = load_model(tmp_path / "merged.pt")
    assert merged.config.tie_embeddings == (state == "tied")
    close(logits(merged), want, 1e-5)  # the adapter's product is rounded apart, and then added


def step_of(graph: Graph, options: Options) -> dict:
    """The graph of one token only: the other one takes long to export."""
    example = examples(graph, options)["step"]
    return graph.programs or {"step": torch.export.export(graph, example, strict=False)}


def test_onnx_has_a_head_trained_apart(tmp_path, monkeypatch):
    """Once read it is an untied model; a tied one is exported in test_export_model.py."""
    pytest.importorskip("onnxruntime")
    from onnx_generate import OnnxModel

    monkeypatch.setattr(export_model, "programs", step_of)
    model = model_of("apart", memory=False).requires_grad_(False)
    path = write_old_checkpoint(model, tmp_path)
    write_onnx(tmp_path, export_model.load_graph(path, "cpu"), Options(batch_size=2))
    shutil.copy(tmp_path / "step.onnx", tmp_path / "prefill.onnx")
    made, past = OnnxModel(tmp_path, threads=1), None
    for column in IDS[:, :5].numpy().T:
        last, past = made.advance(column[:, None], past)
    close(torch.from_numpy(last), model(IDS[:, :5])[:, -1], 1e-5)  # other sums of float32


# ------------------------------------------------------------------------- what is said and saved


def test_a_file_that_contradicts_its_config_is_untied_in_one_line(tmp_path):
    path = write_old_checkpoint(model_of("apart"), tmp_path)
    with pytest.warns(UserWarning, match=r"x\.pt: tie_embeddings is true, but its head") as said:
        model = load_model(path)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    save_model(path, model)
    with warnings.catch_warnings(action="error"):
        assert not load_model(path).config.tie_embeddings


def test_settings_of_the_same_name_that_differ_are_refused(tmp_path):
    write_hf(model_of("tied"), tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["tie_embeddings"] is about["tie_word_embeddings"] is True
    write_json(tmp_path / "config.json", {**about, "tie_word_embeddings": False})
    with pytest.raises(UserError, match="tie_embeddings and tie_word_embeddings differ"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="tie_embeddings: .*; make them equal"):
        TinyMambaHFModel.from_pretrained(tmp_path)


def test_a_config_says_tie_word_embeddings_and_obeys_it(tmp_path):
    for word in (True, False):
        config = TinyMambaConfig(**SMALL, tie_word_embeddings=word)
        assert config.to_dict()["tie_word_embeddings"] is config.tie_embeddings is word
        assert config.to_native().tie_embeddings is word
        again = TinyMambaConfig.from_dict(json.loads(config.to_json_string()))
        assert again.to_dict() == config.to_dict()


def untied_at_loading(folder):
    """A tied folder, loaded with a head of its own."""
    write_hf(model_of("tied"), folder)
    return AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=False)


def untied_in_memory(folder):
    """A tied model whose user sets the flag later."""
    model = hf(model_of("tied"))
    model.config.tie_word_embeddings = False
    return model


def untied_natively(folder):
    """An untied config, and one matrix in both places."""
    model = model_of("untied")
    model.head.weight = model.embedding.weight
    return model


@pytest.mark.parametrize("make", [untied_at_loading, untied_in_memory, untied_natively])
def test_who_unties_a_tied_model_saves_an_untied_one(make, tmp_path):
    model, place = make(tmp_path / "tied"), tmp_path / "saved"
    place.mkdir()
    if isinstance(model, TinyMambaHFModel):
        model.save_pretrained(place)
        assert {"model.embedding.weight", "model.head.weight"} <= {*load_file(
            place / "model.safetensors")}  # fmt: skip
    else:
        save_folder(place, model)
    want = model_of("untied")
    want.load_state_dict(model_of("tied").state_dict())
    for read in READERS:
        assert_reads(read, place, tmp_path / read.__name__, want, False)


def test_new_tokens_leave_a_head_apart_as_it_is():
    model = hf(model_of("tied"))
    model.model.head.weight = new_head(model.model)
    before = logits(model)
    model.resize_token_embeddings(70)
    assert torch.equal(logits(model)[..., :64], before)
    assert not model.config.tie_word_embeddings and not model.model.config.tie_embeddings


# ------------------------------------------------------------------------ Hugging Face's peft


def tuned(model, **settings):
    """A model after a few steps with an adapter, the logits of that, and what peft warns of."""
    import peft

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        made = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **settings))
        optimizer = torch.optim.Adam((p for p in made.parameters() if p.requires_grad), 0.02)
        for _ in range(20):
            optimizer.zero_grad()
            made(IDS, labels=IDS).loss.backward()
            optimizer.step()
        want = made.eval()(IDS, use_cache=False).logits.detach()
        merged = made.merge_and_unload()
    return merged, want, " ".join(str(warning.message) for warning in said)


@pytest.mark.parametrize("old", [False, True], ids=["saved_today", "saved_before"])
@pytest.mark.parametrize("kept", [["head"], ["embedding"], ["embedding", "head"]], ids=str)
def test_what_peft_trains_apart_is_the_same_for_every_reader(kept, old, tmp_path):
    merged, want, said = tuned(
        hf(model_of("tied")), target_modules=["qkv", "in_proj"], modules_to_save=kept
    )
    assert "no longer tied after merging" in said and not merged.config.tie_word_embeddings
    close(logits(merged), want, 1e-5)
    merged.save_pretrained(tmp_path / "hf")
    if old:
        path = tmp_path / "hf" / "config.json"
        about = json.loads(path.read_text())
        del about["tie_word_embeddings"]
        write_json(path, {**about, "tie_embeddings": True})
    want = as_native(merged.model)
    for read in READERS:
        assert_reads(read, tmp_path / "hf", tmp_path / read.__name__, want, False)


def test_peft_keeps_trained_tokens_tied(tmp_path):
    merged, want, _ = tuned(
        hf(model_of("tied")), target_modules=["qkv"], trainable_token_indices=[1, 2]
    )
    close(logits(merged), want, 1e-5)
    merged.save_pretrained(tmp_path / "hf")
    for read in READERS:
        want = as_native(merged.model)
        assert_reads(read, tmp_path / "hf", tmp_path / read.__name__, want, True)


def test_lora_of_the_head_merges_into_a_model_that_is_loaded_untied(tmp_path):
    model = untied_at_loading(tmp_path / "tied")
    merged, want, _ = tuned(model, target_modules=["head"])
    close(logits(merged), want, 1e-5)
    assert torch.equal(merged.model.embedding.weight, model_of("tied").embedding.weight)
    merged.save_pretrained(tmp_path / "hf")
    assert torch.equal(logits(load_model(tmp_path / "hf")), logits(merged))
