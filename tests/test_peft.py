"""Adapters: LoRA against its formula and Hugging Face's package, prefixes, states, files, runs."""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from helpers import (
    FIRST_FORM,
    POSIX,
    ROOT,
    adapted,
    assert_refused,
    brief_flags,
    call,
    close,
    files_below,
    flags,
    free_copy,
    run_main,
    run_script,
    run_two_ranks,
    some_ids,
    stir,
    tiny_config,
    wide,
    write_tokens,
)
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call

import peft
import streaming
from peft import (
    AdapterConfig,
    LoRALinear,
    adapter_tensors,
    apply_lora_to_model,
    apply_prefix_tuning_to_model,
    apply_state_offset_to_model,
    attach,
    get_trainable_parameters,
    load_adapter,
    merge_adapter,
    plain_weights,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from quantize import quantize_model
from streaming import StreamingConfig, StreamingServer
from testv2 import TinyMambaModel, load_model
from tinymamba.checkpoint import load_checkpoint, save_checkpoint, save_model
from tinymamba.cli import UserError
from tinymamba.tokenizer import EOS_TOKEN, SimpleTokenizer, byte_alphabet

IDS = some_ids(3, 37)
PROJECTIONS = [
    "ssm.in_proj",
    "ssm.out_proj",
    "attention.qkv",
    "attention.out_proj",
    "mlp.in_proj",
    "mlp.out_proj",
]
KINDS = [
    AdapterConfig(),
    AdapterConfig(use_rslora=True),
    AdapterConfig(use_dora=True),
    AdapterConfig("prefix", prefix_length=5),
    AdapterConfig("state_offset"),
]
EVERY = pytest.mark.parametrize("config", KINDS, ids=["lora", "rslora", "dora", "prefix", "offset"])


# ------------------------------------------------------------------------------------- models


@EVERY
def test_at_first_nothing_changes_and_only_the_adapter_learns(config):
    model = adapted(config, stirred=False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    exact = not config.use_dora  # whose lengths are divided by themselves
    got, want = model(IDS), wide()(IDS)
    assert torch.equal(got, want) if exact else (got - want).abs().max() < 1e-5
    optimizer = torch.optim.AdamW(get_trainable_parameters(model), 0.01)
    for _ in range(2):
        model.loss(IDS, IDS).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        changed = not torch.equal(p, before[name])
        assert changed == (".adapters." in name), name
    assert model.loss(IDS, IDS) < wide().loss(IDS, IDS)


@EVERY
def test_gradients_are_those_of_finite_differences(config):
    model = adapted(config, double=True).double()
    model.config.min_decay = 0.0  # the gradient of a step cut off at 0 is not its slope
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    model.loss(IDS[:1, :9], IDS[:1, 1:10]).backward()
    for name, p in named.items():
        if name.endswith("magnitude") or config.use_dora:
            continue  # DoRA leaves the gradient through the rows' own length out, on purpose
        direction = torch.randn(p.shape, dtype=p.dtype)
        ends = [
            functional_call(
                model, {name: p.detach() + step * direction}, (IDS[:1, :9], IDS[:1, 1:10])
            ).item()
            for step in (1e-5, -1e-5)
        ]
        slope = (ends[0] - ends[1]) / 2e-5
        assert abs(slope - (p.grad * direction).sum().item()) <= 1e-4 * max(abs(slope), 1e-2), name


@EVERY
@pytest.mark.parametrize("changes", [{}, {"gate": "top_k", **FIRST_FORM}], ids=str)
def test_text_in_chunks_gives_the_logits_of_one_pass(config, changes):
    model = adapted(config, **changes)
    whole, state, chunks, at = model(IDS), model.init_state(3), [], 0
    for size in (1, 16, 3, 1, 9, 7):
        logits, state = model.advance(IDS[:, at : at + size], state)
        chunks.append(logits)
        at += size
    close(torch.cat(chunks, 1), whole, 1e-4)
    mask = torch.ones(3, 41, dtype=torch.int64)
    mask[:, :4] = 0
    padded = model(torch.cat((IDS[:, :4], IDS), 1), attention_mask=mask)
    close(padded[:, 4:], whole, 1e-4)


def test_lora_is_its_formula():
    model, base = (
        m.double()
        for m in (
            adapted(AdapterConfig(lora_rank=3, lora_alpha=6.0), double=True),
            free_copy(wide(double=True)),
        )
    )
    weights = dict(base.state_dict())
    for name, t in adapter_tensors(model, "default").items():
        place = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        if "lora_B" in name:
            A = adapter_tensors(model, "default")[name.replace("lora_B", "lora_A")]
            weights[f"{place}.weight"] = weights[f"{place}.weight"] + 2.0 * t @ A
    base.load_state_dict(weights)
    close(model(IDS), base(IDS), 1e-10)


def test_dora_and_rslora_are_their_formulas():
    for config in (
        AdapterConfig(lora_rank=4, use_rslora=True),
        AdapterConfig(lora_rank=4, use_dora=True),
    ):
        layer = adapted(config).blocks[0].mlp.in_proj
        W, lora, x = layer.base_layer.weight, layer.adapters["default"], torch.randn(2, 5, 32)
        V = W + (16 / 2 if config.use_rslora else 16 / 4) * lora.B @ lora.A
        if config.use_dora:
            V = lora.magnitude[:, None] * V / V.pow(2).sum(1, keepdim=True).sqrt()
        close(layer(x), nn.functional.linear(x, V, layer.bias), 1e-5)
        close(layer.weight, V, 1e-6)


def test_dropout_is_of_the_update_alone():
    model = adapted(AdapterConfig(lora_dropout=0.5), stirred=False).train()
    assert torch.equal(model(IDS), wide()(IDS))
    stir(model, "default")
    assert not torch.equal(model(IDS), model(IDS))
    assert torch.equal(model.eval()(IDS), model(IDS))


def test_the_default_targets_are_the_projections_of_the_branches():
    model = adapted(AdapterConfig())
    found = [n for n, m in model.named_modules() if isinstance(m, LoRALinear)]
    assert sorted(found) == sorted(f"blocks.{i}.{p}" for i in range(2) for p in PROJECTIONS)
    low = attach(TinyMambaModel(tiny_config(low_rank=4)), AdapterConfig())
    assert sum(isinstance(m, LoRALinear) for m in low.modules()) == 24


@pytest.mark.parametrize(
    "patterns, count",
    [
        (["in_proj"], 4),
        (["mlp.in_proj", "qkv"], 4),
        (["blocks.1.mlp.out_proj"], 1),
        (["head"], 1),
        ([r"blocks\.0\..*_proj"], 6),
        (["controller", "angle_proj"], 4),
    ],
)
def test_any_linear_layer_by_name(patterns, count):
    model = apply_lora_to_model(free_copy(wide()), target_modules=patterns)
    assert sum(isinstance(m, LoRALinear) for m in model.modules()) == count
    assert torch.equal(model.eval()(IDS), wide()(IDS))
    stir(model, "default")
    out = model(IDS)
    assert not torch.equal(out, wide()(IDS))
    out.sum().backward()
    assert all(p.grad is not None for p in get_trainable_parameters(model))


def test_merging_changes_nothing_and_can_be_undone_bit_for_bit():
    for config in KINDS[:3]:
        model = attach(TinyMambaModel(tiny_config()), config).eval()
        stir(model, "default")
        precise = copy.deepcopy(model).double()
        want = precise(IDS)
        merge_adapter(precise)
        assert (precise(IDS) - want).abs().max() <= 1e-12
        want, before = model(IDS), plain_weights(copy.deepcopy(model))
        merge_adapter(model)
        assert (model(IDS) - want).abs().max() <= 1e-4  # rounding
        plain = TinyMambaModel(tiny_config()).eval()
        plain.load_state_dict(plain_weights(model))
        assert torch.equal(plain(IDS), model(IDS))
        with pytest.raises(UserError, match="is merged"):
            merge_adapter(model)
        with pytest.raises(UserError, match="is merged"):
            set_adapter(model, None)
        unmerge_adapter(model)
        assert all(torch.equal(t, before[n]) for n, t in plain_weights(model).items())
        assert torch.equal(model(IDS), want)
        with pytest.raises(UserError, match="none is merged"):
            unmerge_adapter(model)


def test_what_cannot_be_merged():
    for config in KINDS[3:]:
        with pytest.raises(UserError, match="cannot be merged"):
            merge_adapter(adapted(config))
    with pytest.raises(UserError, match="shares its weight with the embedding"):
        merge_adapter(adapted(AdapterConfig(target_modules=["head"])))
    merge_adapter(adapted(AdapterConfig(target_modules=["head"]), tie_embeddings=False))


def test_each_row_may_have_an_adapter_of_its_own():
    model, alone = free_copy(wide()), {None: wide()(IDS)}
    for i, config in enumerate(KINDS):
        attach(model, config, f"a{i}")
        stir(model, f"a{i}", seed=i)
    for i in range(len(KINDS)):
        set_adapter(model, f"a{i}")
        alone[f"a{i}"] = model(IDS)
        for other in alone:
            assert other == f"a{i}" or not torch.equal(alone[other], alone[f"a{i}"])
    for names in (["a0", None, "a3"], ["a4", "a2", "a2"], [None] * 3, ["a3", "a4", "a1"]):
        set_adapter(model, names)
        got = model(IDS)
        state = model.init_state(3)
        read, state = model.advance(IDS[:, :20], state)
        more, _ = model.advance(IDS[:, 20:], state)
        for row, name in enumerate(names):
            close(got[row], alone[name][row], 1e-5)
            close(torch.cat((read, more), 1)[row], alone[name][row], 1e-4)
    set_adapter(model, None)
    assert torch.equal(model(IDS), alone[None])
    with pytest.raises(UserError, match="there is no 'b'"):
        set_adapter(model, ["a0", "b", None])


def test_bad_adapters_are_rejected():
    for wrong, word in (
        ({"lora_rank": 0}, "lora_rank"),
        ({"lora_rank": -1}, "lora_rank"),
        ({"lora_alpha": 0.0}, "lora_alpha"),
        ({"lora_rank": 1.5}, "lora_rank"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"method": "x"}, "method"),
        ({"prefix_length": 0}, "prefix_length"),
        ({"method": "full"}, "not an adapter"),
        ({"target_modules": "qkv"}, "target_modules"),
        ({"target_modules": ["nowhere"]}, "there are attention.memory.token_proj"),
        ({"target_modules": ["("]}, "not a regular expression"),
    ):
        model = free_copy(wide())
        with pytest.raises(UserError, match=word):
            attach(model, AdapterConfig(**wrong))
        assert not any(isinstance(m, LoRALinear) for m in model.modules())
    model = adapted(AdapterConfig())
    for name in ("default", "a.b", "", 5):
        with pytest.raises(UserError, match="adapter"):
            attach(model, AdapterConfig(), name)


def test_a_prefix_is_seen_alike_at_every_place():
    """Far from the start, only keys and values without a position can do what they do near it."""
    model = free_copy(wide())
    apply_prefix_tuning_to_model(model, 4)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.prefix.adapters["default"].values.normal_()
    near, far = model.init_state(1), model.init_state(1)
    far.position += 10_000_000
    far.document_start += 10_000_000
    ids = IDS[:1]
    close(model.advance(ids, far)[0], model.advance(ids, near)[0], 1e-4)


# -------------------------------------------------------------------------------------- files


@EVERY
def test_an_adapter_survives_its_files(config, tmp_path):
    model = adapted(config)
    save_adapter(model, tmp_path / "a", base="x.pt")
    again = free_copy(wide()).requires_grad_(False)
    load_adapter(again, tmp_path / "a", "other")
    assert torch.equal(again(IDS), model(IDS))
    assert not get_trainable_parameters(again)
    names = set(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    assert names == set(adapter_tensors(model, "default"))
    if config.method == "lora":
        about = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert about["peft_type"] == "LORA" and about["base_model_name_or_path"] == "x.pt"


def to_config(config: AdapterConfig):
    return peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        target_modules=["in_proj", "out_proj", "qkv"],
    )


@pytest.mark.parametrize("config", KINDS[:3], ids=["lora", "rslora", "dora"])
def test_adapters_go_to_hugging_face_and_come_from_there(config, tmp_path):
    ours = adapted(config)
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(free_copy(wide()), tmp_path / "ours").eval()
    close(theirs(IDS), ours(IDS), 1e-5)
    made = peft.get_peft_model(free_copy(wide()), to_config(config)).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_" in name:
                p += 0.2 * torch.randn_like(p)
    made.save_pretrained(tmp_path / "theirs")
    model = free_copy(wide())
    load_adapter(model, tmp_path / "theirs")
    close(model(IDS), made(IDS), 1e-5)


def damage(folder: Path, change) -> None:
    """Write the adapter's files again after `change(config, tensors)`."""
    path, about = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    config, tensors = json.loads(about.read_text()), load_file(path)
    change(config, tensors)
    about.write_text(json.dumps(config))
    save_file(tensors, path)


FIRST = "base_model.model.blocks.0.mlp.in_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c, t: c.update(peft_type="IA3"), "IA3"),
        (lambda c, t: c.update(modules_to_save=["head"]), "modules_to_save"),
        (lambda c, t: c.update(bias="all"), "bias"),
        (lambda c, t: c.update(init_lora_weights="pissa"), "init_lora_weights"),
        (lambda c, t: c.update(r=0), "lora_rank"),
        (lambda c, t: c.update(r=4), "ranks"),
        (lambda c, t: c.pop("r"), "is not an adapter config"),
        (lambda c, t: t.pop(FIRST), "other tensors"),
        (lambda c, t: t.update({FIRST: t[FIRST][:, :-1].clone()}), "other tensors"),
        (lambda c, t: t.update({FIRST: t[FIRST].int()}), "other tensors"),
        (lambda c, t: t.update({FIRST: t[FIRST] * torch.nan}), "not finite"),
        (lambda c, t: t.update({FIRST.replace("0", "7"): t[FIRST].clone()}), "lacks"),
        (lambda c, t: t.clear(), "lacks"),
    ],
)
def test_files_that_do_not_fit_are_rejected_and_leave_the_model_alone(tmp_path, change, words):
    save_adapter(adapted(AdapterConfig()), tmp_path)
    damage(tmp_path, change)
    model = free_copy(wide())
    with pytest.raises(UserError, match=words):
        load_adapter(model, tmp_path)
    assert torch.equal(model(IDS), wide()(IDS)) and model.adapter_state.active is None
    assert all(p.requires_grad for p in model.parameters() if p.is_leaf)
    load_good = tmp_path / "good"
    save_adapter(adapted(AdapterConfig()), load_good)
    load_adapter(model, load_good)


@pytest.mark.parametrize("method", ["lora", "prefix", "state_offset"])
@pytest.mark.parametrize("trained_on", ["float", "int8"])
def test_an_adapter_fits_the_other_form_of_its_base_if_forced(trained_on, method, tmp_path):
    forms = {"float": lambda: free_copy(wide()), "int8": lambda: quantize_model(wide(), 8)}
    trained = attach(forms.pop(trained_on)(), AdapterConfig(method))
    stir(trained, "default")
    save_adapter(trained, tmp_path)
    (other,) = forms.values()
    model, want = other(), attach(other(), AdapterConfig(method))
    with pytest.raises(UserError, match="another base model; .* or pass --force"):
        load_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="adapter_model.safetensors: belongs to another base"):
        load_adapter(model, tmp_path, force=True)
    stored = adapter_tensors(trained, "default")
    with torch.no_grad():
        for name, tensor in adapter_tensors(want, "default").items():
            tensor.copy_(stored[name])
    assert torch.equal(model.eval()(IDS), want.eval()(IDS))
    assert not torch.equal(model(IDS), other().eval()(IDS))


def test_scripts_take_an_adapter_of_another_base_if_forced(tmp_path):
    base = free_copy(wide())
    base.tokenizer = SimpleTokenizer().to_dict()
    save_model(tmp_path / "float.pt", base)
    save_adapter(attach(quantize_model(wide(), 8), AdapterConfig()), tmp_path)
    given = ["--checkpoint", tmp_path / "float.pt", "--adapter", tmp_path]
    merging = [*given, "--merge", "--output_dir", tmp_path / "merged"]
    for run, command in ((peft.main, merging), (streaming.main, [*given, "--max_tokens", 1])):
        assert_refused(run_main(run, *command), "belongs to another base model")
        done = run_main(run, *command, "--force")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("belongs to another base model; its effect may differ") == 1
    merged = load_model(tmp_path / "merged" / "merged.pt")
    assert torch.equal(merged(IDS), wide()(IDS))  # an adapter that was not trained changes nothing


def test_damaged_files_and_foreign_bases_are_rejected(tmp_path):
    save_adapter(adapted(AdapterConfig()), tmp_path)
    other = free_copy(wide())
    with torch.no_grad():
        other.norm.weight[0] += 1e-3
    with pytest.raises(UserError, match="another base"):
        load_adapter(other, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    for damaged in (
        whole[:-9],
        whole[:40],
        b"",
        whole[:200] + b"{" + whole[201:],
        whole[:-1] + bytes([whole[-1] ^ 64]),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="adapter_model"):
            load_adapter(free_copy(wide()), tmp_path)
    path.write_bytes(whole)
    for text in ("", "[]", "{", "[" * 100_000, '{"tinymamba_method": "x"}', "null"):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match="adapter_config|method"):
            load_adapter(free_copy(wide()), tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load_adapter(free_copy(wide()), tmp_path / "nowhere")


# --------------------------------------------------------------------------------------- runs


def save_wide(path: Path) -> None:
    """Write a checkpoint of the model `wide()`."""
    model = wide()
    save_checkpoint(path, {"model": model.state_dict(), "config": model.config.to_dict()})


@pytest.fixture
def based(place):
    """A folder with data and a checkpoint of a base model."""
    save_wide(place / "tinymamba_model_latest.pt")
    return place


SHORT = flags(
    steps=4, batch_size=2, block_size=16, validation_steps=1, log_interval=1, generation_length=5
)


def finetune(*words) -> subprocess.CompletedProcess:
    """peft.py with these words on the command line, in this process and folder."""
    return run_main(peft.main, "--checkpoint", "./tinymamba_model_latest.pt", *words)


def test_the_commands_of_the_readme(based):
    lora = ["--method", "lora", "--lora_rank", 8, "--lora_alpha", "16.0"]
    command = ["--checkpoint", "./tinymamba_model_latest.pt", *lora, "--output_dir", "./lora_model"]
    done = run_script("peft.py", *command, *SHORT, cwd=based)
    assert done.returncode == 0, done.stderr
    assert "parameters are trained" in done.stdout and "validation at step 4" in done.stdout
    prefix = ["--method", "prefix", "--prefix_length", 16]
    done = finetune(*prefix, "--output_dir", "./prefix_model", *SHORT)
    assert done.returncode == 0, done.stderr
    for folder in ("lora_model", "prefix_model"):
        model = load_model("tinymamba_model_latest.pt")
        load_adapter(model, folder)
        best = load_checkpoint(f"{folder}/adapter_best.pt")["model"]
        assert best and all(torch.equal(model.state_dict()[n], t) for n, t in best.items())
        assert all(".adapters." in n for n in best)
        assert not torch.equal(model(IDS), wide()(IDS))
        assert list((based / folder / "logs").rglob("events.out.tfevents.*"))
        assert list((based / folder / "logs").rglob("loss_curve.png"))
    again = finetune(*command[2:], *SHORT)
    assert_refused(again, "lora_model", "--force")


def test_a_resumed_run_is_the_run_that_was_never_stopped(based):
    common = [
        *SHORT[2:],
        *flags(lora_dropout=0.1, checkpoint_interval=2, seed=3, warmup_steps=0, min_lr_ratio=1),
        *flags(amp_dtype="float32"),
    ]
    assert finetune("--output_dir", "whole", "--steps", 6, *common).returncode == 0
    assert finetune("--output_dir", "cut", "--steps", 3, *common).returncode == 0
    refused = finetune("--output_dir", "cut", "--resume", "--lora_rank", 4, "--steps", 6)
    assert_refused(refused, "lora_rank", "changed")
    done = finetune("--output_dir", "cut", "--resume", "--steps", 6)
    assert done.returncode == 0, done.stderr
    whole, cut = (load_checkpoint(f"{name}/adapter_latest.pt") for name in ("whole", "cut"))
    assert whole["global_step"] == cut["global_step"] == 6
    assert all(torch.equal(t, cut["model"][n]) for n, t in whole["model"].items())
    held = [t for kept in cut["optimizer"]["state"].values() for t in kept.values()]
    assert sum(t.numel() for t in held) <= 2 * sum(t.numel() for t in cut["model"].values()) + 99
    resumed = call("--resume", "--checkpoint_path", "cut/adapter_latest.pt")
    assert_refused(resumed, "no run")
    with pytest.raises(UserError, match="an adapter only"):
        load_model("cut/adapter_latest.pt")


def test_merged_and_full_models_are_plain_checkpoints(based):
    done = finetune("--output_dir", "a", "--merge", *SHORT)
    assert done.returncode == 0, done.stderr
    model = load_model("tinymamba_model_latest.pt")
    load_adapter(model, "a")
    close(load_model("a/merged.pt")(IDS), model(IDS), 1e-5)
    done = finetune("--adapter", "a", "--merge", "--output_dir", "b")
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_model("b/merged.pt")(IDS), load_model("a/merged.pt")(IDS))
    assert_refused(finetune("--adapter", "a", "--merge", "--output_dir", "b"), "--force")
    assert_refused(call("--resume", "--checkpoint_path", "b/merged.pt"), "no run")
    done = finetune("--method", "full", "--output_dir", "f", *SHORT)
    assert done.returncode == 0, done.stderr
    full, base = load_model("f/tinymamba_model_latest.pt"), dict(wide().named_parameters())
    changed = [n for n, p in full.named_parameters() if not torch.equal(p, base[n])]
    assert len(changed) > len(list(full.parameters())) // 2


@pytest.mark.parametrize(
    "words, fragments",
    [
        (["--lora_rank", 0], ["lora_rank", "0"]),
        (["--lora_rank", "x"], ["--lora_rank"]),
        (["--checkpoint", "nowhere.pt"], ["nowhere.pt"]),
        (["--train_data", "nowhere.bin"], ["nowhere.bin"]),
        (["--target_modules", "nowhere"], ["target_modules", "ssm.in_proj"]),
        (["--method", "magic"], ["--method"]),
        (["--method", "prefix", "--merge"], ["--merge"]),
        (["--optimizer", "muon"], ["optimizer"]),
        (["--adapter", "nowhere"], ["--adapter"]),
        (["--adapter", "nowhere", "--merge"], ["nowhere"]),
        (["--d_model", 64], ["--d_model"]),
        (["--resume"], ["adapter_latest.pt"]),
        (["--lr", "-1"], ["lr"]),
    ],
)
def test_bad_commands_are_rejected_in_one_line_and_change_nothing(based, words, fragments):
    before = files_below(based)
    assert_refused(finetune("--output_dir", "out", *words), *fragments)
    assert files_below(based) == before


def test_two_processes_train_one_adapter(based):
    words = ["--checkpoint", "tinymamba_model_latest.pt", "--output_dir", "two", *SHORT]
    run_two_ranks(*words, "--generate_samples", "false", script="peft.py")
    load_adapter(load_model("tinymamba_model_latest.pt"), "two")


def test_an_adapter_learns_what_the_base_does_not_know(place):
    assert call(*brief_flags(max_steps=60, lr=5e-3, amp_dtype="bfloat16")).returncode == 0
    text = "".join(f"{b} minus {a} = {b - a};\n" for a in range(40) for b in range(40))
    write_tokens(Path("train2.bin"), text[:18_000])
    write_tokens(Path("val2.bin"), text[18_000:])
    ids = torch.tensor([list(text[18_000:20_001].encode())])
    model = load_model("tinymamba_model_latest.pt")
    before = model.loss(ids[:, :-1], ids[:, 1:]).item()
    size = flags(steps=60, block_size=32, batch_size=4, generate_samples=False)
    done = finetune("--train_data", "train2.bin", "--val_data", "val2.bin", *size)
    assert done.returncode == 0, done.stderr
    load_adapter(model, "adapter")
    assert model.loss(ids[:, :-1], ids[:, 1:]).item() < 0.8 * before


# ---------------------------------------------------------------------------------- streaming


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """An adapter of each kind."""
    torch.manual_seed(1)
    found = {}
    for name, config in zip(("lora", "prefix", "offset"), (KINDS[0], *KINDS[3:]), strict=True):
        save_adapter(adapted(config), tmp_path / name)
        found[name] = tmp_path / name
    return found


def serve(folders) -> StreamingServer:
    config = StreamingConfig(temperature=0.0, eos_token_id=-1, max_new_tokens=20)
    return StreamingServer(free_copy(wide()), "cpu", config, SimpleTokenizer(), adapters=folders)


def drawn(answer) -> list[int]:
    return [token.id for chunk in answer for token in chunk.tokens]


def test_each_request_chooses_its_adapter_in_one_batch(folders):
    names = ["lora", None, "prefix", "offset", "lora"]
    alone = {
        name: drawn(serve(folders).answer("Hello", as_ids=True, adapter=name))
        for name in set(names)
    }
    assert len({tuple(ids) for ids in alone.values()}) == 4
    server = serve(folders)
    answers = [server.answer("Hello", as_ids=True, adapter=name) for name in names]
    rows, read = [], server.decoder.read

    def noted(ids, *others):
        rows.append(len(ids))
        return read(ids, *others)

    server.decoder.read = noted
    for name, answer in zip(names, answers, strict=True):
        assert drawn(answer) == alone[name]
    assert max(rows) == 5
    state = wide().init_state(1)
    logits, _ = wide().advance(torch.tensor([SimpleTokenizer().encode("Hello")]), state)
    assert alone[None][0] == logits[0, -1].argmax()


def test_a_session_with_an_adapter_is_saved_and_continues(folders, tmp_path):
    server = serve(folders)
    config = dataclasses.replace(server.config, adapter="prefix")
    session = server.create_session(config=config)
    whole = drawn(server.answer("Hello", server.fork_session(session), as_ids=True))
    first = drawn(server.answer("Hello", session, as_ids=True, max_new_tokens=9))
    server.save_session(session, tmp_path / "s")
    other = serve(folders)
    rest = drawn(
        other.answer([], other.load_session(tmp_path / "s"), as_ids=True, max_new_tokens=11)
    )
    assert first + rest == whole
    with pytest.raises(UserError, match="state of this model"):
        serve({}).load_session(tmp_path / "s")


def test_adapters_that_are_not_there_are_rejected(folders, tmp_path):
    with pytest.raises(UserError, match="there is no 'x'"):
        serve(folders).answer("Hello", adapter="x")
    with pytest.raises(UserError, match="there are none"):
        serve({}).create_session(config=StreamingConfig(adapter="lora"))
    with pytest.raises(UserError, match="adapter"):
        serve(folders).answer("Hello", adapter=5)
    with pytest.raises(UserError, match="no such file"):
        serve({"a": tmp_path / "nowhere"})
    with pytest.raises(UserError, match="compile"):
        StreamingServer(free_copy(wide()), "cpu", compiled=True, adapters=folders)


def test_streaming_takes_an_adapter_on_the_command_line(based, tmp_path):
    save_adapter(adapted(KINDS[0]), "a")
    vocabulary = "\n".join([*byte_alphabet(), EOS_TOKEN])
    Path("vocab.txt").write_text(vocabulary + "\n", encoding="utf-8")
    words = ["--prompt", "Hello", "--temperature", 0, "--max_tokens", 12]
    plain = run_main(streaming.main, *words)
    with_it = run_main(streaming.main, *words, "--adapter", "a")
    assert plain.returncode == with_it.returncode == 0, with_it.stderr
    assert plain.stdout != with_it.stdout
    assert_refused(run_main(streaming.main, *words, "--adapter", "b"), "b")


# ------------------------------------------------------------- the name of Hugging Face's package

# Runs codes in forks of one process, whose imports take most of the time.
FORKS = """
import json, multiprocessing, os, sys
def run(code, place):
    os.makedirs(place, exist_ok=True)
    os.chdir(place)
    printed = os.open("printed", os.O_WRONLY | os.O_CREAT)
    os.dup2(printed, 1), os.dup2(printed, 2)
    exec(code, {"__name__": "__main__"})
codes, folder, first, site = json.load(sys.stdin)
if site:
    sys.path = [p for p in sys.path if "site-packages" not in p] + [site]
exec(first)
assert not {"peft", "testv2"} & {name.partition(".")[0] for name in sys.modules}
failed = {}
for name, code in codes.items():
    child = multiprocessing.get_context("fork").Process(target=run, args=(code, f"{folder}/{name}"))
    child.start()
    child.join()
    failed[name] = child.exitcode
print(json.dumps(failed))
"""
TORCH, TRANSFORMERS = "import torch", "import torch; from transformers import PreTrainedModel"


def run_forks(codes: dict[str, str], folder: Path, first: str, site: Path | None = None):
    """Run each code in a process and a folder of its own; its exit status and what it printed.

    The processes are forks of one that has run `first`, and has the repository first on its path,
    but has imported nothing of either peft. `site`: the installed packages, if not the usual ones.
    """
    done = subprocess.run(
        [sys.executable, "-c", FORKS],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        input=json.dumps([codes, str(folder), first, site and str(site)]),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    failed = json.loads(done.stdout)
    return {name: (failed[name], (folder / name / "printed").read_text()) for name in codes}


def printed(result: tuple[int, str]) -> list[str]:
    """The words that a code of run_forks has printed; it must have succeeded."""
    failed, text = result
    assert not failed, text
    return text.split()


WAYS = {
    "submodule": "from peft.tuners.lora import LoraLayer",
    "module": "import peft.utils",
    "function": "from peft import get_peft_model",
    "attribute": "import peft; peft.LoraConfig",
    "star": "from peft import *",
    "subpackage": "from peft.tuners import LoraConfig",
    "importlib": "import importlib as i; i.import_module('peft.config')",
    "threads": """
import threading, peft
threads = [threading.Thread(target=getattr, args=(peft, "LoraConfig")) for _ in range(9)]
for thread in threads: thread.start()
for thread in threads: thread.join()
""",
    "error": """
import sys, peft, accelerate
sys.modules["accelerate"] = None
for _ in range(2):
    try:
        peft.LoraConfig
        raise SystemExit("loaded")
    except ImportError as e:
        assert "accelerate" in str(e)
sys.modules["accelerate"] = accelerate
for name in [name for name in sys.modules if name.startswith("peft.")]:
    del sys.modules[name]  # some have lost their parent
""",
}
ONE_AND_THE_SAME = """
import peft, peft.tuners.lora, sys, importlib.metadata
from peft.tuners.lora import LoraLayer, LoraConfig
import peft.tuners.lora.layer as layer
assert layer.LoraLayer is LoraLayer is peft.tuners.lora.LoraLayer
assert peft.LoraConfig is LoraConfig
assert peft.__version__ == importlib.metadata.version('peft')
names = [n for n in sys.modules if n.startswith('peft.')]
for n in names:
    parent, _, child = n.rpartition('.')
    assert getattr(sys.modules[parent], child) is sys.modules[n], n
    assert 'ImportedModule' not in repr(sys.modules[n].__spec__), n
print(peft.LoRALinear.__module__, peft.__file__)
"""
TRAIN = """
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
set_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
                                     num_hidden_layers=1, num_attention_heads=2))
rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(4)]
def fit(model):
    arguments = TrainingArguments("out", max_steps=2, report_to=[], use_cpu=True, save_steps=1,
                                  disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model("out/last")
"""
TRAIN_WITH = """
from peft import LoraConfig, PeftModel, get_peft_model
import os, pickle, peft
fit(model)
model.add_adapter(LoraConfig(target_modules=["q_proj"]))
model.delete_adapter("default")
wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
fit(wrapped)
wrapped.save_pretrained("lora")
again = PeftModel.from_pretrained(model, "lora")
assert os.path.isfile("lora/adapter_model.safetensors")
assert pickle.loads(pickle.dumps(LoraConfig(r=3))).r == 3
assert pickle.loads(pickle.dumps(peft.AdapterConfig(lora_rank=3))).lora_rank == 3
"""
TRAIN_WITHOUT = """
import peft
assert not hasattr(peft, "__path__")
fit(model)
from peft import PeftModel, PeftMixedModel
assert not isinstance(model, (PeftModel, PeftMixedModel))
for make in (PeftModel, PeftMixedModel):
    try:
        make(model)
        raise SystemExit("made")
    except ImportError as e:
        assert "pip install peft" in str(e)
try:
    from peft import LoraConfig
    raise SystemExit("found")
except ImportError:
    print("none")
"""
COSTS = """
import sys, peft
from peft import LoRALinear, load_adapter
print('transformers' in sys.modules, 'accelerate' in sys.modules)
from peft import LoraConfig
print('transformers' in sys.modules, peft.LoRALinear is LoRALinear)
"""
COPIED = """
import package.peft as ours
import sys
print('__getattr__' in vars(ours), hasattr(ours, 'LoraConfig'), 'peft' in sys.modules)
"""
THEIRS = f"""
import sys
sys.path.remove({str(ROOT)!r})
import peft
print(*vars(peft))
"""
OURS_WITHOUT = """
from peft import *
import peft
from testv2 import load_model
model = peft.apply_lora_to_model(load_model('tinymamba_model_latest.pt'))
peft.save_adapter(model, 'a')
"""


@pytest.fixture(scope="module")
def site_without_peft(tmp_path_factory) -> Path:
    """Links to all installed packages but that one."""
    folder = tmp_path_factory.mktemp("site")
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.lower().startswith("peft"):
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def with_torch(tmp_path_factory):
    """Codes that import transformers themselves."""
    folder = tmp_path_factory.mktemp("torch")
    (folder / "copied" / "package").mkdir(parents=True)
    shutil.copy(ROOT / "peft.py", folder / "copied" / "package")
    codes = {"costs": COSTS, "trained": TRAIN + TRAIN_WITH + ONE_AND_THE_SAME, "copied": COPIED}
    return run_forks(codes, folder, TORCH)


@pytest.fixture(scope="module")
def with_transformers(tmp_path_factory):
    """Every way to the package, and its own names."""
    codes = {name: code + ONE_AND_THE_SAME for name, code in WAYS.items()}
    return run_forks({**codes, "theirs": THEIRS}, tmp_path_factory.mktemp("all"), TRANSFORMERS)


@pytest.fixture(scope="module")
def without_peft(tmp_path_factory, site_without_peft):
    """Codes that run where the package is not installed, and their folder."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "ours").mkdir()
    save_wide(folder / "ours" / "tinymamba_model_latest.pt")
    codes = {"ours": OURS_WITHOUT, "trained": TRAIN + TRAIN_WITHOUT}
    return folder, run_forks(codes, folder, TORCH, site_without_peft)


@POSIX
def test_importing_costs_nothing_until_something_of_the_package_is_asked_for(with_torch):
    assert printed(with_torch["costs"]) == ["False", "False", "True", "True"]


@POSIX
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_the_package_gives_one_and_the_same(way, with_transformers):
    assert printed(with_transformers[way]) == ["peft", str(ROOT / "peft.py")]


@POSIX
def test_no_name_here_is_one_of_the_package(with_transformers):
    theirs = printed(with_transformers["theirs"])
    assert "LoraConfig" in theirs and "LoRALinear" not in theirs
    source = (ROOT / "peft.py").read_text()
    ours = {n for n in vars(peft) if not n.startswith("__") and f"{n}" in source}
    assert {"LoRALinear", "load_adapter"} <= ours
    own = {n for n in ours if getattr(vars(peft)[n], "__module__", "") == "peft"}
    assert not own & {n for n in theirs if not n.startswith("__")}


@POSIX
def test_hugging_face_trains_with_the_package(with_torch):
    assert printed(with_torch["trained"])[-2:] == ["peft", str(ROOT / "peft.py")]


@POSIX
def test_hugging_face_trains_without_the_package(without_peft):
    _, results = without_peft
    assert printed(results["trained"])[-1] == "none"


@POSIX
def test_our_adapters_work_without_the_package(without_peft):
    folder, results = without_peft
    printed(results["ours"])
    load_adapter(free_copy(wide()), folder / "ours" / "a")


@POSIX
def test_a_copy_of_the_file_under_another_name_shares_no_name(with_torch):
    assert printed(with_torch["copied"]) == ["False", "False", "False"]


def test_state_offset_by_its_own_name():
    model = apply_state_offset_to_model(free_copy(wide()))
    assert sum(p.numel() for p in get_trainable_parameters(model)) == 2 * 8 * 8 * 8
