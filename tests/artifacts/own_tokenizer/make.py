"""Write one small artifact of every format that holds a tokenizer or its hash.

It was run from the root of the repository, and OUT was then copied to where this file lies:

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/artifacts/own_tokenizer/make.py OUT

tests/test_artifacts.py holds all later code to these files.

    data/                 tokens whose .json has the hash of the tokenizer
    run_latest.pt         a checkpoint out of the middle of a run, with the tokenizer
    custom.pt             a checkpoint that was trained with an object of another class
    folder/               a model, with the tokenizer, its chat template and its hash
    adapter/              an adapter of folder/, with the hash of the tokenizer
    session.safetensors   a session of folder/, with the hash of the tokenizer
    expected.json         what the code of that commit makes of all this
"""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models

import peft
from streaming import StreamingServer
from testv2 import Config, Trainer, load_model, main, save_folder
from tinymamba.checkpoint import save_checkpoint
from tinymamba.tokenizer import EOS_TOKEN, SimpleTokenizer

LETTERS = "0123456789 adeilmnpsu.\n"
TEXT = "5 plus 6 is 11.\n"
TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
SHAPE = {
    "d_model": 16, "n_layer": 1, "vocab_size": len(LETTERS) + 1, "dropout": 0.0, "num_heads": 2,
    "ssm_head_dim": 8, "d_state": 4, "expand_factor": 1, "window_size": 8, "chunk_size": 16,
    "block_size": 16, "batch_size": 4, "gradient_accumulation_steps": 1, "warmup_steps": 2,
    "lr": 2e-2, "device": "cpu", "amp_dtype": "float32", "use_compile": False,
    "generate_samples": False, "enable_validation": False, "max_steps": 130,
    "train_data_path": "data/train.bin",
}  # fmt: skip


class Letters:
    """A tokenizer that is no file."""

    def encode(self, text):
        return [LETTERS.index(c) for c in text]

    def decode(self, ids):
        return "".join(LETTERS[i] for i in ids)

    def __len__(self):
        return len(LETTERS) + 1


def write_data():
    Path("data").mkdir()
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(LETTERS)}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([EOS_TOKEN])
    tokenizer.save("data/tokenizer.json")
    Path("data/chat_template.jinja").write_text(TEMPLATE)
    Path("data/tokenizer_config.json").write_text(json.dumps({"eos_token": EOS_TOKEN}))
    text = "".join(f"{a} plus {b} is {a + b}.\n" for a in range(9) for b in range(9))
    made = SimpleTokenizer("data/tokenizer.json")
    ids = [*made.encode(text), made.eos_token_id]
    np.array(ids, np.uint16).tofile("data/train.bin")
    facts = {"dtype": "uint16", "vocab_size": len(made), "eos_id": made.eos_token_id}
    facts |= {"tokens": len(ids), "bytes": len(text), "tokenizer": made.sha256}
    Path("data/train.json").write_text(json.dumps(facts))
    return made


def train():
    words = [word for name, value in SHAPE.items() for word in (f"--{name}", str(value))]
    main([*words, "--checkpoint_interval", "120", "--checkpoint_path", "run_latest.pt"])
    Path("run_previous.pt").replace("run_latest.pt")
    amp = {"amp_dtype": Config.from_dict({"amp_dtype": "float32"}).amp_dtype}
    config = Config(**{**SHAPE, **amp, "max_steps": 1})
    trainer = Trainer(config, tokenizer=Letters())
    state = trainer.state()
    save_checkpoint("custom.pt", {name: state[name] for name in ("model", "config", "tokenizer")})


def answer(path, **changes):
    server = StreamingServer(path, device="cpu", **changes)
    return server.generate_text(TEXT, max_new_tokens=12, temperature=0.0)


def derive():
    model = load_model("run_latest.pt")
    Path("folder").mkdir()
    save_folder(Path("folder"), model)
    tuned = ["--checkpoint", "folder", "--output_dir", "adapter", "--train_data", "data/train.bin"]
    tuned += ["--lora_rank", "2", "--steps", "4", "--enable_validation", "false"]
    peft.main([*tuned, "--generate_samples", "false", "--device", "cpu"])
    Path("adapter/adapter_latest.pt").unlink()
    shutil.rmtree("adapter/logs")
    shutil.rmtree("logs")
    server = StreamingServer("folder", device="cpu")
    session = server.create_session("talk", 3)
    server.generate_text(TEXT, session, max_new_tokens=4, temperature=0.0)
    server.save_session(session, "session.safetensors")
    return server.generate_text("7 plus", session, max_new_tokens=12, temperature=0.0)


if __name__ == "__main__":
    out = Path(sys.argv[1]).resolve()
    out.mkdir(parents=True)
    os.chdir(out)
    with contextlib.redirect_stdout(sys.stderr):
        tokenizer = write_data()
        train()
        goes_on = derive()
    found = {
        "sha256": tokenizer.sha256,
        "text": TEXT,
        "ids": tokenizer.encode(TEXT),
        "template": TEMPLATE,
        "answers": {name: answer(name) for name in ("run_latest.pt", "folder")},
        "adapted": answer("folder", adapters={"adapter": "adapter"}),
        "session": goes_on,
    }
    Path("expected.json").write_text(json.dumps(found, indent=1) + "\n")
