"""Every command and every snippet of the README is run here, in the README's order.

Training commands are read as they stand, and then run with a few flags more that make them short.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from helpers import ROOT, flags, free_port, run_script, write_tokens
from test_container import SERVICES
from test_package import COMMANDS as INSTALLED_COMMANDS
from test_package import EXTRAS

import benchmark
import export_model
import hf_integration
from testv2 import parse_command_line

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
LINES = [line for language, body in BLOCKS if language == "bash" for line in body.splitlines()]
COMMANDS = list(dict.fromkeys(line.split("  #")[0].strip() for line in LINES))
SNIPPETS = [body for language, body in BLOCKS if language == "python" and "import" in body]
SHORT = flags(
    max_steps=2, n_layer=1, d_model=32, num_heads=2, ssm_head_dim=8, batch_size=2, block_size=16,
    validation_steps=1, generation_length=5, gradient_accumulation_steps=1, use_compile="false",
    device="cpu",
)  # fmt: skip
# By requirements-dev.txt.
INSTALLED = {"wandb", "pyarrow", "tiktoken", "onnx", "onnxscript", "onnxruntime", "transformers",
             "accelerate", "fastapi", "uvicorn", "prometheus-client"}  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A copy of the project with the files that the README's commands name."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("testv2.py", "ssm_kernels.py", "streaming.py", "peft.py", "quantize.py",
                 "export_model.py", "onnx_generate.py", "benchmark.py", "hf_integration.py",
                 "serve.py", "page.html",
                 "Makefile", "requirements.txt", "requirements-dev.txt"):  # fmt: skip
        shutil.copy(ROOT / name, folder)
    (folder / "data").mkdir()
    shutil.copy(ROOT / "data" / "prepare.py", folder / "data")
    text = "Once there was a book, and this was its text, line after line.\n" * 60
    (folder / "book.txt").write_text(text)
    (folder / "texts").mkdir()
    for i in range(25):
        (folder / "texts" / f"{i}.txt").write_text(f"Text {i}. " + text)
    for name in ("wiki.test.raw", "wiki.valid.raw"):
        (folder / name).write_text(text)
    rows = [json.dumps({"text": f"Row {i}. {text}"}) for i in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    for name in ("a", "b"):
        write_tokens(folder / f"{name}.bin", text)
    make_gpt2_stand_in(folder / "gpt2")
    return folder


def make_gpt2_stand_in(folder: Path) -> None:
    """A local folder of that name is what `from_pretrained("gpt2")` finds first, offline."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tinymamba.tokenizer import EOS_TOKEN, byte_alphabet

    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(byte_alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS_TOKEN)
    fast.save_pretrained(folder)


def random_data(workspace: Path) -> Path:
    """A folder of ids below 4,096, enough for a short run."""
    folder = workspace / "random"
    folder.mkdir(exist_ok=True)
    for name in ("train", "val"):
        write_tokens(folder / f"{name}.bin", [7 * i % 4096 for i in range(8193)])
        (folder / f"{name}.json").write_text(json.dumps({"tokens": 8193, "bytes": 30_000}))
    return folder


def run(command: list, cwd: Path, **how) -> str:
    """Run a command, offline and on one thread; its output."""
    done = run_script(command[0], *command[1:], cwd=cwd, env={"WANDB_MODE": "offline"}, **how)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_training(words: list[str], cwd: Path) -> str:
    parse_command_line(words)  # legal as written
    if "--help" in words:
        return run([cwd / "testv2.py", *words], cwd)
    extra = flags(max_steps=3) if "--resume" in words else SHORT
    return run([cwd / "testv2.py", *words, *extra], cwd)


def run_finetuning(words: list[str], cwd: Path) -> str:
    short = (
        []
        if "--adapter" in words
        else flags(steps=2, batch_size=2, block_size=16, validation_steps=1, generation_length=5)
    )
    return run([cwd / "peft.py", *words, *short], cwd)


def launch(words: list[str], cwd: Path) -> None:
    """torchrun and torch.distributed.launch, run by this Python; two nodes on one machine."""
    module = {"torchrun": "torch.distributed.run"}.get(words[0], words[2])
    rest, port = words[words.index("--nproc_per_node=2") :], str(free_port())
    command = [sys.executable, "-m", module, "--master_addr=127.0.0.1", "--master_port", port]
    nodes = ["--node_rank=0", "--node_rank=1"] if "--nnodes=2" in words else []
    commands = [[*command, "--nnodes=2", node, *rest, *SHORT] for node in nodes]
    agents = [
        subprocess.Popen(c, cwd=cwd, stderr=subprocess.PIPE, text=True)
        for c in commands or [[*command, *rest, *SHORT]]
    ]
    for agent in agents:
        _, err = agent.communicate(timeout=300)
        assert agent.returncode == 0, err


@contextlib.contextmanager
def serving(words: list[str], cwd: Path):
    """serve.py with these words, on a free port; its address."""
    command = [sys.executable, cwd / "serve.py", *words, "--port", "0"]
    with subprocess.Popen(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as server:
        try:
            said = server.stdout.readline()
            assert said.startswith("serving tinymamba_model_latest at http://")
            yield said.split()[-1]
        finally:
            server.terminate()


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, workspace):
    words = shlex.split(command)
    match words:
        case ["python", "testv2.py", "--help"]:
            with pytest.raises(SystemExit):
                parse_command_line(["--help"])
            assert "--d_model" in run([workspace / "testv2.py", "--help"], workspace)
        case ["python", "testv2.py", *rest]:
            assert run_training(rest, workspace)
        case ["python", "data/prepare.py", *rest]:
            assert "bytes per token" in run([workspace / "data/prepare.py", *rest], workspace)
        case ["python", "streaming.py", *rest]:
            talk = "Hello\n/reset\n" if "--interactive" in rest else None
            assert run([workspace / "streaming.py", *rest], workspace, input=talk)
        case ["python", "serve.py", *rest]:
            with serving(rest, workspace) as url, urllib.request.urlopen(url + "/health") as told:
                assert told.status == 200
        case ["python", "peft.py", *rest]:
            done = run_finetuning(rest, workspace)
            assert "merged.pt" in done if "--merge" in rest else "validation at step 2" in done
        case ["python", "export_model.py", *rest] if {"--aoti", "--quantize"} & {*rest}:
            # In full it takes minutes; tests/test_export_model.py runs it, marked slow.
            assert export_model.parse([*rest, "--output_dir", str(workspace / "made")])
        case ["python", "export_model.py", *rest]:
            quick = ["--format", "torchscript"] if "all" in rest else []
            quick += ["--vocab_file", "data/text/tokenizer.json"]  # the last run had other data
            assert "MB" in run([workspace / "export_model.py", *rest, *quick], workspace)
        case ["python", "exported_models/onnx/onnx_generate.py", *rest]:
            assert "import os" in run([workspace / words[1], *rest], workspace)
        case ["python", "quantize.py", *rest]:
            small = flags(calibration_tokens=512, group_size=8) if "4" in rest else []
            done = run([workspace / "quantize.py", *rest, *small], workspace)
            assert "ssm state" in done if "--report" in rest else "of float32" in done
        case ["python", "hf_integration.py", "convert", *rest]:
            assert "made of" in run([workspace / "hf_integration.py", *words[2:]], workspace)
        case ["python", "hf_integration.py", "push", *rest]:
            # tests/test_hf_integration.py sends a folder to a hub of its own.
            assert hf_integration.parse(words[2:])
        case ["python", "benchmark.py", *rest] if "lm_eval" in rest:
            assert benchmark.parse(rest).tasks  # its data would have to be fetched
        case ["transformers", "serve", folder, *rest]:
            # tests/test_hf_integration.py starts it, marked slow.
            assert folder == "./hf_model" and "--trust-remote-code" in rest
        case ["lm_eval", *rest]:
            assert "--model_args" in rest
            check([sys.executable, "-m", "lm_eval", "run", "--help"], workspace)
        case ["python", "benchmark.py", *rest]:
            small = flags(
                d_model=32,
                n_layer=1,
                vocab_size=64,
                sequence_lengths=16,
                tokens_per_step=32,
                test_iterations=1,
                compile="off",
                output_dir=f"results{COMMANDS.index(command)}",
            )
            assert "llama" in run([ROOT / "benchmark.py", *rest, *small], workspace)
        case ["python", "benchmarks/quality.py", *rest]:
            small = flags(steps=1, seeds=0, validation_tokens=8192, data=random_data(workspace))
            assert "bits_per_byte" in run(
                [ROOT / "benchmarks/quality.py", *rest, *small], workspace
            )
        case ["python", "benchmarks/streaming.py", *rest]:
            small = flags(contexts=[8], llama_context=8, tokens=2, sessions=2, rounds=2)
            eager = [word for word in rest if word != "--compile"]  # tests/test_streaming.py does
            assert "sessions" in run([ROOT / "benchmarks/streaming.py", *eager, *small], workspace)
        case ["python", "benchmarks/quantize.py", *rest]:
            small = flags(
                calibration_tokens=512,
                val_tokens=512,
                group_size=8,
                d_model=96,
                n_layer=1,
                tokens=2,
                rounds=2,
            )
            assert "random weights" in run(
                [ROOT / "benchmarks/quantize.py", *rest, *small], workspace
            )
        case ["python", "benchmarks/serve.py", *rest]:
            small = flags(streams=2, seconds=1, tokens=4, disconnects=3)
            assert "errors 0" in run([ROOT / "benchmarks/serve.py", *rest, *small], workspace)
        case ["python", "benchmarks/finetune.py", *rest]:
            assert "style" in run(
                [
                    ROOT / "benchmarks/finetune.py",
                    *rest,
                    "--steps",
                    "2",
                    "--methods",
                    "lora",
                    "--tasks",
                    "style",
                ],
                workspace,
            )
        case ["python", "-m", "torch.distributed.launch", *_] | ["torchrun", *_]:
            launch(words, workspace)
        case ["python", "-m", "pytest"]:
            check([sys.executable, "-m", "pytest", "--collect-only", "-q"], ROOT)
        case ["pip", "install", target] if target.startswith("."):  # tests/test_package.py does
            assert target == "." or target[2:-1] in EXTRAS
        case ["tinymamba", "--help"]:
            assert {"prepare", "train", "generate"} <= INSTALLED_COMMANDS.keys()
        case ["tinymamba", name, *_]:  # as a script it is run where that stands
            script = INSTALLED_COMMANDS[name][0]
            assert command.replace(f"tinymamba {name}", f"python {script}") in COMMANDS
        case ["docker", "build", "--tag", _, *rest, "."]:  # see tests/test_container.py
            assert rest in ([], ["--build-arg", "DEVICE=cuda"])
        case ["docker", "compose", *_, service]:
            assert service in SERVICES
        case ["make", target]:
            assert target in ("demo", "test")
            check(["make", "--dry-run", target], workspace)
        case ["pip", "install", "-r", file]:
            assert (ROOT / file).read_text()
        case ["pip", "install", *packages]:
            packages = [re.match(r"[\w-]+", package)[0] for package in packages]
            assert INSTALLED.issuperset(packages)
            modules = ", ".join(packages).replace("-", "_")
            check([sys.executable, "-c", f"import {modules}"], workspace)
        case ["ruff", *rest]:
            check([sys.executable, "-m", "ruff", *rest], ROOT)
        case ["tensorboard", *rest]:
            shown = check([sys.executable, "-m", "tensorboard.main", *rest, "--inspect"], workspace)
            assert "train/loss" in shown
        case ["python", "-m", "venv", _]:
            check([sys.executable, "-m", "venv", "--without-pip", "venv"], workspace)
        case ["source", *_] | ["git", "clone", _] | ["cd", "tinymamba"]:
            assert workspace.exists()
        case _:
            pytest.fail(f"no test knows how to run this command: {command}")


def check(command: list, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet(number, workspace, tmp_path):
    snippet, folder = SNIPPETS[number], workspace
    if "tofile" in snippet:  # it writes data of its own
        folder = tmp_path
        (folder / "data" / "text").mkdir(parents=True)
        shutil.copytree(workspace / "gpt2", folder / "gpt2")
    if "load_adapter" in snippet:  # of the checkpoint that the last command has left
        for words in (shlex.split(c)[2:] for c in COMMANDS if c.startswith("python peft.py")):
            if {"lora", "prefix"} & set(words):
                run_finetuning([*words, "--force"], workspace)
    for i in (1, 2, 3):
        write_tokens(workspace / "data" / "text" / f"dataset{i}.bin", "words " * 2000)
    with contextlib.ExitStack() as stack:
        if "http://127.0.0.1:8000" in snippet:
            url = stack.enter_context(serving([], workspace))
            snippet = snippet.replace("http://127.0.0.1:8000", url)
        (folder / "snippet.py").write_text(snippet)
        run([folder / "snippet.py"], folder)
    if "tofile" in snippet:
        assert (folder / "data/text/train.bin").stat().st_size % 4 == 0
