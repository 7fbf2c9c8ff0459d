"""Config, command line, optimizer, schedule and bad input of testv2.py.

The model has its own tests; training, resume, signals and processes are in test_training.py.
"""

import contextlib
import copy
import dataclasses
import io
import itertools
import json
import math
import os
import pickle
import re
import subprocess
import sys
import typing
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    BRIEF,
    FIRST_FORM,
    ROOT,
    TINY,
    assert_refused,
    assert_refuses,
    call,
    files_below,
    flags,
    run_script,
    tiny_config,
    write_tokens,
)

import testv2
from testv2 import (
    Config,
    TinyMambaModel,
    Trainer,
    learning_rate,
    make_optimizer,
    parse_command_line,
)
from tinymamba.checkpoint import load_checkpoint, save_checkpoint
from tinymamba.cli import UserError
from tinymamba.optimizer import MuonAdamW


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------ config

# class Config in the README that the user sent. There empty_cache_freq is 50: to clear the cache of
# CUDA frees no memory that the next step does not take again, and makes it wait.
SEED = {
    "d_model": 768, "n_layer": 12, "vocab_size": 50304, "dropout": 0.1, "bias": True,
    "activation": "silu", "d_state": 16, "d_conv": 4, "expand_factor": 2, "window_size": 64,
    "num_heads": 6, "block_size": 512, "batch_size": 8, "gradient_accumulation_steps": 4,
    "num_epochs": 1, "lr": 6e-4, "warmup_steps": 1000, "grad_clip": 1.0, "weight_decay": 0.01,
    "beta1": 0.9, "beta2": 0.95, "use_compile": True, "use_flash_attn": True,
    "amp_dtype": torch.bfloat16, "log_interval": 20, "empty_cache_freq": 0,
    "train_data_path": "./data/text/train.bin", "val_data_path": "./data/text/val.bin",
    "checkpoint_path": "tinymamba_model_latest.pt", "resume": False, "enable_validation": True,
    "validation_interval": 2000, "generate_samples": True, "generation_interval": 1000,
    "use_wandb": False, "wandb_project": "tinymamba",
}  # fmt: skip
FIELDS = {field.name: field.default for field in dataclasses.fields(Config)}
TYPES = typing.get_type_hints(Config)
NUMBERS = [name for name, kind in TYPES.items() if kind in (int, float)]
LEGAL = {  # another legal value beside the other defaults, where default + 1 is not one
    "d_model": 384, "d_state": 18, "num_heads": 4, "ssm_head_dim": 32, "gate_top_k": 3, "eos_id": 7,
    "dropout": 0.25, "beta1": 0.5, "beta2": 0.5, "min_lr_ratio": 0.5, "min_decay": 0.5,
    "state_noise": 0.5, "distill_alpha": 0.25, "activation": "gelu",
    "scan": "sequential", "gate": "sparsemax", "amp_dtype": torch.float16, "device": "cpu",
    "data_dtype": "uint16", "train_data_path": ["a.bin", "b.bin"], "val_data_path": "v.bin",
    "train_data_weights": [0.7, 0.3], "optimizer": "adamw", "parallel": "fsdp",
    "schedule": "linear", "resume": "auto", "rotating": 0.5,
}  # fmt: skip


def another(name: str):
    """A legal value of the field that is not its default."""
    if name in LEGAL or TYPES[name] is str:
        return LEGAL.get(name, "other")
    return not FIELDS[name] if TYPES[name] is bool else FIELDS[name] + 1


def as_word(value) -> str | list:
    return value if isinstance(value, list) else str(value).removeprefix("torch.")


@pytest.mark.parametrize("name", SEED)
def test_config_has_the_fields_and_defaults_of_the_seed(name):
    assert FIELDS[name] == SEED[name] and type(FIELDS[name]) is type(SEED[name])
    assert getattr(Config(), name) == SEED[name]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_a_flag_that_parses_to_its_type(name):
    value = another(name)
    config, named, profile = parse_command_line(flags(**{name: as_word(value)}))
    assert getattr(config, name) == value and type(getattr(config, name)) is type(value)
    assert config == dataclasses.replace(Config(), **{name: value})
    assert named == {name: value} and not profile


def squeeze(text: str) -> str:
    return "".join(text.split())


@pytest.fixture(scope="module")
def help_text():
    done = run_script("testv2.py", "--help", cwd=ROOT)
    assert done.returncode == 0 and done.stderr == ""
    return done.stdout


def test_help_shows_every_field_with_its_comment_and_default(help_text):
    source = (ROOT / "testv2.py").read_text().split("class Config:")[1]
    entries = dict(re.findall(r"^  --(\w+)(.*?)(?=^  --|\Z)", help_text, re.M | re.S))
    for name, default in FIELDS.items():
        comment = re.search(rf"^    {name}: .*?  # (.+)$", source, re.M)[1]
        assert squeeze(comment) in squeeze(entries[name]), name
        assert squeeze(f"[{as_word(default)}]") in squeeze(entries[name]), name


def test_help_tells_the_size_of_every_preset(help_text):
    for name in ("demo", "small", "base"):
        said = float(re.search(rf"{name}:[^;]*?([\d.]+)M", " ".join(help_text.split()))[1])
        config = parse_command_line(["--preset", name])[0]
        one, two = (sum(p.numel() for p in TinyMambaModel(c).parameters())
                    for c in (dataclasses.replace(config, n_layer=n) for n in (1, 2)))  # fmt: skip
        assert said == pytest.approx((one + (config.n_layer - 1) * (two - one)) / 1e6, rel=0.05)


def test_presets_and_flags_over_them():
    assert parse_command_line(["--preset", "base"])[0] == parse_command_line([])[0] == Config()
    demo, small = (parse_command_line(["--preset", name])[0] for name in ("demo", "small"))
    assert demo.d_model < small.d_model < Config().d_model
    for words in (["--preset", "demo", "--lr", "0.5"], ["--lr", "0.5", "--preset", "demo"]):
        assert parse_command_line(words)[0] == dataclasses.replace(demo, lr=0.5)


def test_switches():
    assert parse_command_line(["--use_compile", "false"])[0].use_compile is False
    assert parse_command_line(["--use_compile", "True"])[0].use_compile is True
    assert parse_command_line(["--resume"])[0].resume is True
    assert parse_command_line(["--resume", "--n_layer", "3"])[0].resume is True
    assert parse_command_line(["--profile"])[2] is True


@pytest.mark.parametrize("flag, meant", [
    ("--warmup_step", "--warmup_steps"), ("--n-layer", "--n_layer"), ("--widow_size", "--window"),
])  # fmt: skip
def test_unknown_flag_is_named_with_a_suggestion(flag, meant):
    assert_refuses(flag, "3", naming=[f"{flag}:", meant])
    assert_refuses(f"{flag}=3", naming=[f"{flag}:", meant])


ILLEGAL = {
    "--d_model abc": "int", "--d_model 1.5": "int", "--n_layer 0": "1", "--lr fast": "float",
    "--use_compile maybe": "true, 1, false", "--amp_dtype int8": "bfloat16, float16, float32",
    "--activation tanh": "silu, gelu, relu", "--gate hard": "softmax, top_k, sparsemax",
    "--scan fast": "chunked, sequential", "--data_dtype int8": "auto, int32, uint16",
    "--num_heads 5": "1, 2, 3, 4, 6, 8", "--num_heads 6 --d_model 18": "1, 3, 9",
    "--num_heads 1 --d_model 33": "even", "--d_state 7": "even", "--optimizer sgd": "muon, adamw",
    "--gate_top_k 4": "1 to 3", "--dropout 1.0": "0 to 0.99",
    "--beta1 1": "0 to 0.99", "--beta2 1": "0 to 0.99", "--min_lr_ratio 1.5": "0 to 1",
    "--min_decay 2": "0 to 1", "--state_noise -1": "0 to 1", "--distill_alpha 2": "0 to 1",
    "--eos_id 50304": "-1 to 50303", "--ssm_head_dim 100": "48, 64, 96", "--low_rank 768": "767",
    "--max_bad_steps 0": "1", "--d_model": "argument", "--preset huge": "demo, small, base",
    "--train_data_weights 1 x": "float", "--vocab_size 1_0_x": "int",
}  # fmt: skip


@pytest.mark.parametrize("words", ILLEGAL)
def test_illegal_value_is_refused_with_the_field_and_what_is_legal(words):
    legal = squeeze(ILLEGAL[words])
    line = assert_refuses(*words.split())
    assert re.match(rf"error: (--)?{words.split()[0].removeprefix('--')}: ", line)
    assert legal in squeeze(line.replace("'", ""))


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_may_be_negative_or_not_finite(name):
    below = -2 if name == "eos_id" else -1
    assert_refuses(f"--{name}", below, naming=[name, "it must be"])
    if TYPES[name] is float:
        for bad in ("-0.001", "-1e-3", "nan", "inf", "-inf"):
            assert_refuses(f"--{name}={bad}", naming=[name])


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_type_is_refused_by_name(name):
    wrong = [object(), b"x", 1j, {}]
    wrong += ["256", True, None, [1]] if name in NUMBERS else []
    wrong += [1.0] if TYPES[name] is int else []
    wrong += ["true", 1, None] if TYPES[name] is bool else []
    wrong += [[], [1]] if name.endswith("data_path") else []
    wrong += [[], ["1"], [math.nan], 1.0] if name == "train_data_weights" else []
    for value in wrong:
        with pytest.raises(UserError, match=f"^{name}: .*default"):
            Config(**{name: value}).validate()


def test_config_made_in_python_is_refused_where_it_is_used():
    with pytest.raises(UserError, match="^d_model: "):
        TinyMambaModel(Config(d_model="256"))
    with pytest.raises(UserError, match="^lr: "):
        Trainer(Config(lr=-1.0))


def test_config_survives_the_round_trip_through_plain_values():
    for name in FIELDS:
        config = Config(**{name: another(name)})
        values = json.loads(json.dumps(config.to_dict()))
        assert set(values) == set(FIELDS)
        assert Config.from_dict(values) == config
    assert Config.from_dict({"n_layer": 3}) == Config(n_layer=3, **FIRST_FORM)


@pytest.mark.parametrize("values, name", [
    ({"nope": 1}, "nope"), ({"d_model": "256"}, "d_model"), ({"amp_dtype": "int8"}, "amp_dtype"),
])  # fmt: skip
def test_from_dict_refuses_unknown_names_and_bad_values(values, name):
    with pytest.raises(UserError, match=f"^{name}: "):
        Config.from_dict(values)


def test_refusal_in_a_real_process(tmp_path):
    done = run_script("testv2.py", "--warmup_step", "3", cwd=tmp_path)
    assert_refused(done, "--warmup_step:", "--warmup_steps")
    assert done.stdout == "" and not files_below(tmp_path)


# ------------------------------------------------------------------------ optimizer and schedule


MATRIX = r"blocks\.\d+\.\w+\.(memory\.token_proj|(in_proj|out_proj|qkv)(\.down|\.up)?)\.weight"


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("changes", [
    {}, {"tie_embeddings": False}, {"low_rank": 4}, {"bias": False}, {"gate": "top_k"},
])  # fmt: skip
def test_only_projection_matrices_decay_and_each_parameter_is_in_one_group(changes, optimizer):
    settings = {"weight_decay": 0.3, "lr": 0.1, "beta2": 0.9, "optimizer": optimizer, **changes}
    model = TinyMambaModel(tiny_config(**settings))
    optimizer = make_optimizer(model, model.config)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    grouped = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(grouped) == len(decay) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.3 if re.fullmatch(MATRIX, name) else 0.0), name
    assert all(g.get("betas", (0.9, 0.9)) == (0.9, 0.9) for g in optimizer.param_groups)
    assert all(g["lr"] == 0.1 for g in optimizer.param_groups)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():  # without a gradient, decay is all that moves a weight
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * decay[id(p)]))


def give_gradients(models, seed: int) -> None:
    """The same random gradients to every model."""
    for model in models:
        g = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g)


def set_rate(optimizers, rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def same_weights(one, two) -> bool:
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def parts_of(config) -> dict[str, list[int]]:
    """The rows that Muon takes as one matrix, by the end of a weight's name."""
    D, E = config.d_model, config.expand_factor * config.d_model
    N, H = config.d_state, E // config.ssm_head_dim
    last = ".up.weight" if config.low_rank else ".weight"
    return {f"ssm.in_proj{last}": [E, E, N, N, H], f"attention.qkv{last}": [D, D, D],
            f"mlp.in_proj{last}": [E, E]}  # fmt: skip


def by_hand(model) -> list[torch.optim.Optimizer]:
    """PyTorch's Muon, over a parameter for every part of a matrix, and its AdamW."""
    c, named = model.config, list(model.named_parameters())
    matrices = {n: p for n, p in named if re.fullmatch(MATRIX, n)}
    others = [p for n, p in named if n not in matrices]
    adamw = {"betas": (c.beta1, c.beta2), "fused": True}
    second = torch.optim.AdamW(others, c.lr, weight_decay=0.0, **adamw)
    if c.optimizer == "adamw":
        first = torch.optim.AdamW(matrices.values(), c.lr, weight_decay=c.weight_decay, **adamw)
        return [first, second]
    views = []
    for name, p in matrices.items():
        rows = next((v for k, v in parts_of(c).items() if name.endswith(k)), [len(p)])
        for part, grad in zip(p.detach().split(rows), p.grad.split(rows), strict=True):
            views.append(torch.nn.Parameter(part))
            views[-1].grad = grad
    muon = torch.optim.Muon(views, c.lr, c.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, second]


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"low_rank": 4}], ids=str)
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_optimizer_is_that_of_pytorch_for_matrices_and_adamw_for_the_rest(name, changes):
    settings = {"weight_decay": 0.3, "lr": 0.02, "beta1": 0.8, "optimizer": name, **changes}
    ours = TinyMambaModel(tiny_config(**settings))
    theirs = copy.deepcopy(ours)
    for p in theirs.parameters():
        p.grad = torch.zeros_like(p)
    references = by_hand(theirs)
    optimizer = make_optimizer(ours, ours.config)
    assert type(optimizer) is {"muon": MuonAdamW, "adamw": torch.optim.AdamW}[name]
    for step in range(5):
        give_gradients([ours], step)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.grad.copy_(mine.grad)
        set_rate([optimizer, *references], 0.02 / (1 + step))
        for o in (optimizer, *references):
            o.step()
        for (n, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-4, msg=f"step {step}, {n}")


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_an_optimizer_loaded_from_a_file_goes_on_as_if_never_saved(tmp_path, name):
    models = [TinyMambaModel(tiny_config(optimizer=name, lr=0.02))]
    optimizers = [make_optimizer(models[0], models[0].config)]
    for step in range(3):
        give_gradients(models, step)
        optimizers[0].step()
    state = optimizers[0].state_dict()
    assert len(state["state"]) == len(list(models[0].parameters()))
    torch.save(state, tmp_path / "optimizer.pt")
    models.append(copy.deepcopy(models[0]))
    optimizers.append(make_optimizer(models[1], models[1].config))
    optimizers[1].load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert testv2.digest(optimizers[1].state_dict()) == testv2.digest(state)
    for step in range(3, 6):
        give_gradients(models, step)
        set_rate(optimizers, 0.02 / step)
        for optimizer in optimizers:
            optimizer.step()
        assert same_weights(*models)
    assert testv2.digest(optimizers[1].state_dict()) == testv2.digest(optimizers[0].state_dict())
    before = copy.deepcopy(models[1])
    set_rate(optimizers[1:], 0.0)
    optimizers[1].step()
    assert same_weights(models[1], before), "the rate reaches every parameter, loaded or not"


def test_muon_steps_with_a_closure_and_under_a_gradient_scaler():
    model = TinyMambaModel(tiny_config(lr=0.02))
    optimizer = make_optimizer(model, model.config)
    ids = torch.arange(34).view(2, 17)

    def closure():
        optimizer.zero_grad()
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    scaler = torch.amp.GradScaler("cpu")
    for finite in (False, True):
        give_gradients([model], 0)
        if not finite:
            model.norm.weight.grad[0] = math.inf
        before = copy.deepcopy(model)
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
        assert same_weights(model, before) == (not finite)


@pytest.mark.parametrize("total, warmup", [(1000, 50), (1000, 100), (1000, 1000), (30, 2), (7, 0)])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_rate_warms_up_linearly_then_falls_to_its_floor(total, warmup, floor):
    config = Config(lr=0.5, warmup_steps=warmup, min_lr_ratio=floor)
    rates = [learning_rate(step, total, config) for step in range(total)]
    length = min(warmup, total // 10)
    assert rates[:length] == pytest.approx([0.5 * (i + 1) / length for i in range(length)])
    assert max(rates) == pytest.approx(0.5) == rates[length]
    assert all(a >= b for a, b in itertools.pairwise(rates[length:]))
    assert rates[-1] == pytest.approx(floor * 0.5)


def test_rate_has_decayed_when_the_epochs_are_over():
    write_tokens(Path("a.bin"), [7] * (40 * 32 + 1))  # 40 blocks: 10 steps of 4 in an epoch
    config = tiny_config(train_data_path="a.bin", num_epochs=3, lr=1e-3, **BRIEF)
    trainer = Trainer(config)
    rates = []
    trainer.optimizer.register_step_post_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    assert trainer.run() == 0
    assert len(rates) == 30
    assert max(rates) == pytest.approx(1e-3) and rates[-1] == pytest.approx(1e-4)
    groups = trainer.optimizer.param_groups
    assert {g["lr"] for g in groups} == {rates[-1]}


# ------------------------------------------------------------------------------------ bad data


@pytest.fixture
def place(data):
    """A working folder with data and a checkpoint of an earlier run, which nothing may harm."""
    save_checkpoint("tinymamba_model_latest.pt", {"kept": True})
    return data


ARGS = flags(**TINY, **BRIEF, max_steps=1)


def write_case(name: str) -> None:
    path = Path("bad.bin")
    if name in ("odd", "empty"):
        path.write_bytes(b"abc" if name == "odd" else b"")
    elif name == "uint16":
        write_tokens(path, [100] * 2000, np.uint16)
    elif name == "uint16 of a half id":
        write_tokens(path, [100] * 2001, np.uint16)
    elif name == "short":
        write_tokens(path, [1] * 32)
    else:
        ids = [1] * 2000
        ids[1234] = 257 if name == "large" else -1
        write_tokens(path, ids)


BAD_DATA = {
    "odd": ["3 bytes", "int32"], "uint16": ["--data_dtype uint16"],
    "uint16 of a half id": ["--data_dtype uint16"], "empty": ["0 tokens", "33"],
    "short": ["32 tokens", "33"], "large": ["id 257", "offset 1234", "vocab_size"],
    "negative": ["id -1", "offset 1234", "vocab_size"],
}  # fmt: skip


@pytest.mark.parametrize("side", ["train", "val"])
@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_file_is_named_with_what_is_wrong(place, name, side):
    write_case(name)
    words = [*ARGS, "--enable_validation", "true", f"--{side}_data_path", "bad.bin"]
    assert_refuses(*words, naming=["bad.bin", *BAD_DATA[name]])


def test_uint16_data_is_read_as_the_refusal_suggests(place):
    write_case("uint16 of a half id")
    done = call(*ARGS, "--train_data_path", "bad.bin", "--data_dtype", "uint16")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("weights, said", [
    ("-1 2", "-1.0"), ("nan 1", "nan"), ("0 1", "0.0"), ("1", "1 weights for 2 sources"),
    ("1 1 1", "3 weights for 2 sources"), ("inf 1", "inf"),
])  # fmt: skip
def test_bad_weights_are_refused(place, weights, said):
    paths = ["--train_data_path", "data/text/train.bin", "data/text/val.bin"]
    words = [*ARGS, *paths, "--train_data_weights", *weights.split()]
    assert_refuses(*words, naming=["train_data_weights", said])


def test_missing_files_are_named(place):
    assert_refuses(*ARGS, "--train_data_path", "no.bin", naming=["no.bin"])
    words = [*ARGS, "--enable_validation", "true", "--val_data_path", "no_val.bin"]
    assert_refuses(*words, naming=["no_val.bin"])


def test_too_little_data_for_one_step_is_refused(place):
    words = [*ARGS, "--max_steps", 0, "--batch_size", 10000, "--gradient_accumulation_steps", 3]
    assert_refuses(*words, naming=["batch_size", "30000"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "tpu", "cpu:x", ""])
def test_absent_device_is_refused(place, device):
    assert_refuses(*ARGS, "--device", device, naming=["device", "cpu"])


@pytest.mark.parametrize("path", ["data/text/train.bin/model.pt", "data", ".", ""])
def test_checkpoint_path_that_cannot_be_written_is_refused(place, path):
    before = files_below(place / "data")
    assert_refused(call(*ARGS, "--checkpoint_path", path))
    assert files_below(place / "data") == before


def test_log_dir_that_cannot_be_written_is_refused(place):
    assert_refuses(*ARGS, "--log_dir", "data/text/train.bin/logs", naming=["log"])


@pytest.mark.parametrize("seed", [0, 1234567890, 2**63 - 1])
def test_any_seed_of_64_bits_is_legal(place, seed):
    done = call(*ARGS, "--seed", seed)
    assert done.returncode == 0, done.stderr


def test_larger_seed_is_refused(place):
    assert_refuses(*ARGS, "--seed", 2**70, naming=["seed"])


def test_bad_data_in_a_real_process(place):
    write_case("large")
    done = run_script("testv2.py", *ARGS, "--train_data_path", "bad.bin", cwd=place)
    assert_refused(done, "bad.bin", "id 257", "offset 1234")
    assert load_checkpoint("tinymamba_model_latest.pt")["kept"]


# ------------------------------------------------------------------------------- bad checkpoints


class Evil:
    def __reduce__(self):
        return Path.write_text, (Path("executed"), "by a checkpoint")


def bad_checkpoint(kind: str, good: bytes) -> bytes:
    if kind.startswith("cut"):
        return good[: int(len(good) * float(kind.split()[1]))]
    buffer = io.BytesIO()
    if kind == "code in a zip":
        torch.save({"model": Evil()}, buffer)
    elif kind == "foreign":
        torch.save({"model": {}}, buffer)
    elif kind == "list":
        torch.save([1, 2], buffer)
    return {
        "empty": b"", "text": b"once upon a time\n" * 100, "noise": bytes(range(256)) * 40,
        "code in a pickle": pickle.dumps({"model": Evil()}),
    }.get(kind, buffer.getvalue())  # fmt: skip


@pytest.mark.parametrize("kind", [
    "cut 0.1", "cut 0.5", "cut 0.9", "cut 0.999", "empty", "text", "noise", "code in a pickle",
    "code in a zip", "foreign", "list",
])  # fmt: skip
def test_bad_checkpoint_is_refused_and_runs_no_code(place, kind):
    good = Path("tinymamba_model_latest.pt").read_bytes()
    Path("bad.pt").write_bytes(bad_checkpoint(kind, good))
    assert_refuses("--resume", "--checkpoint_path", "bad.pt", naming=["bad.pt"])
    assert not Path("executed").exists()


def test_missing_checkpoint_is_refused(place):
    assert_refuses("--resume", "--checkpoint_path", "no.pt", naming=["no.pt"])
    done = run_script("testv2.py", "--resume", "--checkpoint_path", "no.pt", cwd=place)
    assert_refused(done, "no.pt", "no such checkpoint")


def test_a_checkpoint_of_the_first_release_is_refused(place, monkeypatch):
    """Its weights have other shapes and names."""
    with monkeypatch.context() as then:
        then.setattr("tinymamba.checkpoint.CHECKPOINT_FORMAT", 1)
        save_checkpoint("old.pt", {"model": TinyMambaModel(tiny_config()).state_dict()})
    assert_refuses("--resume", "--checkpoint_path", "old.pt", naming=["old.pt", "format"])


def flip(raw: bytes, at: int, bit: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]


def test_every_flipped_bit_in_tensor_data_is_caught(tmp_path):
    path = tmp_path / "model.pt"
    state = TinyMambaModel(tiny_config(n_layer=1)).state_dict()
    save_checkpoint(path, {"model": state, "optimizer": {"exp_avg": torch.randn(500)}})
    raw = path.read_bytes()
    spans = []
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if "/data/" in info.filename:
                sizes = raw[info.header_offset + 26 : info.header_offset + 30]
                begin = info.header_offset + 30 + sum(np.frombuffer(sizes, "<u2").tolist())
                spans.append(range(begin, begin + info.file_size))
    assert sum(map(len, spans)) > 100_000
    places = np.random.default_rng(0)
    for _ in range(50):
        span = spans[places.integers(len(spans))]
        path.write_bytes(flip(raw, span[places.integers(len(span))], int(places.integers(8))))
        with pytest.raises(UserError, match="model.pt: .*damaged"):
            load_checkpoint(path)


def test_a_flipped_bit_anywhere_is_refused_or_harmless(tmp_path):
    path = tmp_path / "model.pt"
    config = {"lr": 0.1, "name": "x", 3: [1, None, True], "paths": ("a", "b")}
    save_checkpoint(path, {"model": {"w": torch.arange(4.0)}, "config": config, "empty": {}})
    raw, good = path.read_bytes(), testv2.digest(load_checkpoint(path))
    for at in range(len(raw)):
        path.write_bytes(flip(raw, at, at % 8))
        with contextlib.suppress(UserError):
            assert testv2.digest(load_checkpoint(path)) == good, f"byte {at}"


def full_disk(state, name):
    Path(name).write_bytes(b"half")
    raise RuntimeError("no space left")


def locked(source, target):
    raise PermissionError("no space left to you")


@pytest.mark.parametrize("at, fault", [((torch, "save"), full_disk), ((os, "replace"), locked)])
def test_checkpoint_survives_a_failed_write(tmp_path, monkeypatch, at, fault):
    path = tmp_path / "model.pt"
    save_checkpoint(path, {"kept": True})
    monkeypatch.setattr(*at, fault)
    with pytest.raises(UserError, match="model.pt: .*no space left"):
        save_checkpoint(path, {"kept": False})
    assert load_checkpoint(path)["kept"] and os.listdir(tmp_path) == ["model.pt"]


# --------------------------------------------------------------------------------- built-in data


@pytest.fixture
def prepared(monkeypatch):
    """The commands that testv2.py runs, each of which makes the data without running anything."""
    commands = []

    def run(command, **_):
        commands.append([str(word) for word in command])
        folder = Path(commands[-1][commands[-1].index("--output_dir") + 1])
        folder.mkdir(parents=True)
        for name in ("train.bin", "val.bin"):
            write_tokens(folder / name, list(range(256)) * 4)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(testv2.subprocess, "run", run)
    return commands


def test_plain_run_without_data_prepares_the_corpus_once_and_trains(prepared):
    for _ in range(2):
        done = call(*ARGS)
        assert done.returncode == 0 and "step 1/1 " in done.stdout, done.stderr
    assert len(prepared) == 1 and prepared[0][0] == sys.executable
    assert Path(prepared[0][1]) == ROOT / "data" / "prepare.py"


@pytest.mark.parametrize("path", ["mine.bin", "./data/text/train.bin"])
def test_missing_data_that_the_user_named_is_not_made_up(prepared, path):
    assert_refuses(*ARGS, "--train_data_path", path, naming=[path.removeprefix("./")])
    assert prepared == []


def test_failed_preparation_is_one_line(tmp_path):
    (tmp_path / "data" / "text").mkdir(parents=True)
    (tmp_path / "data" / "text" / "vocab.txt").write_text("mine")
    done = run_script("testv2.py", cwd=tmp_path)
    assert_refused(done, "vocab.txt", "--force")
    assert (tmp_path / "data" / "text" / "vocab.txt").read_text() == "mine"
