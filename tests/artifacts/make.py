"""Write one small artifact of every format that the first release writes, and what each one means.

It was run at commit ce5aae1, with the code of that commit, from the root of a clone of it:

    cd CLONE && OMP_NUM_THREADS=1 python PATH/TO/tests/artifacts/make.py OUT

OUT was then copied to tests/artifacts. tests/test_artifacts.py holds all later code to these files:
a format that changes gets files of its own beside them, and these stay as they are.

    data/, words/               tokens, sidecars and tokenizers: of bytes, and of 280 learned tokens
    muon/, adamw/, lora_run/    checkpoints out of the middle of a run, with which it goes on
    plain.pt                    a checkpoint without the state of training
    folder/, untied/            models as export_model.py writes them
    int8/, int4/                models as quantize.py writes them
    onnx/                       the same for ONNX Runtime, without onnx_generate.py
    hf/                         a model for transformers, without the code that lies beside it
    lora/, dora/, prefix/, state_offset/, int4_lora/    adapters of folder/ and of int4/
    session.safetensors, adapter_session.safetensors, state.safetensors    memories of folder/
    expected.json, expected.safetensors    what the code of that commit makes of all this

To save space, a tokenizer lies only in data/, words/, folder/ and hf/. Every path in a file is
relative to the folder that holds them all.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

ROOT = Path.cwd()  # of the code
sys.path.insert(0, str(ROOT))

from peft import load_adapter  # noqa: E402
from streaming import StreamingConfig, StreamingServer  # noqa: E402
from testv2 import SimpleTokenizer, load_checkpoint, load_model  # noqa: E402

LATEST = "tinymamba_model_latest.pt"
TINY = {
    "d_model": 16,
    "n_layer": 1,
    "vocab_size": 257,
    "dropout": 0.0,
    "num_heads": 2,
    "ssm_head_dim": 8,
    "d_state": 8,
    "window_size": 8,
    "chunk_size": 16,
    "block_size": 32,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 4,
    "lr": 2e-2,
    "device": "cpu",
    "amp_dtype": "float32",
    "use_compile": "false",
    "generate_samples": "false",
    "log_interval": 1,
    "validation_interval": 5,
    "validation_steps": 2,
    "train_data_path": "data/train.bin",
    "val_data_path": "data/val.bin",
    "wandb_run_name": "run",
}
TUNING = {
    "checkpoint": "folder",
    "train_data": "data/other.bin",
    "val_data": "data/val.bin",
    "steps": 24,
    "warmup_steps": 2,
    "validation_interval": 6,
    "validation_steps": 2,
    "checkpoint_interval": 18,
    "log_interval": 1,
    "device": "cpu",
    "amp_dtype": "float32",
    "generate_samples": "false",
    "wandb_run_name": "run",
}
SMALL = {"expand_factor": 1, "bias": "false"}
PLACES = [11, 39]  # tokens of the ids whose logits are kept
EOS = 256


def tool(script, *words, cwd, **flags):
    command = [sys.executable, str(ROOT / script), *words]
    for name, value in flags.items():
        command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=cwd, env=env, check=True, stdout=subprocess.DEVNULL)


def write_data():
    sums = "".join(f"{a} plus {b} is {a + b}.\n" for a in range(11) for b in range(11))
    Path("sums.txt").write_text(sums)
    share = {"input": "sums.txt", "dtype": "uint16", "val_fraction": 0.2}
    tool("data/prepare.py", cwd=".", tokenizer="byte", output_dir="data", **share)
    few = {**share, "tokenizer": "bpe", "vocab_size": 280}
    tool("data/prepare.py", cwd=".", output_dir="words", **few)
    Path("sums.txt").unlink()
    other = "".join(f"{a} minus {b} is {a - b}.\n" for a in range(8) for b in range(a + 1))
    ids = [*other.encode(), EOS]
    np.array(ids, np.int32).tofile("data/other.bin")  # without a sidecar


def train(folder, keep=None, **changes):
    path = f"{folder}/{LATEST}"
    tool("testv2.py", cwd=".", **{**TINY, "checkpoint_path": path, **changes})
    return load_checkpoint(path), keep_middle(folder, LATEST, keep)


def keep_middle(folder, latest, keep=True):
    # The save before the last one was made in the middle of the run. It takes the last one's place.
    folder, stem = Path(folder), latest.removesuffix("_latest.pt")
    if keep:
        (folder / f"{stem}_previous.pt").replace(folder / latest)
    for name in (f"{stem}_previous.pt", f"{stem}_best.pt"):
        (folder / name).unlink(missing_ok=True)


def write_models():
    whole = {}
    gone_on = {"checkpoint_interval": 9, "max_steps": 14, "keep": True, **SMALL}
    whole["muon"] = train("muon", gate="top_k", **gone_on)[0]
    two = {
        "train_data_path": ["data/train.bin", "data/other.bin"],
        "train_data_weights": [0.7, 0.3],
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    whole["adamw"] = train("adamw", optimizer="adamw", **gone_on, **two)[0]
    train("base", n_layer=2, max_steps=60, expand_factor=1)
    train("first", activation="relu", max_steps=60, **SMALL)
    apart = {"tie_embeddings": "false", "document_mask": "true", "low_rank": 4}
    train("second", gate="sparsemax", activation="gelu", max_steps=60, **apart)

    for name, folder in (("base", "folder"), ("second", "untied"), ("first", "first_export")):
        words = {"checkpoint": f"{name}/{LATEST}", "output_dir": "made", "format": "pytorch"}
        tool("export_model.py", cwd=".", **words)
        Path("made/pytorch").replace(folder)
        Path("made").rmdir()
    Path("first_export/inference.pt").replace("plain.pt")
    words = {"checkpoint": "plain.pt", "format": "onnx", "output_dir": "made"}
    tool("export_model.py", cwd=".", **words)
    Path("made/onnx").replace("onnx")
    Path("made").rmdir()
    tool("hf_integration.py", "convert", cwd=".", checkpoint="plain.pt", output_dir="hf")
    tool("quantize.py", cwd=".", checkpoint="folder", bits=8, output_dir="int8")
    some = {"calibration_data": "data/train.bin", "calibration_tokens": 512}
    tool(
        "quantize.py", cwd=".", checkpoint="folder", bits=4, output_dir="int4", group_size=8, **some
    )

    for name in ("base", "second", "first", "first_export"):
        shutil.rmtree(name)
    for file in (*Path("hf").glob("*.py"), Path("hf/README.md")):
        file.unlink()
    Path("onnx/onnx_generate.py").unlink()
    for folder in ("folder", "untied", "int8", "int4", "onnx"):
        Path(folder, "inference.pt").unlink(missing_ok=True)
        for name in ("tokenizer.json", "vocab.txt") if folder != "folder" else ():
            Path(folder, name).unlink(missing_ok=True)
    return whole


def write_adapters():
    rank = {"lora_rank": 2, "lora_alpha": 6.0}
    places = ["in_proj", "qkv"]
    kinds = {
        "lora": {"method": "lora", **rank},
        "lora_run": {"method": "lora", "target_modules": "attention.qkv", "lora_rank": 2},
        "dora": {"method": "lora", "target_modules": places, "lora_rank": 3},
        "prefix": {"method": "prefix", "prefix_length": 4},
        "state_offset": {"method": "state_offset"},
        "int4_lora": {"method": "lora", "checkpoint": "int4", **rank},
    }
    for name, flags in kinds.items():
        switches = ["--use_dora", "--use_rslora"] if name == "dora" else []
        tool("peft.py", *switches, cwd=".", **{**TUNING, "output_dir": name, **flags})
        shutil.rmtree(f"{name}/logs")
        for file in Path(name).glob("*.pt") if name != "lora_run" else ():
            file.unlink()
    whole = load_checkpoint("lora_run/adapter_latest.pt")
    keep_middle("lora_run", "adapter_latest.pt")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        Path("lora_run", name).unlink()
    return {"lora_run": whole}


def resume(whole):
    # What a run gives that goes on from a kept checkpoint; here it is what it gave at first.
    found = {}
    for name, old in whole.items():
        with tempfile.TemporaryDirectory() as place:
            shutil.copytree(".", place, dirs_exist_ok=True)
            if name == "lora_run":
                words = {"checkpoint": "folder", "output_dir": name}
                tool("peft.py", "--resume", cwd=place, **words)
                saved = load_checkpoint(Path(place, name, "adapter_latest.pt"))
            else:
                path = f"{name}/{LATEST}"
                tool("testv2.py", "--resume", cwd=place, checkpoint_path=path)
                saved = load_checkpoint(Path(place, path))
        history = saved["progress"]["history"]
        assert history == old["progress"]["history"]
        found[name] = {
            "global_step": saved["global_step"],
            "tokens_seen": saved["tokens_seen"],
            "samples": saved["data"]["samples"],
            "history": history,
        }
    return found


def least_gap(logits):
    best = logits.topk(2, dim=-1).values
    return (best[..., 0] - best[..., 1]).min().item()


@torch.no_grad()
def follow(model, ids, count):
    # The likeliest tokens after the ids, each well ahead of the second.
    state, made, piece = model.init_state(1), [], torch.tensor([ids])
    for _ in range(count):
        logits, state = model.advance(piece, state, last_only=True)
        assert least_gap(logits) > 1e-3
        piece = logits[:, -1].argmax(-1, keepdim=True)
        made.append(piece.item())
    return made


@torch.no_grad()
def logits_of(model, ids):
    return model(torch.tensor([ids]))[0, PLACES].clone()


def tokens(server, prompt, session, **settings):
    answer = server.answer(prompt, session, as_ids=True, **settings)
    with contextlib.closing(answer):
        return [token.id for chunk in answer for token in chunk.tokens]


def write_memories(ids, found, logits):
    words = {"prompt": "3 plus 4 is", "temperature": 0, "max_tokens": 12, "seed": 7}
    tool("streaming.py", cwd=".", checkpoint="folder", save_session="session.safetensors", **words)
    model = load_model("folder")
    state = model.init_state(2)
    rows = torch.tensor([ids, ids[::-1]])
    with torch.no_grad():
        _, state = model.advance(rows, state)
    state.save("state.safetensors", model)
    logits["state"] = model.advance(rows[:, :5], state, last_only=True)[0][:, -1].clone()

    server = StreamingServer("folder", device="cpu")
    found["session"] = continued(server, "session.safetensors")
    adapters = {"lora": "lora", "prefix": "prefix"}
    server = StreamingServer("folder", device="cpu", adapters=adapters)
    config = StreamingConfig(
        max_new_tokens=9,
        temperature=0.0,
        repetition_penalty=1.3,
        logit_bias={ord("7"): 2.5, ord(" "): -1.0},
        stop_ids=[ord("\n")],
        adapter="prefix",
    )
    session = server.create_session("talk", 11, config)
    tokens(server, "5 minus 2 is", session)
    server.save_session(session, "adapter_session.safetensors")
    found["adapter_session"] = continued(server, "adapter_session.safetensors", adapter="lora")


def continued(server, path, **changes):
    session = server.load_session(path)
    about = server.get_session_info(session)
    fork = server.fork_session(session)
    switched = server.fork_session(session)
    return {
        "about": {name: about[name] for name in ("position", "turns", "seed")},
        "greedy": tokens(server, " 9 plus", session),
        "drawn": tokens(server, " 9 plus", fork, temperature=0.7, max_new_tokens=16),
        "changed": tokens(server, " 1 minus", switched, **changes),
    }


def describe(ids):
    found, logits = {"ids": ids, "places": PLACES}, {}
    names = ["muon", "adamw", "folder", "untied", "plain", "hf", "int8", "int4"]
    paths = {"muon": f"muon/{LATEST}", "adamw": f"adamw/{LATEST}", "plain": "plain.pt"}
    found["paths"] = {name: paths.get(name, name) for name in names}
    found["fingerprints"] = {}
    for name, path in found["paths"].items():
        model = load_model(path)
        found["fingerprints"][name] = model.fingerprint()
        logits[name] = logits_of(model, ids)
    found["follow"] = follow(load_model("hf"), ids, 12)
    found["bases"] = {
        name: "int4" if name == "int4_lora" else "folder"
        for name in ("lora", "dora", "prefix", "state_offset", "int4_lora")
    }
    for name, base in found["bases"].items():
        model = load_model(base)
        load_adapter(model, name)
        with torch.no_grad():
            made, _ = model.advance(torch.tensor([ids]), model.init_state(1))
        logits[name] = made[0, PLACES].clone()
    found["text"] = "12 plus 7 is 19, caf\u00e9 \U0001f40d <|endoftext|>\r\n\t 3"
    found["tokens"] = {}
    for path in (
        "data/tokenizer.json",
        "data/vocab.txt",
        "words/tokenizer.json",
        "words/vocab.txt",
    ):
        tokenizer = SimpleTokenizer(path)
        assert tokenizer.decode(tokenizer.encode(found["text"])) == found["text"]
        found["tokens"][path] = {
            "size": len(tokenizer),
            "eos": tokenizer.eos_token_id,
            "ids": tokenizer.encode(found["text"]),
            "special": tokenizer.encode(found["text"], allow_special=True),
        }
    return found, logits


def lines(values):
    texts = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items())
    return "{\n" + ",\n".join(texts) + "\n}\n"


def main(out):
    Path(out).mkdir(parents=True)
    os.chdir(out)
    torch.set_num_threads(1)
    write_data()
    whole = write_models() | write_adapters()
    shutil.rmtree("logs")
    ids = [*b"7 plus 8 is 15.\n", EOS, *b"10 minus 3 is 7.\n9 plus"]
    assert len(ids) == PLACES[-1] + 1
    found, logits = describe(ids)
    write_memories(ids, found, logits)
    found["runs"] = resume(whole)
    Path("expected.json").write_text(lines(found))
    save_file(logits, "expected.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
