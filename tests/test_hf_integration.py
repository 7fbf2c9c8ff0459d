"""hf_integration.py against the native model, at the level of logits, and through transformers."""

import copy
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import accelerate
import openai
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DOCUMENTS,
    EOS,
    FIRST_FORM,
    GATES,
    POSIX,
    ROOT,
    Census,
    assert_refused,
    free_copy,
    free_port,
    run_main,
    run_script,
    some_ids,
    tiny_config,
    wide,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    QuantizedCache,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

import benchmark
import hf_integration
import onnx_generate
from data.prepare import main as prepare
from hf_integration import (
    AUTO_MAP,
    TinyMambaConfig,
    TinyMambaForCausalLM,
    TinyMambaHFModel,
    TinyMambaHFTokenizer,
    config_of,
    convert,
    main,
    read_cache,
)
from quantize import quantize_model
from testv2 import ModelState, TinyMambaModel, generate, load_model, save_folder
from tinymamba.checkpoint import load_checkpoint, save_checkpoint, save_model
from tinymamba.cli import UserError
from tinymamba.tokenizer import PAD_TOKEN, SimpleTokenizer, byte_tokenizer

SHAPES = {
    "plain": {}, "documents": DOCUMENTS, "no_window": {"window_size": 1},
    "no_conv": {"d_conv": 1}, "first_form": FIRST_FORM, "memory": {"memory_every": 1},
    "low_rank": {"low_rank": 5, "tie_embeddings": False},
    **{gate: {"gate": gate} for gate in GATES[1:]},
}  # fmt: skip
EOS_OF_BYTES = 256
SPLITS = [(40,), (1,) * 40, (3, 1, 17, 1, 1, 17), (30, 10)]


hf = TinyMambaHFModel.of


def close(got, want, tolerance=1e-5):
    """Equal to a share of the largest number."""
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want.detach().abs().max()))


def caches(model, length=64):
    yield DynamicCache(config=model.config)
    yield StaticCache(config=model.config, max_cache_len=length)


def same_state(got: ModelState, want: ModelState, tolerance: float):
    """Equal in all that can still be read: keys from before the text are hidden."""
    for (name, a), b in zip(got.tensors().items(), want.tensors().values(), strict=True):
        if name.endswith(("keys", "values")) and a.shape[2]:
            known = want.position.clamp(max=a.shape[2])
            hidden = torch.arange(a.shape[2]) < (a.shape[2] - known)[:, None]
            a, b = (t.masked_fill(hidden[:, None, :, None], 0.0) for t in (a, b))
        if b.numel():
            close(a, b, tolerance)


# ------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("double", [False, True], ids=["f32", "f64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_states_equal_the_native_ones_for_every_split(shape, double):
    """In float64 too, where rounding does not grow from token to token."""
    native = wide(double, **SHAPES[shape])
    model, ids = hf(native), some_ids(3, 40, seed=3)
    if double:
        model.double().model.rotary = native.rotary  # of wide: its angles are not rounded
    ids[0, 20] = ids[1, 9] = EOS
    want, state = native.advance(ids, native.init_state(3))
    close(model(ids, use_cache=False).logits, want, 1e-12 if double else 1e-6)
    for split in SPLITS:
        for cache in caches(model):
            got = [model(chunk, past_key_values=cache).logits for chunk in ids.split(split, dim=1)]
            close(torch.cat(got, dim=1), want, 1e-10 if double else 1e-5)
            assert cache.get_seq_length() == 40
            same_state(read_cache(cache, native, 3), state, 1e-11 if double else 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_padding_on_any_side_and_in_any_chunk_leaves_a_row_as_it_is_alone(shape):
    native = wide(**SHAPES[shape])
    model, texts = hf(native), some_ids(4, 40, seed=4)
    generator = torch.Generator().manual_seed(5)
    masks = (torch.rand(4, 40, generator=generator) < 0.6).long()
    masks[0, :23] = masks[1, 31:] = 0  # left and right
    masks[2] = 1
    rows = [texts[r, : int(m.sum())] for r, m in enumerate(masks)]
    ids = torch.full_like(texts, 7).masked_scatter(masks.bool(), torch.cat(rows))
    want = [native(row[None])[0] for row in rows]
    for split in SPLITS:
        for cache in caches(model):
            got, at = [], 0
            for chunk in ids.split(split, dim=1):
                at += chunk.shape[1]
                out = model(chunk, attention_mask=masks[:, :at], past_key_values=cache)
                got.append(out.logits)
            got = torch.cat(got, dim=1)
            for r, logits in enumerate(want):
                close(got[r, masks[r].bool()], logits)


def test_positions_that_restart_begin_a_document():
    model, ids = hf(wide()), some_ids(2, 30)
    cuts = [(0, 9), (9, 10), (10, 30)]
    positions = torch.cat([torch.arange(e - b) for b, e in cuts])[None].expand(2, -1)
    got = model(ids, position_ids=positions)
    for begin, end in cuts:
        close(got.logits[:, begin:end], model(ids[:, begin:end]).logits)
    state = read_cache(got.past_key_values, model.model, 2)
    assert state.document_start.tolist() == [10, 10]
    follow = model(ids[:, :4], past_key_values=got.past_key_values).logits
    close(follow, model(torch.cat((ids[:, 10:], ids[:, :4]), 1)).logits[:, -4:])

    mask = torch.ones(2, 33, dtype=torch.int64)  # with padding between documents
    mask[:, [9, 20, 21]] = 0
    padded = torch.zeros_like(mask).masked_scatter(mask.bool(), ids)
    places = torch.zeros_like(mask).masked_scatter(mask.bool(), positions.contiguous())
    again = model(padded, attention_mask=mask, position_ids=places).logits
    close(again[mask.bool()].view_as(got.logits), got.logits)


@pytest.mark.parametrize("cut", range(1, 20))
def test_documents_stay_apart_wherever_a_packed_row_is_cut(cut):
    native, ids = wide(), some_ids(1, 20)
    model, positions = hf(native), torch.cat((torch.arange(8), torch.arange(12)))[None]
    want = torch.cat([native(part) for part in ids.split((8, 12), dim=1)], dim=1)
    for cache in caches(model):
        got = [model(ids[:, chunk], position_ids=positions[:, chunk], past_key_values=cache).logits
               for chunk in (slice(cut), slice(cut, None))]  # fmt: skip
        close(torch.cat(got, dim=1), want)


def test_packed_rows_have_the_gradient_of_the_rows_alone():
    packed, alone = hf(wide()).train(), hf(wide()).train()
    ids, positions = some_ids(1, 25), torch.cat((torch.arange(11), torch.arange(14)))[None]
    labels = ids.clone()
    labels[0, 11] = -100  # no token of one document predicts one of another
    packed(ids, position_ids=positions, labels=labels).loss.backward()
    losses = [alone(part, labels=part, num_items_in_batch=23).loss
              for part in ids.split((11, 14), 1)]  # fmt: skip
    sum(losses).backward()
    for (name, p), q in zip(packed.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-5 * float(q.grad.abs().max()) + 1e-9), name


def test_embeddings_take_the_place_of_ids_where_they_can():
    model, ids = hf(wide()), some_ids(2, 12)
    embedded = model.get_input_embeddings()(ids)
    close(model(inputs_embeds=embedded).logits, model(ids).logits, 0)
    with pytest.raises(ValueError, match="input_ids, inputs_embeds: pass exactly one"):
        model(ids, inputs_embeds=embedded)
    with pytest.raises(ValueError, match="inputs_embeds: a model with document_mask"):
        hf(wide(**DOCUMENTS))(inputs_embeds=embedded)


def test_logits_to_keep_are_the_last_or_the_ones_named():
    model, ids = hf(wide()), some_ids(2, 12)
    whole = model(ids).logits
    close(model(ids, logits_to_keep=3).logits, whole[:, -3:], 0)
    close(model(ids, logits_to_keep=torch.tensor([0, 7])).logits, whole[:, [0, 7]], 0)


@pytest.mark.parametrize(("problem", "arguments"), [
    ("attention_mask: has shape", {"attention_mask": torch.ones(2, 1, 9, 9)}),
    ("attention_mask: has shape", {"attention_mask": torch.ones(2, 8)}),
    ("cannot hold recurrent states", {"past_key_values": DynamicCache()}),
])  # fmt: skip
def test_what_cannot_be_read_is_rejected_by_name(problem, arguments):
    with pytest.raises(ValueError, match=problem):
        hf(wide())(some_ids(2, 9), **arguments)


def test_a_cache_of_other_rows_or_too_small_is_rejected():
    model = hf(wide())
    cache = model(some_ids(2, 9)).past_key_values
    with pytest.raises(ValueError, match="has 2 sequences, but the input has 3"):
        model(some_ids(3, 1), past_key_values=cache)
    full = StaticCache(config=model.config, max_cache_len=4)
    model(some_ids(2, 4), past_key_values=full)
    with pytest.raises(ValueError, match="static cache of 4 tokens is full"):
        model(some_ids(2, 1), past_key_values=full)
    assert full.get_seq_length() == 4
    with pytest.raises(ValueError, match="input_ids: have no new token"):
        model(some_ids(2, 4)[:, :0], past_key_values=full)
    with pytest.raises(ValueError, match="cannot hold recurrent states"):
        model(some_ids(2, 4), past_key_values=((1, 2),))


def test_a_cache_that_is_reset_has_read_nothing():
    model, ids = hf(wide()), some_ids(2, 12)
    want = model(ids).logits
    for cache in caches(model):
        model(some_ids(2, 20, seed=5), past_key_values=cache)
        cache.reset()
        got = [model(chunk, past_key_values=cache).logits for chunk in ids.split((5, 7), dim=1)]
        close(torch.cat(got, dim=1), want)


# ---------------------------------------------------------------------------------- generation


def scores_of(model, prompt, mask=None, **arguments):
    out = model.generate(
        prompt, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **arguments
    )
    return out, torch.stack(out.logits, dim=1)


def test_greedy_generation_is_the_native_one_for_every_cache():
    native = wide()
    model, prompt = hf(native), some_ids(2, 11)
    want = generate(native, prompt, 20, temperature=0)
    for kind, arguments in (
        (DynamicCache, {}), (StaticCache, {"cache_implementation": "static"}),
        (type(None), {"use_cache": False}), (DynamicCache, {"prefill_chunk_size": 4}),
        (StaticCache, {"prefill_chunk_size": 4, "cache_implementation": "static"}),
    ):  # fmt: skip
        out, logits = scores_of(model, prompt, max_new_tokens=20, do_sample=False, **arguments)
        assert torch.equal(out.sequences, want), arguments
        assert type(out.past_key_values) is kind
        close(logits, native(want)[:, 10:-1])


def test_left_padded_rows_generate_what_they_do_alone():
    native, lengths = wide(), (5, 17, 1)
    model, texts = hf(native), some_ids(3, 17)
    mask = torch.stack([torch.arange(17) >= 17 - n for n in lengths]).long()
    prompt = torch.stack([F.pad(t[:n], (17 - n, 0)) for t, n in zip(texts, lengths, strict=True)])
    out, logits = scores_of(model, prompt, mask, max_new_tokens=12, do_sample=False)
    for r, n in enumerate(lengths):
        alone, want = scores_of(model, texts[r : r + 1, :n], max_new_tokens=12, do_sample=False)
        assert torch.equal(out.sequences[r, 17:], alone.sequences[0, n:])
        close(logits[r], want[0])


def test_a_returned_cache_continues_with_a_turn_of_several_tokens():
    native = wide()
    model, first, turn = hf(native), some_ids(2, 9), some_ids(2, 6, seed=9)
    for cache in caches(model):
        out, _ = scores_of(model, first, max_new_tokens=5, do_sample=False, past_key_values=cache)
        text = torch.cat((out.sequences, turn), dim=1)
        again, logits = scores_of(
            model, text, max_new_tokens=5, do_sample=False, past_key_values=out.past_key_values
        )
        close(logits, native(again.sequences)[:, text.shape[1] - 1 : -1])


def test_turns_of_different_lengths_continue_padded_rows():
    native = wide()
    model, texts, turns = hf(native), some_ids(2, 9), some_ids(2, 6, seed=9)
    ids, mask = texts.clone(), torch.ones(2, 15, dtype=torch.int64)
    mask[1, :4] = mask[0, 9:11] = 0
    ids = torch.cat((ids, turns), dim=1)
    cache = model(ids[:, :9], attention_mask=mask[:, :9]).past_key_values
    _, logits = scores_of(model, ids, mask, max_new_tokens=4, do_sample=False,
                          past_key_values=cache)  # fmt: skip
    for r in range(2):
        row = ids[r : r + 1, mask[r].bool()]
        _, want = scores_of(model, row, max_new_tokens=4, do_sample=False)
        close(logits[r], want[0])


def test_embeddings_can_begin_a_generation():
    model, ids = hf(wide()), some_ids(2, 9)
    want = model.generate(ids, max_new_tokens=6, do_sample=False)[:, 9:]
    embedded = model.get_input_embeddings()(ids)
    for kind in (None, "static"):
        got = model.generate(inputs_embeds=embedded, max_new_tokens=6, do_sample=False,
                             cache_implementation=kind)  # fmt: skip
        assert torch.equal(got, want)


def test_beams_of_padded_rows_are_those_of_the_rows_alone():
    model, ids = hf(wide()), some_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    how = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    want = [model.generate(ids[:1], **how)[0, 9:], model.generate(ids[1:, 5:], **how)[0, 4:]]
    for kind in (None, "static"):
        got = model.generate(ids, attention_mask=mask, cache_implementation=kind, **how)
        assert torch.equal(got[:, 9:], torch.stack(want))


def test_beam_search_scores_are_those_of_the_native_model():
    native = wide()
    model, prompt = hf(native), some_ids(2, 7)
    out = model.generate(prompt, max_new_tokens=6, num_beams=4, num_return_sequences=3,
                         return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
                         eos_token_id=None, do_sample=False)  # fmt: skip
    logprobs = native(out.sequences)[:, 6:-1].log_softmax(-1)
    want = logprobs.gather(-1, out.sequences[:, 7:, None])[..., 0].sum(1)
    torch.testing.assert_close(out.sequences_scores, want, rtol=1e-4, atol=1e-4)
    assert len({tuple(s.tolist()) for s in out.sequences}) == 6


def test_sampling_draws_from_the_native_logits():
    native = wide()
    model, prompt = hf(native), some_ids(1, 7)
    torch.manual_seed(3)
    got = model.generate(prompt, max_new_tokens=8, do_sample=True, top_k=0, temperature=0.7)
    torch.manual_seed(3)
    ids = prompt
    for _ in range(8):
        p = (native(ids)[:, -1] / 0.7).softmax(-1)
        ids = torch.cat((ids, torch.multinomial(p, 1)), dim=1)
    assert torch.equal(got, ids)


def test_streamers_criteria_and_pipelines_work(tmp_path):
    model, tokenizer = hf(wide()), TinyMambaHFTokenizer.of(SimpleTokenizer())
    inputs = tokenizer("two words", return_tensors="pt")
    want = tokenizer.decode(model.generate(**inputs, max_new_tokens=9, do_sample=False)[0])
    streamer = TextIteratorStreamer(tokenizer)
    thread = threading.Thread(target=model.generate, kwargs={
        **inputs, "streamer": streamer, "max_new_tokens": 9, "do_sample": False})  # fmt: skip
    thread.start()
    assert "".join(streamer) == want
    thread.join()
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = pipe(["two words", "a"], max_new_tokens=9, do_sample=False, batch_size=2)
    assert texts[0][0]["generated_text"] == want

    class AfterTwo(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return torch.full((len(ids),), ids.shape[1] >= 11)

    ids = model.generate(**inputs, max_new_tokens=9, do_sample=False,
                         stopping_criteria=StoppingCriteriaList([AfterTwo()]))  # fmt: skip
    assert ids.shape[1] == 11


def test_what_a_state_cannot_do_is_rejected():
    model, prompt = hf(wide()), some_ids(1, 5)
    with pytest.raises(ValueError, match="assistant_early_exit: no block but the last"):
        model.generate(prompt, assistant_early_exit=1, max_new_tokens=3)
    with pytest.raises(ValueError, match="only supported for batch_size = 1"):
        model.generate(some_ids(2, 5), prompt_lookup_num_tokens=2, max_new_tokens=3)
    with pytest.raises(ValueError, match="hybrid_sliding"):
        model(prompt, past_key_values=QuantizedCache("quanto", model.config))
    cache = model(prompt).past_key_values
    with pytest.raises(RuntimeError, match="call activate_past_recording"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="tokens_to_remove: is positive"):
        cache.crop(1)


# ------------------------------------------------------------------- drafts, and caches cut short


def drafts(native: TinyMambaModel) -> dict[str, dict]:
    """Ways to draft tokens: a model that is hardly ever right, one that mostly is, the prompt."""
    ways: dict = {"lookup": {"prompt_lookup_num_tokens": 4}}
    for name, noise in (("bad", 1.0), ("good", 0.05)):
        model, generator = free_copy(native), torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in model.parameters():
                size = noise * p.std(unbiased=False)
                p += size * torch.randn(p.shape, generator=generator)
        ways[name] = {"assistant_model": hf(model)}
    return ways


@pytest.mark.parametrize(
    ("shape", "length"), [("plain", 80), ("documents", 5), ("no_window", 5), ("no_conv", 5)]
)
def test_drafts_change_no_token_of_greedy_decoding(shape, length):
    native = wide(**SHAPES[shape])
    model, prompt, calls = hf(native), some_ids(1, length), {}
    want, read = generate(native, prompt, 16, temperature=0), []
    model.model.norm.register_forward_hook(lambda module, args, x: read.append(x.shape[1]))
    for name, draft in drafts(native).items():
        read.clear()
        out, logits = scores_of(model, prompt, max_new_tokens=16, do_sample=False, **draft)
        calls[name] = len(read)
        assert torch.equal(out.sequences, want), name
        close(logits, native(want)[:, length - 1 : -1])
        turn = torch.cat((out.sequences, some_ids(1, 3, seed=6)), dim=1)
        close(model.generate(turn, max_new_tokens=1, do_sample=False, output_logits=True,
                             return_dict_in_generate=True, past_key_values=out.past_key_values,
                             ).logits[0], native(turn)[:, -1])  # fmt: skip
    assert calls["good"] < 12 <= calls["bad"], "drafts are accepted, and rejected"


def test_sampling_with_drafts_draws_from_the_native_logits():
    native = wide()
    model, prompt = hf(native), some_ids(1, 70)
    for seed, draft in enumerate(drafts(native).values()):
        torch.manual_seed(seed)
        out, logits = scores_of(model, prompt, max_new_tokens=12, do_sample=True, top_k=0, **draft)
        close(logits, native(out.sequences)[:, 69:-1])


def test_it_drafts_for_another_model_and_takes_its_drafts():
    model, prompt = hf(wide()), some_ids(1, 9)
    torch.manual_seed(4)
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2)).eval()  # fmt: skip
    for target, assistant in ((model, llama), (llama, model)):
        want = target.generate(prompt, max_new_tokens=12, do_sample=False)
        got = target.generate(
            prompt, max_new_tokens=12, do_sample=False, assistant_model=assistant)  # fmt: skip
        assert torch.equal(got, want)


def random_calls(model, cache, rows: int, embeds: bool):
    """Calls of random lengths with random padding; yields all ids and their mask so far, logits."""
    random = torch.Generator().manual_seed(8)
    ids, mask = torch.zeros(2, rows, 0, dtype=torch.int64)
    while True:
        new = some_ids(rows, int(torch.randint(1, 10, (), generator=random)), seed=ids.shape[1])
        kept = torch.rand(new.shape, generator=random) < (0.7 if len(new) % 2 else 1.0)
        ids, mask = torch.cat((ids, new), 1), torch.cat((mask, kept.long()), 1)
        inputs = {"input_ids": new}
        if embeds and new.shape[1] % 3 == 0:
            inputs = {"inputs_embeds": model.get_input_embeddings()(new)}
        out = model(**inputs, attention_mask=mask, past_key_values=cache)
        removed = yield ids, mask, out.logits
        if removed:
            ids, mask = ids[:, :-removed], mask[:, :-removed]


@pytest.mark.parametrize("shape", ["plain", "documents", "no_window", "no_conv"])
def test_a_cropped_cache_continues_as_if_it_had_not_read_the_rest(shape, monkeypatch):
    """Against every row alone; few states are kept, and short calls count as long ones."""
    monkeypatch.setattr(hf_integration, "SNAPSHOTS", 2)
    monkeypatch.setattr(hf_integration, "TAIL", 3)
    native, random, depths = wide(**SHAPES[shape]), torch.Generator().manual_seed(9), set()
    model = hf(native)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    calls, removed, begin, before = random_calls(model, cache, 2, shape == "plain"), None, 0, 0
    for step in range(20):
        ids, mask, logits = calls.send(removed)
        for row, kept, got in zip(ids, mask.bool(), logits, strict=True):
            new = kept[before:]
            if new.any():
                close(got[new], native(row[kept][None])[0, -int(new.sum()) :])
        removed, before = 0, ids.shape[1]
        if step % 4 != 1:
            removed = int(torch.randint(0, before - begin + 1, (), generator=random))
            cache.crop(-removed)
            begin = before = before - removed
            depths.add(removed)
        assert cache.get_seq_length() == before
    assert len(depths) > 6


@pytest.mark.parametrize("kept", [1, 32])
def test_a_crop_may_cut_where_a_document_begins(kept, monkeypatch):
    monkeypatch.setattr(hf_integration, "SNAPSHOTS", kept)
    native, ids = wide(), some_ids(2, 20)
    model, positions = hf(native), torch.cat((torch.arange(8), torch.arange(12)))[None]
    for cut in (3, 8, 9, 14):
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        for chunk in (slice(5), slice(5, 8), slice(8, 11), slice(11, 20)):
            model(ids[:, chunk], position_ids=positions[:, chunk], past_key_values=cache)
        cache.crop(cut - 20)
        if kept > 1 and cut == 8:
            assert not cache.layers[0].text.unread, "goes back to the state at this very token"
        rest = model(ids[:, cut:], position_ids=positions[:, cut:], past_key_values=cache,
                     output_hidden_states=True, output_attentions=cut > 8)  # fmt: skip
        want = torch.cat([native(part) for part in ids.split((8, 12), dim=1)], dim=1)
        close(rest.logits, want[:, cut:])
        close(model.model.head(rest.hidden_states[-1]), want[:, cut:])
        assert {x.shape[1] for x in rest.hidden_states} == {20 - cut}


@pytest.mark.parametrize(("kept", "removed"), [(10, 10), (60, 31), (60, 32)])
@pytest.mark.parametrize("padded", [False, True])
def test_what_follows_a_crop_decides_whether_a_document_begins(kept, removed, padded):
    """The cropped tokens began one; those that are read instead continue the one before."""
    native, ids = wide(), some_ids(2, kept + removed + 5)
    model, steps = hf(native), torch.arange(kept + 5)
    mask = torch.ones(2, kept + removed, dtype=torch.int64)
    mask[1, :4] = 0 if padded else 1  # of the second row
    positions = torch.cat((steps[:kept], steps[:removed])).expand(2, -1).clone()
    positions[1, :kept] -= 4 if padded else 0
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids[:, :-5], attention_mask=mask, position_ids=positions, past_key_values=cache)
    cache.crop(-removed)
    late = positions[:, kept - 1 : kept] + 1 + steps[None, :5]
    got = model(ids[:, -5:], position_ids=late, past_key_values=cache).logits
    for row, begin in ((0, 0), (1, 4 if padded else 0)):
        text = torch.cat((ids[row, begin:kept], ids[row, -5:]))[None]
        close(got[row], native(text)[0, -5:])


@pytest.mark.parametrize("first", ["crop", "rows"])
def test_rows_of_a_cropped_cache_are_selected_and_repeated(first):
    native, ids = wide(), some_ids(3, 14)
    model, rows = hf(native), torch.tensor([2, 0, 2])
    for change, chosen in (
        (lambda c: c.reorder_cache(rows), rows),
        (lambda c: c.batch_select_indices(rows[:2]), rows[:2]),
        (lambda c: c.batch_repeat_interleave(2), torch.arange(3).repeat_interleave(2)),
    ):
        cache, want = model(ids[:, :5]).past_key_values, native(ids)[chosen]
        cache.activate_past_recording()
        model(ids[:, 5:9], past_key_values=cache)
        model(some_ids(3, 2, seed=7), past_key_values=cache)
        steps = [change, lambda c: c.crop(-4)]
        for step in steps[:: 1 if first == "rows" else -1]:
            step(cache)
        close(model(ids[chosen, 7:], past_key_values=cache).logits, want[:, 7:])


def test_caches_are_copied_and_saved_at_any_time():
    native, ids = wide(), some_ids(2, 14)
    model, want = hf(native), native(ids)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids[:, :6], past_key_values=cache)
    assert b"hf_integration" not in pickle.dumps(cache), "loads only where the code is"
    fork = copy.deepcopy(cache)
    model(ids[:, 6:9], past_key_values=fork)
    fork.crop(-2)
    assert b"hf_integration" not in pickle.dumps(fork), "nor do tokens that a crop left unread"
    saved = pickle.loads(pickle.dumps(fork))
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        saved.crop(-2)
    for each, read in ((cache, 6), (fork, 7), (saved, 7)):
        close(model(ids[:, read:], past_key_values=each).logits, want[:, read:])
    fork.crop(-3)
    close(model(ids[:, 11:], past_key_values=fork).logits, want[:, 11:])


@pytest.mark.parametrize("length", [3, 30])
def test_a_cache_of_an_earlier_version_continues(length):
    """One in which the layers of transformers hold the state, as a file may have it."""
    native, ids = wide(memory_every=1), some_ids(2, length + 5)
    model, cache = hf(native), DynamicCache(config=hf(native).config)
    _, state = native.advance(ids[:, :length], native.init_state(2))
    position = torch.stack((state.position, state.document_start), dim=1)[..., None]
    for i, layer in enumerate(state.layers):
        for j, t in enumerate((layer.conv.mT, layer.phase[..., None], position)):
            cache.update_conv_state(t, i, j)
        for j, t in enumerate((layer.ssm, layer.memory)):
            cache.update_recurrent_state(t, i, j)
        cache.update(*(F.pad(t, (0, 0, length, 0))[:, :, -length:]
                       for t in (layer.keys, layer.values)), i)  # fmt: skip
    cache = pickle.loads(pickle.dumps(cache))
    close(model(ids[:, length:], past_key_values=cache).logits, native(ids)[:, length:])


def test_a_step_is_prepared_as_transformers_does():
    model, ids = hf(wide()), some_ids(2, 9)
    cache, mask = model(ids).past_key_values, torch.ones(2, 10, dtype=torch.int64)
    for more in ({}, {"attention_mask": mask, "position_ids": torch.arange(10).expand(2, -1)}):
        inputs = {"next_sequence_length": 1, "past_key_values": cache, "use_cache": True,
                  "logits_to_keep": 1, "inputs_embeds": None, "labels": ids, **more}  # fmt: skip
        got = model.prepare_inputs_for_generation(ids, **inputs)
        want = GenerationMixin.prepare_inputs_for_generation(model, ids, **inputs)
        assert {n: v for n, v in got.items() if v is not None}.keys() == want.keys()
        for name, value in want.items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a is b
            assert same(got[name], value), name


def test_a_step_copies_no_state():
    """It runs the native operations, and per block a few that only look at the state."""
    native, ids, counts = wide(n_layer=6), some_ids(2, 9), []
    model, state = hf(native).requires_grad_(False), native.advance(ids, native.init_state(2))[1]
    cache = model(ids, use_cache=True).past_key_values
    steps = (lambda: native.advance(ids[:, :1], state),
             lambda: model(ids[:, :1], past_key_values=cache))  # fmt: skip
    for step in steps:
        with Census() as census:
            step()
        counts.append(census.operations)
    assert counts[1] - counts[0] < 6 * 6 + 12
    model(some_ids(2, 3000), past_key_values=cache)  # no view keeps the tensors of all tokens alive
    held = [
        t
        for layer in cache.layers
        for t in (
            layer.keys,
            layer.values,
            *layer.conv_states.values(),
            *layer.recurrent_states.values(),
        )
    ]
    stored = sum(t.untyped_storage().nbytes() for t in held if t is not None)
    assert stored < 1.5 * state.nbytes
    cache.activate_past_recording()
    for token in some_ids(2, 40).split(1, dim=1):
        model(token, past_key_values=cache)
    kept = [s for s in cache.layers[0].text.past if s.state is not None]
    assert len(kept) == hf_integration.SNAPSHOTS


def test_a_static_cache_decodes_compiled_in_one_graph():
    model, ids = hf(wide()), some_ids(2, 14)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :3] = 0
    want = model(ids, attention_mask=F.pad(mask, (0, 5), value=1)).logits
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(ids[:, :9], attention_mask=mask, past_key_values=cache)
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    got = [step(ids[:, t : t + 1], past_key_values=cache).logits for t in range(9, 14)]
    close(torch.cat(got, dim=1), want[:, 9:])


def test_the_cache_has_a_constant_size():
    model = hf(wide())

    def nbytes(length: int) -> int:
        layers = model(some_ids(1, length)).past_key_values.layers
        return sum(t.nbytes for layer in layers for t in (
            layer.keys, layer.values, *layer.conv_states.values(),
            layer.recurrent_states[0]))  # fmt: skip

    assert nbytes(30) == nbytes(300)


# ------------------------------------------------------------------------------------- outputs


def test_attention_weights_and_hidden_states_are_those_that_were_used():
    native = wide()
    model, ids = hf(native), some_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    plain = model(ids, attention_mask=mask)
    model.set_attn_implementation("eager")
    out = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    close(out.logits[mask.bool()], plain.logits[mask.bool()])
    W = native.config.window_size
    token, key = torch.arange(20)[:, None], torch.arange(20)
    for weights in out.attentions:
        assert weights.shape == (2, 2, 20, 20)
        torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 20))
        assert not weights[0, :, (key > token) | (key <= token - W)].any()
        assert not weights[1, :, 6:, :6].any()
    first = model.model.embedding(ids)
    close(out.hidden_states[0], first, 0)
    close(model.model.head(out.hidden_states[-1]), out.logits, 0)
    x, context = first[:1], native.make_context(ids[:1], None, None, None)
    for block, hidden in zip(native.blocks[:1], out.hidden_states[1:], strict=False):
        close(block(x, context, None)[0], hidden[:1])
    step = model(ids[:, :1], past_key_values=plain.past_key_values, output_attentions=True)
    assert step.attentions[0].shape == (2, 2, 1, W)


def test_eager_attention_is_the_fused_one():
    ids = some_ids(2, 30)
    close(hf(wide(), attn_implementation="eager")(ids).logits, hf(wide())(ids).logits)


def with_hf_names(folder, **changes):
    """The folder of a model that transformers has written."""
    hf(wide(**changes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}], ids=["tied", "untied"])
def test_auto_model_gives_hidden_states_and_saves_what_it_read(changes, tmp_path):
    ids, native = some_ids(2, 12), wide(**changes)
    folder = with_hf_names(tmp_path / "lm", **changes)
    model, facts = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(facts.values()), facts
    out = model(ids, output_hidden_states=True)
    close(native.head(out.last_hidden_state), native(ids))
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    step = model(ids[:, :1], past_key_values=out.past_key_values).last_hidden_state
    close(native.head(step), native(torch.cat((ids, ids[:, :1]), 1))[:, -1:])
    assert not model.can_generate() and not any("head" in name for name in model.state_dict())
    model.save_pretrained(tmp_path / "base")
    again, facts = AutoModel.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(facts.values()), facts
    for name, t in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], t), name
    assert AutoModel.from_config(model.config).state_dict().keys() == model.state_dict().keys()
    if changes:
        with pytest.raises(UserError, match="has no output layer.*; load it with AutoModel"):
            load_model(tmp_path / "base")
    else:
        assert torch.equal(load_model(tmp_path / "base")(ids), native(ids))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_head_of_a_quantized_folder_can_be_left_out(bits, tmp_path):
    quantized, ids = quantize_model(wide(), bits, group_size=16), some_ids(2, 12)
    (tmp_path / "q").mkdir()
    save_folder(tmp_path / "q", quantized)
    model = AutoModel.from_pretrained(tmp_path / "q", device_map="auto")
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "q", num_labels=3)
    hidden, scores = model(ids).last_hidden_state, scorer(ids).logits
    close(quantized.head(hidden), quantized(ids))
    model.save_pretrained(tmp_path / "base")
    scorer.save_pretrained(tmp_path / "scorer")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "base")(ids).last_hidden_state, hidden)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer")
    assert torch.equal(again(ids).logits, scores)
    left = {**quantized.quantization["layers"]}
    assert left.pop("head") and model.config.quantization["layers"] == left
    assert torch.equal(load_model(tmp_path / "base").head.weight, quantized.embedding.weight)


def padded(side: str):
    """Two rows of ids, the second shorter, with padding on one side; and their mask."""
    ids, mask = some_ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    if side == "left":
        mask[1, :4] = 0
        ids[1] = ids[1].roll(4)
    else:
        mask[1, 5:] = 0
    return ids, mask


def test_padding_of_either_side_changes_no_hidden_state_and_no_score(tmp_path):
    folder = with_hf_names(tmp_path)
    model = AutoModel.from_pretrained(folder)
    scorer = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert 0.01 < scorer.score.weight.std().item() < 0.03
    alone = [scorer(some_ids(2, 9)[r : r + 1, :n]).logits for r, n in enumerate((9, 5))]
    hidden = [model(some_ids(2, 9)[r : r + 1, :n]).last_hidden_state for r, n in ((0, 9), (1, 5))]
    for side in ("left", "right"):
        ids, mask = padded(side)
        out = model(ids, attention_mask=mask).last_hidden_state
        for r, want in enumerate(hidden):
            close(out[r, mask[r].bool()], want[0])
        scores = scorer(ids, attention_mask=mask).logits
        close(scores, torch.cat(alone))
        embedded = scorer.get_input_embeddings()(ids)
        close(scorer(inputs_embeds=embedded, attention_mask=mask).logits, scores)
    close(scores, scorer.score(out[[0, 1], [8, 4]]), 1e-6)
    scorer.config.pad_token_id = 7  # without a mask, padding is found by its id
    ids = some_ids(2, 9).masked_fill(mask == 0, 7)
    close(scorer(ids).logits, scores)
    ids[0, 8] = ids[1, 4] = 7  # with a mask, what pads may end a text
    ended = scorer(ids, attention_mask=mask).logits
    close(ended, torch.cat([scorer(ids[r : r + 1, :n], attention_mask=mask[r : r + 1, :n]).logits
                            for r, n in enumerate((9, 5))]))  # fmt: skip
    assert not torch.allclose(ended, scores)


def test_a_classifier_learns_and_is_no_language_model(tmp_path):
    folder = with_hf_names(tmp_path / "lm")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    rows = [{"input_ids": row, "labels": row[-1] % 2} for row in some_ids(16, 8).tolist()]
    trainer = Trainer(model=model, args=training(tmp_path / "run"), train_dataset=rows)
    losses = losses_of(trainer)
    assert abs(losses[0] - math.log(2)) < 0.3  # a mean over both micro-batches
    assert losses[-1] < losses[0] - 0.1
    trainer.save_model(tmp_path / "out")
    again, facts = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(facts.values()) and again.config.num_labels == 2
    ids = some_ids(2, 9)
    close(again(ids).logits, model.eval()(ids).logits)
    _, facts = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(facts.values()), facts
    with pytest.raises(UserError, match="is a classifier.*AutoModelForSequenceClassification"):
        load_model(tmp_path / "out")


def test_the_reward_trainer_of_trl_prefers_what_it_is_told(tmp_path):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    tokenizer = TinyMambaHFTokenizer.of(SimpleTokenizer())
    model = AutoModelForSequenceClassification.from_pretrained(
        with_hf_names(tmp_path / "lm"), num_labels=1
    )
    pairs = {"prompt": ["a"] * 8, "chosen": ["good"] * 8, "rejected": ["a bad thing"] * 8}
    args = RewardConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, save_strategy="no", bf16=False, logging_steps=1, learning_rate=1e-2,
        gradient_checkpointing=False, lr_scheduler_type="constant")  # fmt: skip
    trainer = RewardTrainer(model=model, args=args, train_dataset=Dataset.from_dict(pairs),
                            processing_class=tokenizer)  # fmt: skip
    losses = losses_of(trainer)
    assert losses[-1] < 0.5 * losses[0]


def test_features_have_the_width_of_the_model(tmp_path, prepared):
    convert(str(prepared), str(tmp_path / "hf"))
    pipe = pipeline("feature-extraction", model=str(tmp_path / "hf"))
    [features] = pipe("the cat")
    tokens = pipe.tokenizer("the cat", return_tensors="pt")
    close(torch.tensor(features), pipe.model(**tokens).last_hidden_state[0], 1e-5)
    assert len(features[0]) == pipe.model.config.d_model


def test_a_saved_config_names_every_class_of_the_code_beside_it(tmp_path):
    model = hf(wide())
    model.config.auto_map = {"AutoModel": "me/small--hf_integration.TinyMambaHFBaseModel",
                             "AutoModelForMaskedLM": "mine.Masked"}  # fmt: skip
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert written == {**AUTO_MAP, "AutoModelForMaskedLM": "mine.Masked"}
    for name in AUTO_MAP.values():
        assert hasattr(hf_integration, name.removeprefix("hf_integration."))


def test_folders_from_before_these_classes_have_hidden_states_too():
    old = ROOT / "tests/artifacts/hf"
    assert "AutoModel" not in json.loads((old / "config.json").read_text())["auto_map"]
    model, native, ids = AutoModel.from_pretrained(old), load_model(old), some_ids(1, 9, vocab=64)
    close(native.head(model(ids).last_hidden_state), native(ids))


# -------------------------------------------------------------------------------------- devices

PLACES = {"model.embedding": "disk", "model.blocks.0": "cpu", "model.blocks.1": "disk",
          "model.norm": "cpu", "model.head": "disk", "model.dropout": "cpu",
          "model.rotary": "cpu"}  # fmt: skip


def offload_to_cpu(model, folder):
    accelerate.cpu_offload(model, torch.device("cpu"))


def offload_to_disk(model, folder):
    accelerate.disk_offload(model, folder, torch.device("cpu"), offload_buffers=True)


def dispatch(model, folder):
    accelerate.dispatch_model(model, PLACES, "cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("form", ["tied", "untied", "quantized"])
@pytest.mark.parametrize("offload", [offload_to_cpu, offload_to_disk, dispatch])
def test_offloaded_weights_give_the_same_logits_and_texts(offload, form, tmp_path):
    native = wide(n_layer=2, tie_embeddings=form != "untied")
    native = quantize_model(native, 4, group_size=16) if form == "quantized" else native
    model, offloaded, (ids, mask) = hf(native), hf(native), padded("left")
    offload(offloaded, tmp_path / "weights")
    assert offloaded.model.embedding.weight.is_meta
    outs = [m(ids, attention_mask=mask).logits for m in (offloaded, model)]
    assert torch.equal(*outs)
    texts = [m.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
             for m in (offloaded, model)]  # fmt: skip
    assert torch.equal(*texts)


def test_a_quantized_folder_loads_onto_the_devices_of_the_caller(tmp_path):
    quantized, ids = quantize_model(wide(), 4, group_size=16), some_ids(2, 12)
    (tmp_path / "q").mkdir()
    save_folder(tmp_path / "q", quantized)
    want = quantized(ids)
    for how in (
        {"device_map": "auto", "low_cpu_mem_usage": True},
        {"device_map": "cpu", "torch_dtype": "auto"},
        {"device_map": {"": torch.device("cpu")}, "torch_dtype": torch.float32},
        {"device_map": PLACES, "offload_folder": tmp_path / "offloaded"},
    ):  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", **how)
        assert torch.equal(model(ids, use_cache=False).logits, want), how
    with pytest.raises(ValueError, match="torch_dtype: a quantized model computes in float32"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "q", torch_dtype=torch.float16)
    how = {"device_map": PLACES, "offload_folder": tmp_path / "codes", "offload_buffers": True}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", **how)
    assert torch.equal(model(ids, use_cache=False).logits, want)
    with pytest.raises(ValueError, match="cannot pack 4-bit codes that are offloaded"):
        model.save_pretrained(tmp_path / "shards")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len([*(tmp_path / "shards").glob("model-*.safetensors")]) > 1
    again, facts = AutoModelForCausalLM.from_pretrained(
        tmp_path / "shards", output_loading_info=True
    )
    assert not any(facts.values()) and torch.equal(again(ids, use_cache=False).logits, want)


# ------------------------------------------------------------------------------------- training


def test_the_loss_is_shifted_and_divided_as_the_trainer_asks():
    native = wide()
    model, ids = hf(native), some_ids(2, 15)
    labels = ids.clone()
    labels[0, :5] = -100
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    want = native.loss(ids, targets)
    out = model(ids, labels=labels)
    torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=0)
    count = (targets != -100).sum()
    share = model(ids, labels=labels, num_items_in_batch=2 * count).loss
    torch.testing.assert_close(share, want / 2, rtol=1e-5, atol=0)
    by_position = model(ids, labels=labels, shift_labels=targets).loss
    torch.testing.assert_close(by_position, want, rtol=1e-5, atol=0)


def test_checkpointed_activations_give_the_same_gradients():
    plain, frugal = hf(wide()).train(), hf(wide()).train()
    frugal.activation_checkpointing_enable()
    assert frugal.is_activation_checkpointing
    ids = some_ids(2, 20)
    for model in (plain, frugal):
        model(ids, labels=ids).loss.backward()
    for p, q in zip(plain.parameters(), frugal.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_outputs_are_recorded_while_blocks_are_recomputed(reentrant):
    plain, frugal = (hf(wide(), attn_implementation="eager").train() for _ in range(2))
    frugal.activation_checkpointing_enable({"use_reentrant": reentrant})
    frugal.enable_input_require_grads()
    ids = some_ids(2, 20)
    for model in (plain, frugal):
        out = model(ids, labels=ids, output_attentions=True, output_hidden_states=True)
        assert (len(out.attentions), len(out.hidden_states)) == (2, 3)
        out.loss.backward()
    for (name, p), q in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def rows_of(count=32):
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in some_ids(count, 16).tolist()]


def training(folder, **more) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2,
        gradient_accumulation_steps=2, logging_steps=1, report_to=[], save_strategy="no",
        use_cpu=True, seed=1, lr_scheduler_type="constant", **more)  # fmt: skip


def losses_of(trainer) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_their_trainer_trains_it_and_saves_what_loads_again(tmp_path):
    torch.manual_seed(0)
    model = TinyMambaHFModel(config_of(wide()))
    trainer = Trainer(model=model, args=training(tmp_path / "run"), train_dataset=rows_of())
    losses = losses_of(trainer)
    assert abs(losses[0] - math.log(257)) < 0.3  # a mean over the tokens of both micro-batches
    assert losses[-1] < losses[0] - 0.1
    trainer.save_model(tmp_path / "out")
    # Copies: weights mapped from a file are not aligned, and products may round differently.
    again = copy.deepcopy(TinyMambaHFModel.from_pretrained(tmp_path / "out"))
    native = copy.deepcopy(load_model(tmp_path / "out"))
    ids = some_ids(1, 9)
    model.eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(native(ids), model(ids, use_cache=False).logits)


def test_lora_of_hugging_faces_peft_learns_saves_and_merges(tmp_path):
    import peft

    ids = some_ids(1, 9)
    model = hf(wide())
    before = model(ids).logits
    tuned = peft.get_peft_model(model, peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear"))  # fmt: skip
    trainable = {n for n, p in tuned.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in n for n in trainable)
    close(tuned.eval()(ids).logits, before, 0)
    losses = losses_of(Trainer(model=tuned, args=training(tmp_path / "run"),
                               train_dataset=rows_of()))  # fmt: skip
    assert losses[-1] < losses[0]
    changed = [p.any() for n, p in tuned.named_parameters() if "lora_B" in n]
    assert len(changed) == 2 * 8 + 1 and all(changed)  # the angles' and the memory's too
    tuned.eval().save_pretrained(tmp_path / "adapter")
    want = tuned(ids).logits
    assert not torch.equal(want, before)
    again = peft.PeftModel.from_pretrained(hf(wide()), tmp_path / "adapter").eval()
    assert torch.equal(again(ids).logits, want)
    close(again.merge_and_unload()(ids).logits, want)


def test_sft_of_trl_packs_texts_that_do_not_see_each_other(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    seen = []
    tokenizer = TinyMambaHFTokenizer.of(SimpleTokenizer())
    data = Dataset.from_dict({"text": [f"text number {i}" for i in range(24)]})
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, packing=True, padding_free=True, max_length=64, save_strategy="no",
        bf16=False, logging_steps=1, gradient_checkpointing=False)  # fmt: skip
    model = TinyMambaHFModel(config_of(wide()))
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)  # fmt: skip
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    positions = seen[0]["position_ids"]
    assert int((positions == 0).sum()) > 1  # more than one text in a row
    assert all(math.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row)


# ------------------------------------------------------------------------- weights and settings


def test_the_configuration_knows_both_sets_of_names():
    config = TinyMambaConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
                             sliding_window=16, vocab_size=99)  # fmt: skip
    assert (config.d_model, config.n_layer, config.num_heads, config.window_size) == (64, 3, 4, 16)
    again = TinyMambaConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert again.layer_types == ["hybrid_sliding"] * 3
    with pytest.raises(ValueError, match="num_heads: 5 heads do not divide d_model=64"):
        TinyMambaConfig(d_model=64, num_heads=5)
    assert TinyMambaForCausalLM is TinyMambaHFModel


def test_a_configuration_from_before_the_fields_of_the_branch_has_its_first_form(tmp_path):
    artifacts = ROOT / "tests/artifacts"
    places = [artifacts / "hf", artifacts / "bc_conv/folder", artifacts / "k_conv/folder"]
    new, (old, *later) = TinyMambaConfig(), map(TinyMambaConfig.from_pretrained, places)
    assert (new.bc_conv, new.rotating, new.k_conv) == (True, 0.25, True)
    assert {name: getattr(old, name) for name in FIRST_FORM} == FIRST_FORM
    assert [(config.bc_conv, config.k_conv) for config in later] == [(True, False), (True, True)]
    for config in (new, old, *later):
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
        again = TinyMambaConfig.from_pretrained(tmp_path)
        for name in FIRST_FORM:
            assert saved[name] == getattr(config, name) == getattr(again, name)


def test_what_a_file_lacks_has_the_values_of_a_new_model(tmp_path):
    hf(wide()).save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    lost = [n for n in tensors if n.endswith(("dt_bias", "gate.controller.weight"))]
    for name in lost:
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    torch.manual_seed(7)
    model, facts = TinyMambaHFModel.from_pretrained(tmp_path, output_loading_info=True)
    torch.manual_seed(7)
    fresh = TinyMambaModel(tiny_config())
    assert set(facts["missing_keys"]) == set(lost)
    for name, t in model.model.state_dict().items():
        want = fresh.state_dict() if f"model.{name}" in lost else wide().state_dict()
        assert torch.equal(t, want[name]), name


def test_resized_and_tied_embeddings_stay_so_when_saved(tmp_path):
    model, ids = hf(wide()), some_ids(1, 9)
    before = model(ids).logits
    model.resize_token_embeddings(300)
    close(model(ids).logits[..., :257], before)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = TinyMambaHFModel.from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert load_model(tmp_path).config.vocab_size == 300


def test_in_bfloat16_the_decays_stay_float32(tmp_path):
    hf(wide()).save_pretrained(tmp_path)
    model = TinyMambaHFModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        exact = name.endswith(("A_log", "dt_bias", ".D")) or "angle_proj" in name
        assert p.dtype == (torch.float32 if exact else torch.bfloat16), name
    out = model(some_ids(1, 30))
    assert out.past_key_values.layers[0].recurrent_states[0].dtype == torch.float32
    close(out.logits.float(), wide()(some_ids(1, 30)), 0.05)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_folder_loads_and_is_saved_as_small(tmp_path, bits):
    quantized = quantize_model(wide(d_model=64, ssm_head_dim=16), bits=bits, group_size=32)
    (tmp_path / "one").mkdir()
    save_folder(tmp_path / "one", quantized)
    model, ids = TinyMambaHFModel.from_pretrained(tmp_path / "one"), some_ids(1, 9)
    want = quantized(ids)
    assert torch.equal(model(ids, use_cache=False).logits, want)
    model.save_pretrained(tmp_path / "two")
    again = TinyMambaHFModel.from_pretrained(tmp_path / "two")
    assert torch.equal(again(ids, use_cache=False).logits, want)
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("one", "two")]
    assert abs(sizes[0] - sizes[1]) < 4096
    for name, value in (("quantization_config", {"bits": 8}), ("dtype", torch.bfloat16)):
        with pytest.raises(ValueError, match=f"{name}: "):
            TinyMambaHFModel.from_pretrained(tmp_path / "one", **{name: value})
    GenerationConfig(eos_token_id=7).save_pretrained(tmp_path / "one")
    told = TinyMambaHFModel.from_pretrained(
        tmp_path / "one", attn_implementation="eager", dropout=0.3)  # fmt: skip
    assert told.generation_config.eos_token_id == 7
    assert told.name_or_path == str(tmp_path / "one")
    assert (told.config._attn_implementation, told.model.config.dropout) == ("eager", 0.3)
    with pytest.raises(UserError, match="is quantized and cannot be converted back"):
        convert(str(tmp_path / "one"), str(tmp_path / "back.pt"))
    convert(str(tmp_path / "one"), str(tmp_path / "three"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "three")
    assert torch.equal(loaded(ids, use_cache=False).logits, want)


# ------------------------------------------------------------------------------ tokenizer, convert


TEXTS = ["", " ", "def f(x):\n\treturn x", "ünïcödé 漢字 🙂", "a<|endoftext", "\r\n\x00"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A checkpoint beside a trained tokenizer.json."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "text.txt").write_text("the cat and the hat sat on the mat\n" * 200)
    done = run_main(prepare, "--input", folder / "text.txt", "--output_dir", folder,
                    "--vocab_size", 300, cwd=folder)  # fmt: skip
    assert not done.returncode, done.stderr
    model = wide(vocab_size=300, eos_id=EOS)
    path = folder / "model.pt"
    save_checkpoint(path, {"model": model.state_dict(), "config": model.config.to_dict()})
    return path


def test_the_fast_tokenizer_gives_the_ids_of_the_native_one(prepared):
    for native in (SimpleTokenizer(), SimpleTokenizer(prepared.parent / "tokenizer.json")):
        fast = TinyMambaHFTokenizer.of(native)
        assert fast.eos_token_id == fast.pad_token_id == fast.bos_token_id == native.eos_token_id
        for text in TEXTS:
            assert fast(text)["input_ids"] == native.encode(text)
            assert fast.decode(native.encode(text)) == native.decode(native.encode(text))
        assert fast("<|endoftext|>")["input_ids"] == [native.eos_token_id]
        batch = fast(["the", "the cat sat"], padding=True, return_tensors="pt")
        assert batch["attention_mask"][0, 0] == 0
        assert batch["attention_mask"][:, -1].all()
        fast.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
        chat = fast.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
        assert chat == "the<|endoftext|>"


def test_a_saved_tokenizer_is_the_same_by_every_way_to_load_it(tmp_path, prepared):
    native = SimpleTokenizer(prepared.parent / "tokenizer.json")
    TinyMambaHFTokenizer.of(native).save_pretrained(tmp_path)
    for kind in (TinyMambaHFTokenizer, AutoTokenizer):
        fast = kind.from_pretrained(tmp_path)
        for text in TEXTS:
            assert fast.encode(text) == native.encode(text)
            assert fast.decode(native.encode(text)) == native.decode(native.encode(text))
        fast.save_pretrained(tmp_path / "again")
        assert SimpleTokenizer(tmp_path / "again" / "tokenizer.json").sha256 == native.sha256


def test_spare_ids_hold_a_pad_token_that_changes_no_other_id(tmp_path):
    native = SimpleTokenizer()
    assert TinyMambaHFTokenizer.of(native, 257).pad_token_id == EOS_OF_BYTES
    fast = TinyMambaHFTokenizer.of(native, 258)
    assert (fast.eos_token_id, fast.pad_token_id) == (EOS_OF_BYTES, 257)
    fast.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    read = SimpleTokenizer(tmp_path / "again" / "tokenizer.json")
    assert read.sha256 == native.sha256 == onnx_generate.hash_content(read.content)
    for text in (*TEXTS, PAD_TOKEN):
        assert read.encode(text) == native.encode(text)
        assert text == PAD_TOKEN or loaded.encode(text) == native.encode(text)
    for tokenizer in (loaded, TinyMambaHFTokenizer.of(read, 257)):
        assert tokenizer.pad_token_id == 257
    own = byte_tokenizer()
    own.add_special_tokens(["<pad>"])  # as tokenizers of other models have
    (tmp_path / "tokenizer.json").write_text(own.to_str())
    fast = TinyMambaHFTokenizer.of(SimpleTokenizer(tmp_path / "tokenizer.json"), 300)
    assert (fast.pad_token, fast.pad_token_id, len(fast)) == ("<pad>", 257, 258)


@pytest.mark.parametrize("vocabulary", ["full", "spare", "grown"])
def test_a_model_learns_to_end_a_text_if_its_tokenizer_has_a_pad_token(vocabulary, tmp_path):
    """With a full vocabulary eos pads, the collator masks it, and the model says so once."""
    native = wide(vocab_size=257 + (vocabulary == "spare"), eos_id=EOS_OF_BYTES, n_layer=1)
    native.tokenizer = SimpleTokenizer().to_dict()
    save_model(tmp_path / "x.pt", native)
    convert(str(tmp_path / "x.pt"), str(tmp_path / "hf"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").train()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    if vocabulary == "grown":  # as docs/huggingface.md advises
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        model.resize_token_embeddings(len(tokenizer))
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collate([tokenizer(text + tokenizer.eos_token) for text in ("one", "three", "two")])
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(25):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    told = [w for w in said if "the ends of texts (id 256)" in str(w.message)]
    inputs = tokenizer("th", return_tensors="pt")
    text = model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    ended = tokenizer.decode(text) == "three<|endoftext|>"
    assert (ended, len(told)) == ((False, 1) if vocabulary == "full" else (True, 0))


def test_a_list_of_words_is_no_fast_tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("the\ncat\n<|endoftext|>\n")
    with pytest.raises(UserError, match="vocab.txt: matches the longest token"):
        TinyMambaHFTokenizer.of(SimpleTokenizer(tmp_path / "vocab.txt"))


def in_process(*words) -> subprocess.CompletedProcess:
    """hf_integration.py with these words on the command line, in this process."""
    return run_main(main, *words)


FRESH = """
import contextlib, io, multiprocessing, os, sys, torch._dynamo
from transformers import (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoTokenizer, DynamicCache, PreTrainedModel)

def load(folder, saved):
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        sys.exit("code was run without trust")
    except ValueError as e:
        assert "trust_remote_code=True" in str(e), e
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not {"testv2", "hf_integration", "tinymamba"} & {*sys.modules}, "not the folder's code"
    ids, card = tokenizer("the cat", return_tensors="pt")["input_ids"], io.StringIO()
    cache = DynamicCache(config=model.config)
    logits = model(ids, past_key_values=cache).logits.detach()
    text = tokenizer.decode(model.generate(ids, max_new_tokens=9, do_sample=False)[0])
    hidden = AutoModel.from_pretrained(folder, trust_remote_code=True)(ids).last_hidden_state
    torch.testing.assert_close(model.model.head(hidden), logits, rtol=1e-4, atol=1e-4)
    scorer = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    assert scorer(ids).logits.shape == (1, 2)
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    if os.path.exists(folder + "/README.md"):
        with contextlib.redirect_stdout(card):
            exec(open(folder + "/README.md").read().split("```python\\n")[1].split("```")[0], {})
    torch.save({"weights": dict(model.model.state_dict()), "ids": ids, "logits": logits,
                "text": text, "card": card.getvalue()}, saved + "/out.pt")

for folder, saved in (("hf", "again"), ("again", "third")):
    child = multiprocessing.get_context("fork").Process(target=load, args=(folder, saved))
    child.start()
    child.join()
    assert not child.exitcode, folder
"""


@POSIX
def test_a_converted_folder_loads_in_a_fresh_process_and_comes_back(tmp_path, prepared):
    """Each load is in a fork of a process that has imported transformers, and nothing of ours."""
    folder = tmp_path / "hf"
    script = tmp_path / "fresh.py"
    script.write_text(FRESH)
    done = in_process("convert", "--checkpoint", prepared, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    names = {p.name for p in folder.iterdir()}
    assert names >= {"model.safetensors", "config.json", "generation_config.json", "README.md",
                     "tokenizer.json", "tokenizer_config.json", "hf_integration.py"}  # fmt: skip
    native = load_model(prepared)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"),
           "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=env,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for target in ("again", "third"):
        out = torch.load(tmp_path / target / "out.pt", weights_only=True)
        for name, t in native.state_dict().items():
            assert torch.equal(out["weights"][name], t)
        logits, _ = native.advance(out["ids"], native.init_state(1))
        close(out["logits"], logits, 1e-6)  # a product rounds by where in memory its weights lie
        assert out["text"].startswith("the cat")
        assert ("Once" in out["card"]) == (target == "again"), "the snippet of the card"
    assert in_process("convert", "--checkpoint", tmp_path / "again", "--output_dir",
                      tmp_path / "back.pt").returncode == 0  # fmt: skip
    back = load_checkpoint(tmp_path / "back.pt")
    assert all(torch.equal(back["model"][n], t) for n, t in native.state_dict().items())
    assert torch.equal(load_model(folder)(out["ids"]), native(out["ids"]))


def test_nothing_is_overwritten_and_bad_input_is_one_line(tmp_path, prepared):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("a\nb\n")
    new = ["--output_dir", tmp_path / "x"]
    for words, problem in (
        (["--checkpoint", prepared, "--output_dir", tmp_path / "there"], "there holds config.json"),
        (["--checkpoint", prepared, "--output_dir", tmp_path / "file", "--force"], "is a file"),
        (["--checkpoint", prepared, "--output_dir", ROOT, "--force"], "holds the code itself"),
        (["--checkpoint", prepared, "--output_dir", ROOT / "tinymamba", "--force"],
         "holds the code itself"),
        (["--checkpoint", tmp_path / "no.pt", *new], "no.pt: no such checkpoint"),
        (["--checkpoint", prepared, *new, "--tokenizer_file", tmp_path / "words" / "vocab.txt"],
         "matches the longest"),
        (["--checkpoint", prepared], "--output_dir"),
        (["--checkpoint", prepared, *new, "--tokenizer", "x"], "--tokenizer: unknown flag"),
    ):  # fmt: skip
        assert_refused(in_process("convert", *words), problem)
    assert (tmp_path / "there" / "config.json").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "x").exists()


def test_force_replaces_a_models_files_and_no_other(tmp_path, prepared, monkeypatch):
    for path in (prepared, prepared.with_name("tokenizer.json")):
        shutil.copy(path, tmp_path)
    (tmp_path / "thesis.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for checkpoint in ("model.pt", "."):
        assert in_process("convert", "--checkpoint", checkpoint, "--output_dir", ".",
                          "--force").returncode == 0  # fmt: skip
        assert (tmp_path / "thesis.txt").read_text() == "mine"
        load_model("model.pt")
        model = TinyMambaHFModel.from_pretrained(tmp_path)
        GenerationConfig(temperature=0.3, do_sample=True).save_pretrained(tmp_path)
        (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    convert(".", "tuned")
    assert torch.equal(model.model.embedding.weight, load_model("tuned").embedding.weight)
    again = GenerationConfig.from_pretrained("tuned")
    assert (again.temperature, again.eos_token_id) == (0.3, EOS)
    assert TinyMambaHFTokenizer.from_pretrained("tuned").chat_template == "{{ messages }}"


def test_a_tokenizer_that_ends_texts_elsewhere_is_rejected(tmp_path, prepared):
    native = wide(vocab_size=300, eos_id=5)
    state = {"model": native.state_dict(), "config": native.config.to_dict()}
    save_checkpoint(tmp_path / "other.pt", state)
    with pytest.raises(UserError, match="ends a text with id 0, but the model expects 5"):
        convert(str(tmp_path / "other.pt"), str(tmp_path / "x"),
                str(prepared.parent / "tokenizer.json"))  # fmt: skip


def test_a_model_in_several_files_is_a_native_one_too(tmp_path):
    model, ids = hf(wide()), some_ids(1, 9)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("model-*.safetensors")]) > 1
    assert torch.equal(load_model(tmp_path)(ids), wide()(ids))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index.json: cannot be read"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="push_to_hub: would upload the model without its code"):
        model.save_pretrained(tmp_path, push_to_hub=True)


def test_a_flipped_bit_in_a_converted_folder_is_seen_by_the_native_reader(tmp_path, prepared):
    convert(str(prepared), str(tmp_path / "hf"))
    path = tmp_path / "hf" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        load_model(tmp_path / "hf")


# ------------------------------------------------------------------------------------- push


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload needs."""

    TOKEN = "hf_secretsecret"
    log: list = []

    @property
    def here(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
        self.log.append((self.path, body))
        if self.headers.get("Authorization") != f"Bearer {self.TOKEN}":
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        elif self.path == "/api/repos/create":
            self.answer(200, {"url": f"{self.here}/me/small", "name": "me/small"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer(200, {"files": [{"path": f["path"], "uploadMode": "regular",
                                         "shouldIgnore": False} for f in files]})  # fmt: skip
        elif "/commit/" in self.path:
            self.answer(200, {"commitUrl": f"{self.here}/me/small/commit/1", "success": True,
                              "commitOid": "1" * 40})  # fmt: skip
        else:
            self.answer(200, {})

    def do_GET(self):
        self.log.append((self.path, b""))
        self.answer(200, {"id": "me/small", "siblings": [], "sha": "1" * 40})

    def log_message(self, *args):
        return


@pytest.fixture
def hub():
    Hub.log = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def push(folder, endpoint, *more):
    return run_script(
        "hf_integration.py", "push", "--model_dir", folder, "--repo_id", "me/small", *more,
        cwd=folder.parent,
        env={"HF_ENDPOINT": endpoint, "HF_TOKEN": Hub.TOKEN, "HF_HUB_OFFLINE": "0"})  # fmt: skip


def test_push_makes_a_repository_and_one_commit_and_tells_no_token(
    tmp_path, prepared, hub, monkeypatch
):
    convert(str(prepared), str(tmp_path / "hf"))
    done = push(tmp_path / "hf", hub, "--private", "--commit_message", "First words")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub}/me/small/commit/1"
    posted = dict(Hub.log)
    assert json.loads(posted["/api/repos/create"])["visibility"] == "private"
    [commit] = [body for path, body in Hub.log if "/commit/" in path]
    header, *files = [json.loads(line)["value"] for line in commit.splitlines()]
    assert header["summary"] == "First words"
    assert {f["path"] for f in files} == {p.name for p in (tmp_path / "hf").iterdir()}

    command = ["push", "--model_dir", tmp_path / "hf", "--repo_id", "me/small"]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub)
    refused = in_process(*command, "--token", "hf_wrongwrong")
    assert_refused(refused, "error: --repo_id: the hub rejected me/small (401)")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    silent = in_process(*command, "--token", Hub.TOKEN)
    assert_refused(silent, "cannot be reached (ConnectError)")
    for said in (done, refused, silent):
        assert "secret" not in said.stdout + said.stderr
        assert "wrongwrong" not in said.stdout + said.stderr


def test_push_sends_no_folder_that_would_not_load(tmp_path, prepared, hub):
    convert(str(prepared), str(tmp_path / "hf"))
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"broken")
    words = ["push", "--model_dir", tmp_path / "hf", "--repo_id", "me/small"]
    assert_refused(in_process(*words), "model.safetensors: cannot be read")
    assert_refused(in_process(*words, "--repo_id", "no name"), "model.safetensors")
    assert_refused(in_process(*words, "--token", "hf_secr\u00e9t"), "--token: has a character")
    (tmp_path / "hf" / "config.json").unlink()
    assert_refused(in_process(*words), "has no config.json")
    assert not Hub.log


# ------------------------------------------------------------------------------ other programs


@pytest.mark.slow
def test_transformers_serve_answers_from_a_converted_folder(tmp_path, prepared):
    convert(str(prepared), str(tmp_path / "hf"))
    port = free_port()
    command = [Path(sys.executable).with_name("transformers"), "serve", tmp_path / "hf",
               "--trust-remote-code", "--device", "cpu", "--port", str(port)]  # fmt: skip
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    server = subprocess.Popen(command, env=env, cwd=tmp_path)
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none",
                           max_retries=90) as client:  # fmt: skip
            got = client.completions.create(
                model=str(tmp_path / "hf"), prompt="the cat", max_tokens=8, temperature=0
            )
    finally:
        server.terminate()
        server.wait()
    tokenizer = SimpleTokenizer(prepared.parent / "tokenizer.json")
    ids = torch.tensor([tokenizer.encode("the cat")])
    want = generate(load_model(prepared), ids, 8, temperature=0)[0, ids.shape[1] :]
    assert got.choices[0].text == tokenizer.decode(want)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
{rest}
"""


def test_lm_eval_has_the_likelihoods_of_the_native_model(tmp_path, prepared):
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    native = load_model(prepared)
    tokenizer = SimpleTokenizer(prepared.parent / "tokenizer.json")
    pairs = [("the cat", " sat on the mat"), ("the", " hat"), ("", "the cat and the hat")]
    want = []
    for context, more in pairs:
        first = tokenizer.encode(context) or [tokenizer.eos_token_id]
        ids = torch.tensor([first + tokenizer.encode(more)])
        logprobs = native(ids)[0, len(first) - 1 : -1].log_softmax(-1)
        want.append(logprobs.gather(-1, ids[0, len(first) :, None]).sum().item())
    convert(str(prepared), str(tmp_path / "hf"))
    lm = HFLM(pretrained=str(tmp_path / "hf"), batch_size=2, device="cpu", dtype="float32")
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    got = [value for value, _ in lm.loglikelihood(asked)]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-5, atol=1e-4)

    quantized = quantize_model(native, 8)  # as small a change as rounding to bytes is
    quantized.tokenizer = tokenizer.to_dict()
    (tmp_path / "int8").mkdir()
    save_folder(tmp_path / "int8", quantized)
    convert(str(tmp_path / "int8"), str(tmp_path / "hf8"))
    small = HFLM(pretrained=str(tmp_path / "hf8"), batch_size=2, device="cpu")
    got = [value for value, _ in small.loglikelihood(asked)]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=0.05, atol=0.5)

    rows = [{"question": q, "choices": [a, " dog", " tree"], "answer": 0} for q, a in pairs[:2]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.yaml").write_text(
        TASK.format(
            name="mine",
            file=tmp_path / "rows.jsonl",
            rest="output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer",
        )
    )
    command = ["--benchmark_type", "lm_eval", "--tinymamba_checkpoint", prepared,
               "--include_path", tmp_path]  # fmt: skip
    done = run_main(benchmark.main, *command, "--tasks", "mine", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "benchmark_results" / "results.json").read_text())["rows"]
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    again = simple_evaluate(lm, tasks=["mine"], task_manager=manager, bootstrap_iters=0)
    for row in written:
        assert row["value"] == again["results"]["mine"][f"{row['metric']},{row['filter']}"]
    assert {row["metric"] for row in written} >= {"acc", "acc_norm"}
    done = run_main(benchmark.main, *command, "--tasks", "no_such", "--output_dir",
                    tmp_path / "none")  # fmt: skip
    assert_refused(done, "tasks: no_such: no such task")
