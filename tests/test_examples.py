"""The files of examples/: a sweep's settings train, a notebook's cells run, a job is requeued."""

import dataclasses
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import starlette.testclient
import torch
import yaml
from helpers import LATEST, POSIX, ROOT, brief_flags, call, flags, free_copy, free_port, wide
from torch.distributed.run import get_args_parser

import serve
import testv2
from streaming import StreamingServer
from testv2 import Config, parse_command_line, save_folder
from tinymamba.checkpoint import load_checkpoint, save_checkpoint
from tinymamba.runtime import Logger
from tinymamba.tokenizer import EOS_TOKEN, byte_alphabet

# -------------------------------------------------------------------------------------- sweep

SWEEP = yaml.safe_load((ROOT / "examples" / "sweep.yaml").read_text(encoding="utf-8"))
SMALL = flags(
    use_wandb="false", max_steps=2, validation_interval=1, validation_steps=1, d_model=32,
    n_layer=1, num_heads=2, ssm_head_dim=8, vocab_size=257, block_size=32, batch_size=2,
    device="cpu",
)  # fmt: skip


def sweep_flags(choice: int) -> list[str]:
    """What an agent passes to the program: the fixed flags, and one value of each parameter."""
    fixed = [word for word in SWEEP["command"] if not word.startswith("$")]
    values = {
        name: about["values"][choice] if "values" in about else about[("min", "max")[choice]]
        for name, about in SWEEP["parameters"].items()
    }
    return fixed + [f"--{name}={value}" for name, value in values.items()]


def test_the_sweep_names_fields_of_config_with_valid_values():
    assert (ROOT / SWEEP["program"]).samefile(testv2.__file__)
    assert SWEEP["parameters"].keys() <= {field.name for field in dataclasses.fields(Config)}
    assert SWEEP["parameters"].keys() >= {"lr", "gate", "window_size"}
    assert set(SWEEP["parameters"]["gate"]["values"]) == set(Config.CHOICES["gate"])
    config, named, _ = parse_command_line(sweep_flags(0))
    assert config.use_wandb and config.max_steps == testv2.PRESETS["demo"]["max_steps"]
    assert named.keys() > SWEEP["parameters"].keys()


def test_a_run_of_the_sweep_trains_and_logs_its_metric(place, monkeypatch):
    logged, record = {}, Logger.record
    monkeypatch.setattr(Logger, "record", lambda s, v, n: (logged.update(v), record(s, v, n)))
    done = call(*sweep_flags(1), *SMALL)
    assert done.returncode == 0 and "step 2/2" in done.stdout, done.stderr
    assert SWEEP["metric"]["name"] in logged and SWEEP["metric"]["goal"] == "minimize"
    [checkpoint] = [w.partition("=")[2] for w in sweep_flags(1) if "checkpoint_path" in w]
    assert Path(checkpoint).is_file()


# ---------------------------------------------------------------------------------- Ray Serve


def test_replicas_under_ray_serve_have_the_app_of_serve(tmp_path, monkeypatch):
    """Ray is not installed: what stands in for it notes how it is called."""
    noted, build = {}, []
    stand_in = types.SimpleNamespace(
        deployment=lambda **options: lambda cls: (noted.update(options), cls)[1],
        ingress=lambda make: lambda: (build.append(make), types.SimpleNamespace(bind=dict))[1],
        start=lambda http_options: noted.update(http_options),
        run=lambda app, blocking: noted.update(blocking=blocking),
    )
    fake = types.SimpleNamespace(serve=stand_in, init=lambda runtime_env: noted.update(runtime_env))
    monkeypatch.setitem(sys.modules, "ray", fake)
    (tmp_path / "tiny").mkdir()
    save_folder(tmp_path / "tiny", free_copy(wide()))
    (tmp_path / "tiny" / "vocab.txt").write_text("\n".join([*byte_alphabet(), EOS_TOKEN]) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    main = runpy.run_path(str(ROOT / "examples" / "ray_serve.py"))["main"]
    monkeypatch.setenv("TINYMAMBA_API_KEY", "secret")
    words = ["--checkpoint", "tiny", "--tokenizer", "tiny/vocab.txt", "--session_dir", "kept"]
    main(["--replicas", "3", "--port", "8123", "--keep_sessions", *words])
    assert (noted["num_replicas"], noted["port"], noted["blocking"]) == (3, 8123, True)
    options = serve.Options()
    assert noted["max_ongoing_requests"] == options.batch_size + options.max_queue
    assert noted["env_vars"]["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    assert noted["env_vars"]["TINYMAMBA_API_KEY"] == "secret"
    monkeypatch.chdir("/")  # where a replica runs
    with starlette.testclient.TestClient(build[0]()) as client:
        headers = {"Host": "127.0.0.1", "Authorization": "Bearer secret"}
        assert client.get("/ready", headers=headers).json() == {"status": "ok"}
        assert client.post("/v1/sessions", json={"id": "a"}, headers=headers).status_code == 201
    assert (tmp_path / "kept" / "kept" / "a.safetensors").is_file()


# -------------------------------------------------------------------------------------- Slurm

JOB = ROOT / "examples" / "slurm.sbatch"
COMMANDS = {  # of Slurm, for one machine
    "srun": 'exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> requeued; fi',
}


def start_job(folder: Path, *words) -> subprocess.Popen:
    """The script of the job on this machine, where its commands run in `folder`."""
    for name, body in COMMANDS.items():
        (folder / name).write_text(f'#!/bin/bash\ncd "{folder}"\n{body}\n')
        (folder / name).chmod(0o755)
    env = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost"}
    env |= {"PROCESSES": "2", "PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", str(JOB), *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env={**os.environ, **env}, **pipes)


def test_the_job_gives_torchrun_and_the_trainer_words_that_they_know():
    text = JOB.read_text()
    command = re.search(r"^srun torchrun (.*?) &$", text, re.M | re.S)[1].replace("\\\n", " ")
    command = re.sub(r"\$\{?\w+:?-?(\w*)\}?", r"\1", command).replace('"$@"', "")
    words = get_args_parser().parse_args(shlex.split(command))
    config, named, _ = parse_command_line([w for w in words.training_script_args if w != "$@"])
    assert (words.nproc_per_node, words.rdzv_backend, words.max_restarts) == ("gpu", "c10d", 3)
    assert config.resume == "auto" and config.parallel == "hsdp"
    assert [line for line in text.splitlines() if line.startswith("#SBATCH --signal=B:USR1@600")]


@pytest.mark.slow
@POSIX
def test_a_job_whose_time_is_over_saves_and_is_requeued(place):
    """On one machine: Slurm's two commands do what they would do there."""
    (place / "testv2.py").symlink_to(ROOT / "testv2.py")
    words = brief_flags(max_steps=10**6, batch_size=2)
    job = start_job(place, *words)
    try:
        assert any("step 3/" in line for line in job.stdout)
        job.send_signal(signal.SIGUSR1)
        job.communicate(timeout=120)
    finally:
        job.kill()
    step = load_checkpoint(LATEST)["global_step"]
    assert (place / "requeued").read_text() == "requeue 7\n" and step >= 3
    job = start_job(place, *words, "--max_steps", step + 1)
    said = job.communicate(timeout=120)[0]
    assert job.returncode == 0 and f"steps {step} to {step + 1}" in said, said
    assert (place / "requeued").read_text() == "requeue 7\n", "it has ended by itself"


# ----------------------------------------------------------------------------------- notebook

NOTEBOOK = ROOT / "examples" / "tinymamba.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = {cell["id"]: "".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"}


@pytest.fixture
def beside_a_checkpoint(tmp_path, monkeypatch) -> Path:
    """The working folder, with a tiny checkpoint and a tokenizer where the notebook looks."""
    model = free_copy(wide(tie_embeddings=False))
    with torch.no_grad():
        model.head.weight[128:] = 0.0  # most tokens are characters
    save = {"model": model.state_dict(), "config": model.config.to_dict()}
    save_checkpoint(tmp_path / "tinymamba_model_latest.pt", save)
    vocabulary = "\n".join([*byte_alphabet(), EOS_TOKEN]) + "\n"
    (tmp_path / "vocab.txt").write_text(vocabulary, encoding="utf-8", newline="\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_cells(names=CODE) -> dict:
    """The names that the cells define, run one after another as a kernel would."""
    scope = {"__name__": "__main__"}
    for name in names:
        exec(compile(CODE[name], f"cell {name}", "exec"), scope)
    return scope


def test_the_notebook_is_small_and_holds_no_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK.stat().st_size < 20_000
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    for cell in CELLS:
        assert cell["cell_type"] in ("code", "markdown") and cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    kinds = [cell["cell_type"] for cell in CELLS]
    assert all("code" in kinds[i : i + 2] for i in range(1, len(kinds))), "text before every cell"


def test_the_cells_run_in_order(beside_a_checkpoint, capsys):
    found, out = run_cells(), capsys.readouterr().out
    server, prompt = found["server"], found["PROMPT"]
    assert isinstance(server, StreamingServer)
    assert prompt + found["text"] in out and len(found["text"]) > 20
    # The same seed: the colored text is the generated one.
    assert "".join(found["texts"]) == found["text"]
    assert found["weights"].shape == (len(found["texts"]), 3)
    assert found["weights"].sum(axis=1) == pytest.approx(1.0)
    page = found["color_by_gate"](found["texts"], found["weights"])
    assert page.count("<span") == page.count("rgb(") == len(found["texts"])
    assert found["first"] == found["same"] != found["second"]
    assert "same seed, same text: True" in out
    assert len(found["sizes"]) == 3 and len(set(found["sizes"])) == 1
    assert f"1,110 tokens read: {found['sizes'][0]:,} bytes" in out


def test_without_a_checkpoint_the_notebook_trains_one(beside_a_checkpoint, monkeypatch):
    path = beside_a_checkpoint / "tinymamba_model_latest.pt"
    made, trained = path.read_bytes(), []
    path.unlink()

    def train(words):
        trained.append(words)
        path.write_bytes(made)

    monkeypatch.setattr(testv2, "main", train)
    assert run_cells(["start", "model"])["server"]
    config, _, _ = parse_command_line(trained[0])
    assert config.checkpoint_path == path.name and 100 <= config.max_steps <= 300
