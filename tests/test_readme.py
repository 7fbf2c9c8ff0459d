"""README.md and docs/: every command and every Python snippet runs, every link leads somewhere.

All run in one folder, on a tiny model. RUNS says how a command of a script is made short, CHECKS
how all other commands are tested. Scripts run in this process: the tests of each script start it.
"""

import contextlib
import importlib
import importlib.metadata
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import (
    EXTRAS,
    FIRST_FORM,
    ROOT,
    SERVICES,
    flags,
    run_main,
    train_bpe,
    wide,
    write_conversations,
    write_tokens,
)
from torch.distributed.run import get_args_parser

import benchmark
import export_model
import hf_integration
import serve
from benchmarks import ladder, ledger, quality, web
from data import prepare
from testv2 import Config, parse_command_line, save_folder
from tinymamba import __main__ as package
from tinymamba import documents
from tinymamba.cli import parse_flags
from tinymamba.documents import Corpus, Reading
from tinymamba.tokenizer import EOS_TOKEN, byte_tokenizer
from tinymamba.web_site import CHAT, RUNTIME

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{{- '<|im_end|>' + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
README = ROOT / "README.md"
DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = {path: path.read_text(encoding="utf-8") for path in (README, *DOCS)}


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)


def commands_in(text: str) -> list[str]:
    """The lines of its bash blocks, without comments."""
    lines = "".join(code_blocks(text, "bash")).splitlines()
    commands = [re.sub(r"(^|\s+)# .*", "", line).strip() for line in lines]
    return [command for command in commands if command]


COMMANDS = list(dict.fromkeys(c for text in PAGES.values() for c in commands_in(text)))
BLOCKS = list(dict.fromkeys(b for text in PAGES.values() for b in code_blocks(text, "python")))
SNIPPETS = [block for block in BLOCKS if "import" in block]
PREPARE, TRAIN = "python data/prepare.py", "python testv2.py --preset demo"

# ---------------------------------------------------------------------------------- the folder


class Workspace:
    """A folder in which each command runs once, after those whose output it reads."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.printed: dict[str, str] = {}
        self.closing = contextlib.ExitStack()
        self.url = ""

    def run(self, command: str) -> str:
        """What the command prints."""
        if command not in self.printed:
            self.make_inputs(command)
            self.printed[command] = self.execute(command)
        return self.printed[command]

    def make_inputs(self, text: str) -> None:
        """Run the commands that make what a command or a snippet reads."""
        for name, command in MAKERS.items():
            if name in text and command != text:
                self.run(command)

    def execute(self, command: str) -> str:
        row = next((row for row in RUNS if re.match(row.pattern, command)), None)
        assert row, f"no row of RUNS or CHECKS is for this command: {command}"
        words = shlex.split(command)
        script, *argv = words[2:] if words[1] == "-m" else words[1:]
        if row.module == "benchmarks.streaming":  # its tests compile and export
            argv = [word for word in argv if word not in ("--compile", "--engine", "onnx")]
        argv += row.short
        if script == "testv2.py" and command != TRAIN:
            path = f"run{len(self.printed)}.pt"  # the others' checkpoint stays as it is
            shutil.copy(self.folder / "tinymamba_model_latest.pt", self.folder / path)
            argv += ["--checkpoint_path", path]
        if script == "benchmark.py":
            argv += ["--output_dir", f"results{len(self.printed)}"]
        main = importlib.import_module(row.module).main
        done = run_main(main, *argv, cwd=self.folder, input="Hello\n/reset\n")
        assert done.returncode in (None, 0), done.stderr
        assert row.says in done.stdout + done.stderr
        return done.stdout

    def server(self) -> str:
        """The address of a server that runs until the end."""
        self.url = self.url or self.closing.enter_context(serving([], self.folder))
        return self.url


@contextlib.contextmanager
def serving(words: list[str], folder: Path) -> Iterator[str]:
    """serve.py with these words, on a free port; its address."""
    command = [sys.executable, str(ROOT / "serve.py"), *words, "--port", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            line = server.stdout.readline()
            assert line.startswith("serving tinymamba_model_latest at http://")
            yield line.split()[-1]
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Workspace]:
    """A folder with the files that commands name, prepared data and a trained model."""
    folder = tmp_path_factory.mktemp("readme")
    text = "Once there was a book, and this was its text, line after line.\n" * 60
    (folder / "texts").mkdir()
    files = ["book.txt", "wiki.test.raw", "wiki.valid.raw", *(f"texts/{i}.txt" for i in range(25))]
    for i, name in enumerate(files):
        (folder / name).write_text(f"Text {i}. " + text)
    rows = [json.dumps({"text": f"Row {i}. {text}"}) for i in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    said = [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(40)]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, said)))
    pairs = [{"prompt": f"Say {i}.", "chosen": f"{i}.", "rejected": "No."} for i in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    for name in ("a", "b"):
        write_tokens(folder / f"{name}.bin", text)
    (folder / "preferences").mkdir()
    pair = [([5, 6, answer, 0], [0, 0, 1, 0]) for answer in (7, 8)]
    for name in ("train", "val"):
        write_conversations(folder / "preferences", name, pair * 4, {"kind": "preferences"})
    (folder / "random").mkdir()
    for name in ("train", "val"):
        write_tokens(folder / "random" / f"{name}.bin", [7 * i % 4096 for i in range(16385)])
        counts = json.dumps({"tokens": 16385, "bytes": 60_000})
        (folder / "random" / f"{name}.json").write_text(counts)
    (folder / "data" / "python").mkdir(parents=True)
    (folder / "bytes").mkdir()
    (folder / "carry.jsonl").touch()
    for name in ("train", "val"):
        write_tokens(folder / "data" / "python" / f"{name}.bin", text * 2)
        write_tokens(folder / "bytes" / f"{name}.bin", [65] * 16385)
    (folder / "docs").mkdir()
    for name in ("ablations.md", "ablations.jsonl", "benchmarks.md", "training.md"):
        shutil.copy(ROOT / "docs" / name, folder / "docs")
    save_stand_in_for_gpt2(folder / "gpt2")
    save_folder(folder / "first_form", wide(n_layer=1, **FIRST_FORM))
    byte_tokenizer().save(str(folder / "first_form" / "tokenizer.json"))
    tokenizer = train_bpe(EOS_TOKEN, "<|im_start|>", "<|im_end|>")
    save_folder(folder / "chat_model", wide(n_layer=1, vocab_size=320))
    tokenizer.save(str(folder / "chat_model" / "tokenizer.json"))
    (folder / "chat_model" / "chat_template.jinja").write_text(CHATML)
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    (folder / "held_out.jsonl").write_text(json.dumps({"messages": said}))
    workspace, sample = Workspace(folder), Corpus(None, Reading(), []).files[:40]
    sample = [file for file in sample if file.size < 30_000]
    with pytest.MonkeyPatch.context() as patch, workspace.closing:
        patch.setenv("WANDB_MODE", "offline")
        patch.setattr(documents, "sample_files", lambda _: sample)
        small = {"d_model": 64, "n_layer": 1, "num_heads": 1, "ssm_head_dim": 64}
        for task in ("M", "M-small"):  # with their own sizes a step takes seconds
            patch.setitem(quality.TASKS, task, quality.TASKS[task]._replace(block=320, batch=1))
            patch.setitem(quality.OURS, task, small)
        patch.setattr(ladder, "LENGTH", 512)
        patch.setattr(export_model, "STREAMED", 100)  # tokens that --verify reads one by one
        patch.setattr(ledger, "SIZES", ledger.Sizes({**small, "vocab_size": 64}, batch=1))
        workspace.run(PREPARE)
        workspace.run(TRAIN)
        for i in (1, 2, 3):
            write_tokens(folder / "data" / "text" / f"dataset{i}.bin", "words " * 2000)
        yield workspace


def save_stand_in_for_gpt2(folder: Path) -> None:
    """`from_pretrained("gpt2")` takes a local folder of that name first, without the network."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tinymamba.tokenizer import EOS_TOKEN, byte_alphabet

    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(byte_alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS_TOKEN)
    fast.save_pretrained(folder)


# ------------------------------------------------------------------------- commands of scripts

TINY = flags(
    max_steps=2, n_layer=1, d_model=32, num_heads=2, ssm_head_dim=8, vocab_size=512, batch_size=2,
    block_size=16, validation_steps=1, generation_length=5, gradient_accumulation_steps=1,
    use_compile="false", device="cpu",
)  # fmt: skip
BRIEF = flags(steps=2, batch_size=2, block_size=16, validation_steps=1, generation_length=5)
CALIBRATION = flags(calibration_tokens=512, group_size=8)
COMPARISON = flags(
    d_model=32, n_layer=1, vocab_size=64, sequence_lengths=16, tokens_per_step=32,
    warmup_iterations=1, test_iterations=1, models_to_compare="llama", compile="off",
)  # fmt: skip
TRAINED = flags(tinymamba_checkpoint="tinymamba_model_latest.pt")
PARTS = flags(
    d_model=64, n_layer=1, num_heads=1, vocab_size=64, sequence_lengths=16, tokens_per_step=16,
    warmup_iterations=0, test_iterations=1,
)  # fmt: skip
TASK = flags(steps=1, seeds=0, test_samples=2, d_model=32, batch_size=2)


class Run(NamedTuple):
    """How a command runs: the module whose main(argv) it is, and flags that make it short."""

    pattern: str
    module: str
    short: list[str] = []
    says: str = ""  # a part of what it prints


RUNS = [  # the first pattern that a command begins with counts
    Run(r"python testv2.py --help", "testv2", says="--d_model"),
    Run(r"python testv2.py --resume", "testv2", flags(max_steps=3), "validation at step 3"),
    Run(r"python testv2.py", "testv2", TINY),
    Run(r"python data/prepare.py --chat", "data.prepare", flags(vocab_size=300), "tokens count"),
    Run(r"python data/prepare.py --teacher", "data.prepare", says="ids for each"),
    Run(r"python data/prepare.py", "data.prepare", flags(vocab_size=300), "bytes per token"),
    Run(r"python -m data.instructions", "data.instructions", says="rows ("),
    Run(r"python streaming.py --help", "streaming", says="--prompt"),
    Run(r"python streaming.py", "streaming", flags(max_tokens=8)),
    Run(r"python peft.py .*--merge", "peft", says="merged.pt"),
    Run(r"python peft.py .*--objective", "peft", [*BRIEF, "--block_size", "32"], "reward accuracy"),
    Run(r"python peft.py", "peft", BRIEF, "validation at step 2"),
    Run(r"python quantize.py .*--report", "quantize", CALIBRATION, "ssm state"),
    Run(r"python quantize.py .*--bits 4", "quantize", CALIBRATION, "of float32"),
    Run(r"python quantize.py", "quantize", says="of float32"),
    Run(
        r"python export_model.py .*onnx",
        "export_model",
        flags(seq_length=8, checkpoint="first_form"),  # of few operators: each takes long to trace
        "MB",
    ),
    Run(
        r"python export_model.py",
        "export_model",
        flags(format="pytorch", checkpoint="first_form"),
        "MB",
    ),
    Run(r"python hf_integration.py", "hf_integration", says="made of"),
    Run(r"python benchmark.py --help", "benchmark", says="--tasks"),
    Run(r"python benchmark.py .*chat", "benchmark", flags(answer_tokens=4), "1 answers: "),
    Run(r"python benchmark.py .*perplexity", "benchmark", flags(sequence_lengths=16), "perplexity"),
    Run(
        r"python benchmark.py --preset",
        "benchmark",
        [*COMPARISON, "--benchmark_type", "training"],
        "llama",
    ),
    Run(
        r"python benchmark.py .*memory",  # each model is measured in a process of its own
        "benchmark",
        [*COMPARISON, "--models_to_compare", "tinymamba"],
        "tinymamba",
    ),
    Run(r"python benchmark.py", "benchmark", COMPARISON, "llama"),
    Run(
        r"python -m benchmarks.quality S",
        "benchmarks.quality",
        flags(steps=1, seeds=0, validation_tokens=1024),
        "bits_per_byte",
    ),
    Run(
        r"python -m benchmarks.quality M-small",
        "benchmarks.quality",
        flags(steps=1, seeds=0, validation_tokens=8192, data="random", models="tinymamba"),
        "bits_per_byte",
    ),
    Run(
        r"python -m benchmarks.quality M",
        "benchmarks.quality",
        flags(steps=1, seeds=0, lr=8e-3, validation_tokens=8192, data="random", models="tinymamba"),
        "bits_per_byte",
    ),
    Run(
        r"python -m benchmarks.streaming",
        "benchmarks.streaming",
        [*flags(contexts=8, llama_context=8, tokens=2, sessions=2, rounds=2), *TRAINED],
        "sessions",
    ),
    Run(
        r"python -m benchmarks.quantize",
        "benchmarks.quantize",
        [*CALIBRATION, *flags(val_tokens=512, d_model=96, n_layer=1, tokens=2, rounds=2)],
        "random weights",
    ),
    Run(
        r"python -m benchmarks.serve",
        "benchmarks.serve",
        flags(streams=2, seconds=1, tokens=4, disconnects=3, words=40, chats=2),
        "errors 0",
    ),
    Run(
        r"python -m benchmarks.finetune",
        "benchmarks.finetune",
        flags(steps=2, methods="lora", tasks="style"),
        "style",
    ),
    Run(
        r"python -m benchmarks.assistant",
        "benchmarks.assistant",
        flags(rows=1, max_tokens=4),
        "name right",
    ),
    Run(
        r"python -m benchmarks.memory recall",
        "benchmarks.memory",
        [*TASK, *flags(length=32, pairs=2, vocab_size=32)],
        "accuracy",
    ),
    Run(
        r"python -m benchmarks.memory far_copy",
        "benchmarks.memory",
        [*TASK, *flags(data="random", models="tinymamba")],
        "loss",
    ),
    Run(r"python -m benchmarks.carry --table", "benchmarks.carry"),
    Run(
        r"python -m benchmarks.carry",
        "benchmarks.carry",
        flags(tokens=64, block=32, long=64, d_model=32, n_layer=1, seeds=0, texts=1, data="bytes"),
        "bits",
    ),
    Run(
        r"python -m benchmarks.ladder",
        "benchmarks.ladder",
        flags(steps=1, d_model=32, lr=8e-3),
        "bits_per_byte",
    ),
    Run(
        r"python -m benchmarks.data",
        "benchmarks.data",
        flags(text="texts", megabytes=0.1, vocab_size=300, steps=0, workers=1),
        "mb_per_second",
    ),
    Run(r"python -m benchmarks.memory", "benchmarks.memory", [*TASK, *flags(read=16)], "accuracy"),
    Run(r"python -m benchmarks.parts .*window", "benchmarks.parts", PARTS, "window_size=512"),
    Run(r"python -m benchmarks.parts", "benchmarks.parts", PARTS, "memory=false"),
    Run(r"python -m benchmarks.ledger .*--only", "benchmarks.ledger", says="passes "),
    Run(
        r"python -m benchmarks.ledger",
        "benchmarks.ledger",
        [*flags(only="loss_head", output="ledger.jsonl"), "--dry_run"],
        "loss_head ",
    ),
    Run(r"python -m benchmarks.sharding", "benchmarks.sharding", says="7B"),
    Run(
        r"python -m benchmarks.step",
        "benchmarks.step",
        flags(d_model=64, n_layer=1, num_heads=1, vocab_size=64, block_size=16, steps=1),
        "SSM: scan",
    ),
    Run(
        r"python -m benchmarks.muon",
        "benchmarks.muon",
        flags(d_model=64, n_layer=1, num_heads=1, vocab_size=64, processes=[1, 2]),
        "| ddp | 2 | 1 | ",
    ),
    Run(
        r"python -m benchmarks.context",
        "benchmarks.context",
        flags(tokens=64, processes=1),
        "gradient norm",
    ),
    Run(
        r"python -m benchmarks.scan",
        "benchmarks.scan",
        flags(batch_sizes=1, sequence_lengths=16),
        "mamba2",
    ),
    Run(
        r"python -m benchmarks.gpu",
        "benchmarks.gpu",
        ["--tiny", "--force", *flags(stages="ceilings")],
        "copy in memory",
    ),
    Run(
        r"python -m benchmarks.ablations .*--run",
        "benchmarks.ablations",
        flags(run="no_gate gate=none steps=1", output="runs.jsonl"),
        "nats_per_byte",
    ),
    Run(r"python -m benchmarks.ablations", "benchmarks.ablations"),
]
MAKERS = {  # what a command or a snippet reads, and the command that makes it
    found[1]: command
    for command in COMMANDS
    if (found := re.search(r"--output_dir (?:\./)?(\S+)", command))
} | {"onnx_generate": "python export_model.py --format onnx --optimize --benchmark --force"}

# ---------------------------------------------------------------------------- other commands


def check_script(place: Workspace, words: list[str]) -> None:
    place.run(shlex.join(words))


def check_slow_export(place: Workspace, words: list[str]) -> None:
    """In full it takes minutes; tests/test_export_model.py does that."""
    options = export_model.parse([*words[2:], "--output_dir", str(place.folder / "exported")])
    assert Path(options.checkpoint) == Path("tinymamba_model_latest.pt")


def check_dataset(place: Workspace, words: list[str]) -> None:
    """It would have to be downloaded; tests/test_prepare_documents.py reads a local one."""
    prepare.check(parse_flags(prepare.Options, words[2:], "", None))


def check_push(place: Workspace, words: list[str]) -> None:
    """Tests/test_hf_integration.py uploads a folder to a hub of its own."""
    assert hf_integration.parse(words[2:])


def check_lm_eval(place: Workspace, words: list[str]) -> None:
    """Its tasks would have to be downloaded."""
    from lm_eval._cli import HarnessCLI

    if words[0] == "python":
        assert benchmark.parse(words[2:]).tasks
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        assert HarnessCLI().parse_args().model == "hf"


def check_onnx_generate(place: Workspace, words: list[str]) -> None:
    place.make_inputs(words[1])
    assert "import os" in check_output([sys.executable, *words[1:]], place.folder)


def check_serve(place: Workspace, words: list[str]) -> None:
    with serving(words[2:], place.folder) as url, urllib.request.urlopen(url + "/health") as got:
        assert got.status == 200


def check_several(place: Workspace, words: list[str]) -> None:
    """Tests/test_session_store.py has a store, and servers that share it."""
    flags = [word for word in words[2:] if word not in ("--replicas", "2")]
    assert serve.parse(flags).session_store == "redis://127.0.0.1:6379/0"


def check_valkey(place: Workspace, words: list[str]) -> None:
    """As in compose.yaml."""
    assert words == SERVICES["store"]["command"]


def check_curl(place: Workspace, words: list[str]) -> None:
    _, address, header, named, data, body = words
    assert (header, data) == ("-H", "-d")
    url = address.replace("http://127.0.0.1:8000", place.server())
    request = urllib.request.Request(url, body.encode(), dict([named.split(": ")]))
    with urllib.request.urlopen(request) as got:
        assert json.load(got)["choices"][0]["text"]


def check_launch(place: Workspace, words: list[str]) -> None:
    """Training in several processes is run in tests/test_training.py, test_reliability.py,
    test_context_parallel.py and test_package.py."""
    arguments = words[words.index("torch.distributed.launch") + 1 if "-m" in words[:2] else 1 :]
    given = get_args_parser().parse_args(arguments)
    assert given.training_script == ("tinymamba.testv2" if given.module else "testv2.py")
    assert given.nproc_per_node in ("2", "8") and parse_command_line(given.training_script_args)


def check_slurm(place: Workspace, words: list[str]) -> None:
    """Tests/test_examples.py runs the job."""
    assert (ROOT / words[1]).is_file() and parse_command_line(words[2:])


def check_timed_training(place: Workspace, words: list[str]) -> None:
    assert parse_command_line(words[words.index("testv2.py") + 1 :])


def check_tinymamba(place: Workspace, words: list[str]) -> None:
    """The package's command runs a script, which is run in the same way."""
    if words[1] == "--help":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            assert "prepare" in run_main(lambda argv: package.main()).stdout
        return
    script = package.COMMANDS[words[1]][0]
    command = f"python {script} {shlex.join(words[2:])}".replace("'", '"').strip()
    assert command in COMMANDS
    place.run(command)


def check_pip(place: Workspace, words: list[str]) -> None:
    """Tests/test_package.py installs the package."""
    match words[2:]:
        case ["-r", file]:
            assert (ROOT / file).is_file()
        case ["."] | ["-e", "."]:
            pass
        case [target] if target.startswith(".["):
            assert target[2:-1] in EXTRAS
        case packages:
            for package_name in {re.match(r"[\w-]+", name)[0] for name in packages} - NOT_USED:
                assert importlib.metadata.version(package_name)


NOT_USED = {"torchvision", "torchaudio"}  # of the first README's command
NOT_USED |= {"ray"}  # large; tests/test_examples.py has a stand-in


def check_make(place: Workspace, words: list[str]) -> None:
    check_output(["make", "--dry-run", *words[1:]], ROOT)


def check_style(place: Workspace, words: list[str]) -> None:
    check_output([sys.executable, "-m", *words], ROOT)


def check_pytest(place: Workspace, words: list[str]) -> None:
    """Pytest takes the flags; mypy is run by make test itself."""
    files = [word for word in words if word.endswith(".py")]
    assert all((ROOT / name).is_file() for name in files)
    if "pytest" in words:
        (place.folder / "test_alone.py").write_text("def test_alone(): pass")
        rest = [word for word in words[1:] if word not in files]
        alone = [str(place.folder / "test_alone.py"), "--collect-only", "-n", "0", "--noconftest"]
        settings = ["-p", "no:cacheprovider", "-c", "pyproject.toml"]
        check_output([sys.executable, *rest, *alone, *settings], ROOT)
    else:
        assert importlib.metadata.version("mypy") and "[tool.mypy]" in read_pyproject()


def read_pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def check_tensorboard(place: Workspace, words: list[str]) -> None:
    from tensorboard import default, program

    board = program.TensorBoard(default.get_plugins())
    board.configure(argv=[*words, "--inspect"])
    done = run_main(lambda argv: board.main(), cwd=place.folder)
    assert "train/loss" in done.stdout


def check_docker(place: Workspace, words: list[str]) -> None:
    """Tests/test_container.py reads the files."""
    if words[1] == "compose":
        assert words[-1] in SERVICES
    else:
        assert words[4:-1] in ([], ["--build-arg", "DEVICE=cuda"]) and words[-1] == "."


def check_transformers_serve(place: Workspace, words: list[str]) -> None:
    """Tests/test_hf_integration.py starts it, marked slow."""
    assert words[2] == "./hf_model" and "--trust-remote-code" in words


def check_venv(place: Workspace, words: list[str]) -> None:
    check_output([sys.executable, *words[1:3], "--without-pip", words[3]], place.folder)
    assert (place.folder / words[3] / "pyvenv.cfg").is_file()


def check_shell(place: Workspace, words: list[str]) -> None:
    assert words[0] in ("source", "git", "cd")


def check_output(command: list[str], cwd: Path) -> str:
    """What a process prints that must end well."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_engine(place: Workspace, words: list[str]) -> None:
    """An export takes seconds; tests/test_onnx_engine.py has one."""
    parsed = importlib.import_module(words[1].removesuffix(".py")).parse(words[2:])
    options = parsed[0] if isinstance(parsed, tuple) else parsed
    assert options.engine == "onnx"


def check_web_export(place: Workspace, words: list[str]) -> None:
    """tests/test_web.py makes a site; here the npm packages may be missing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_model, "find_runtime", lambda given: given)
        check_slow_export(place, words)


def check_npm(place: Workspace, words: list[str]) -> None:
    """The packages have the versions of package.json, and are those that an export needs."""
    pinned = json.loads((ROOT / "package.json").read_bytes())["dependencies"]
    named = dict(word.rsplit("@", 1) for word in words[3:])
    assert words[:3] == ["npm", "install", "--no-package-lock"]
    assert named.items() <= pinned.items()
    assert named == {name: package.version for name, package in {**RUNTIME, **CHAT}.items()}


def check_web_benchmark(place: Workspace, words: list[str]) -> None:
    """tests/test_web_page.py runs it."""
    options = parse_flags(web.Options, words[3:], "", "")
    assert options.site == Path("site")


def check_file_server(place: Workspace, words: list[str]) -> None:
    """It takes these flags; it would serve for ever."""
    check_output([sys.executable, *words[1:3], "--help", *words[3:]], place.folder)


CHECKS = [
    (r"npm install ", check_npm),
    (r"python -m benchmarks.web ", check_web_benchmark),
    (r"python -m http.server ", check_file_server),
    (r"python export_model.py .*--format web", check_web_export),
    (r"python (streaming|serve).py .*--engine onnx", check_engine),
    (r"python export_model.py .*(--aoti|--quantize|onnx_models)", check_slow_export),
    (r"python data/prepare.py --dataset ", check_dataset),
    (r"python hf_integration.py push ", check_push),
    (r"(python benchmark.py .*)?lm_eval ", check_lm_eval),
    (r"python exported_models/onnx/onnx_generate.py ", check_onnx_generate),
    (r"python (serve|examples/ray_serve).py .*redis://", check_several),
    (r"valkey-server ", check_valkey),
    (r"python serve.py ", check_serve),
    (r"curl ", check_curl),
    (r"(python -m torch.distributed.launch|torchrun) ", check_launch),
    (r"sbatch ", check_slurm),
    (r"/usr/bin/time ", check_timed_training),
    (r"tinymamba ", check_tinymamba),
    (r"pip install ", check_pip),
    (r"make (demo|assistant|site|test|chaos)$", check_make),
    (r"ruff ", check_style),
    (r"python -m pytest|mypy$", check_pytest),
    (r"tensorboard ", check_tensorboard),
    (r"docker (build --tag|compose) ", check_docker),
    (r"transformers serve ", check_transformers_serve),
    (r"python -m venv ", check_venv),
    (r"(source|git clone|cd) ", check_shell),
    (r"python ", check_script),
]


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command(command, place):
    check = next((check for pattern, check in CHECKS if re.match(pattern, command)), None)
    assert check, f"no row of CHECKS is for this command: {command}"
    if check is check_script:
        place.run(command)
    else:
        check(place, shlex.split(command))


def test_the_tests_are_those_of_the_makefile():
    recipe = re.search(r"^test: .*\n((\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    in_make = [re.sub(r"^\t.*?\$\(BIN\)/", "", line) for line in recipe.splitlines()]
    block = next(b for b in code_blocks(PAGES[README], "bash") if "requirements-dev" in b)
    assert block.splitlines()[1:] == in_make


# ----------------------------------------------------------------------------------- snippets


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet(number, place, tmp_path):
    snippet, folder = SNIPPETS[number], place.folder
    place.make_inputs(snippet)
    if "tofile" in snippet:  # it writes data of its own
        folder = tmp_path
        (folder / "data" / "text").mkdir(parents=True)
        shutil.copytree(place.folder / "gpt2", folder / "gpt2")
    if "http://127.0.0.1:8000" in snippet:
        snippet = snippet.replace("http://127.0.0.1:8000", place.server())
    (folder / "snippet.py").write_text(snippet)
    done = run_main(lambda argv: runpy.run_path("snippet.py") and None, cwd=folder)
    assert done.returncode is None, done.stderr
    if "tofile" in snippet:
        assert (folder / "data/text/train.bin").stat().st_size % 4 == 0


def test_the_fields_of_config_have_the_defaults_that_are_listed():
    listed = {}
    exec(next(b for b in BLOCKS if b.startswith("class Config:")), {"torch": torch}, listed)
    values = {name: v for name, v in vars(listed["Config"]).items() if not name.startswith("__")}
    assert len(values) == 45
    assert values == {name: getattr(Config, name) for name in values}


def test_packages_by_name_are_those_that_are_required():
    lines = [c for c in commands_in(PAGES[ROOT / "docs/install.md"]) if "numpy" in c or "saf" in c]
    named = {word for line in lines for word in shlex.split(line)[2:]} - NOT_USED
    required = (ROOT / "requirements.txt").read_text().splitlines()
    assert named == {re.match(r"[\w-]+", line)[0] for line in required}


# ------------------------------------------------------------------------------ pages and links


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def anchors(text: str) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(text), flags=re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def links(path: Path) -> list[tuple[Path, str]]:
    """The file and the anchor of every relative link."""
    found = re.findall(r"\]\(([^()\s]+)\)", prose(path.read_text(encoding="utf-8")))
    parts = [target.partition("#") for target in found if not re.match(r"\w+:", target)]
    return [((path.parent / name).resolve() if name else path, at) for name, _, at in parts]


def test_the_readme_is_short():
    assert len(PAGES[README]) < 11_000


@pytest.mark.parametrize("path", sorted({*PAGES, *ROOT.glob("*.md")}), ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    for target, anchor in links(path):
        assert target.exists(), target
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{target}#{anchor}"


def test_every_page_is_linked_from_the_readme():
    assert {*DOCS} <= {target for target, _ in links(README)}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_a_page_starts_with_what_one_came_for(path):
    assert re.match(r"# [^\n]+\n\n```(bash|python)\n", PAGES[path])


def test_the_tests_that_reliability_names_exist():
    named = re.findall(r"`(test_\w+?)(_\.\.\.)?`", PAGES[ROOT / "docs/reliability.md"])
    tests = (ROOT / "tests/test_reliability.py").read_text()
    assert len(named) > 20
    for name, rest in named:
        assert re.search(rf"def {name}" + (r"_" if rest else r"\("), tests), name


# What the first README documents, and the page on which it is now.
PROMISED = {
    "README.md": """Installation|License|state space|gate|RMSNorm|scan|DeepNet|low-rank
        |Weights & Biases|profiling|TorchScript|LoRA|prefix|streaming""",
    "docs/install.md": """pip install torch torchvision torchaudio numpy tqdm tensorboard
        |pip install wandb|pip install onnx|git clone https://github.com/NimraProject/tinymamba.git
        |source venv/bin/activate|## Container|## As a package""",
    "docs/data.md": """# Preparing Training Data|token_array.tofile("data/text/train.bin")|vocab.txt
        |## Adding a Custom Tokenizer|class HuggingFaceTokenizerWrapper:
        |## Using Multiple Datasets|train_dataset = StreamingTokenDataset(""",
    "docs/training.md": """## Basic Training|## Distributed Training (Multiple GPUs)
        |python -m torch.distributed.launch --nproc_per_node=2 testv2.py
        |## Configuration|class Config:|## Logging and Monitoring|### TensorBoard
        |tensorboard --logdir=./logs|### Weights & Biases|use_wandb = True""",
    "docs/export.md": """# Exporting a Trained Model|`--checkpoint`|`--output_dir`|`--format`
        |`--optimize`|`--verify`|`--generate`|`--prompt`|## ONNX
        |--checkpoint ./tinymamba_model_latest.pt --format all --verify --generate
        |--format onnx --output_dir ./onnx_models""",
    "docs/architecture.md": """# Model Architecture|Token embeddings|Blocks|Output layer|RoPE|SwiGLU
        |## TokenAdaptiveGating|Token Content → Lightweight Controller → Dynamic Branch Weights""",
    "docs/finetuning.md": """# Parameter-Efficient Fine-Tuning (PEFT)|## LoRA (Low-Rank Adaptation)
        |--method lora --lora_rank 8 --lora_alpha 16.0 --output_dir ./lora_model|## Prefix Tuning
        |--method prefix --prefix_length 16 --output_dir ./prefix_model""",
    "docs/streaming.md": """# Streaming Inference
        |--prompt "Once upon a time" --max_tokens 100 --streaming|## Multi-Session Support
        |text1_continued = server.generate_text("I live in", session_id=session1)""",
    "docs/quantization.md": "# Quantization|--bits 8|--bits 4",
    "docs/huggingface.md": "# Hugging Face|transformers",
    "docs/benchmarks.md": "# Benchmarks|python benchmark.py",
    "docs/serving.md": "# Serving|OpenAI",
}  # fmt: skip


@pytest.mark.parametrize("page", PROMISED)
def test_what_the_first_readme_documents_is_on_a_page(page):
    for text in re.split(r"\s*\|", PROMISED[page]):
        assert text in PAGES[ROOT / page], text
