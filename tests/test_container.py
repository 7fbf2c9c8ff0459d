"""Dockerfile, compose.yaml and .dockerignore: what can be checked without a container engine.

tests/test_image.py has the rest.
"""

import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from helpers import COMMANDS, ROOT, SERVICES, build_sources, free_port

import serve
from testv2 import parse_command_line

TEXT = (ROOT / "Dockerfile").read_text()
LINES = re.sub(r"\\\n", " ", re.sub(r"^ *#.*\n", "", TEXT, flags=re.M)).splitlines()
STEPS = [tuple(line.split(maxsplit=1)) for line in LINES if line.strip()]
FINAL = STEPS[max(i for i, (word, _) in enumerate(STEPS) if word == "FROM") :]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())


def last(word: str) -> str:
    return [rest for name, rest in FINAL if name == word][-1]


def test_bases_are_the_same_in_both_stages_and_of_a_version():
    bases = {rest.split()[0] for word, rest in STEPS if word == "FROM"}
    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", bases.pop())


def test_the_image_runs_as_a_user_and_nothing_after_it_needs_more():
    words = [word for word, _ in FINAL]
    assert int(last("USER")) >= 1000
    assert not {"RUN", "COPY"} & {*words[words.index("USER") :]}
    assert last("WORKDIR") == last("VOLUME") == "/work"


def test_every_command_has_its_bytecode_in_the_image():
    """Where it is missing, every start of a container would compile it again."""
    step = next(rest for word, rest in STEPS if word == "RUN" and "--help" in rest)
    assert {*re.search(r"in ([\w ]+);", step)[1].split()} == {*COMMANDS} - {"push"}


def test_it_serves_unless_told_otherwise():
    command = json.loads(last("CMD"))
    assert json.loads(last("ENTRYPOINT")) == ["tinymamba"] and command[0] in COMMANDS
    assert command[:5] == ["serve", "--host", "0.0.0.0", "--port", last("EXPOSE")]
    script = ROOT / COMMANDS["serve"][0]
    known = script.read_text() if script.is_file() else " ".join(command)
    flags = [word for word in command if word.startswith("--")]
    assert all(flag in known or f"\n    {flag[2:]}: " in known for flag in flags)
    assert int(command[command.index("--grace") + 1]) <= 5  # docker kills after 10 seconds


def test_files_that_are_copied_are_there_and_reach_the_build():
    for word, rest in STEPS:
        *sources, _ = [part for part in rest.split() if not part.startswith("--")]
        if word == "COPY" and "--from" not in rest:
            assert all((ROOT / source).exists() for source in sources), rest


def test_no_secret_and_no_other_host_is_named():
    for name in ("Dockerfile", "compose.yaml", ".dockerignore"):
        text = (ROOT / name).read_text()
        hosts = {*re.findall(r"https?://([^/:\s\"']+)", text)}
        assert hosts <= {"download.pytorch.org", "127.0.0.1"}
    assert not re.search(r"(?i)key|token|secret|password", TEXT)
    assert SERVICES["serve"]["environment"] == {
        "OMP_NUM_THREADS": "${THREADS:-2}",
        "TINYMAMBA_API_KEY": None,
    }


@pytest.mark.parametrize(
    ("device", "said", "code"),
    [
        (
            "cpu",
            [
                "pip install --index-url https://download.pytorch.org/whl/cpu torch==",
                "pip install --requirement requirements.txt",
            ],
            0,
        ),
        ("cuda", ["pip install --requirement requirements.txt"], 0),
        ("gpu", ["error: DEVICE: 'gpu' is unknown; pass cpu or cuda"], 2),
    ],
)
def test_the_device_decides_which_pytorch_is_taken(device, said, code):
    step = next(rest for word, rest in STEPS if word == "RUN" and "DEVICE" in rest)
    arguments = dict(rest.split("=", 1) for word, rest in STEPS if word == "ARG")
    done = subprocess.run(
        ["sh", "-c", f'pip() {{ echo pip "$@"; }}\n{step}'],
        cwd=ROOT,
        text=True,
        env={**arguments, "DEVICE": device, "PATH": "/usr/bin:/bin"},
        capture_output=True,
    )
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode == code and len(lines) == len(said), lines
    assert all(map(str.startswith, lines, said)), lines


class Health(http.server.BaseHTTPRequestHandler):
    code = 200

    def do_GET(self):
        self.send_response(self.code if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_the_health_check_tells_a_server_that_is_well_from_others():
    check = json.loads(last("HEALTHCHECK").partition("CMD")[2])
    assert not [name for name in ("serve", *REPLICAS) if "healthcheck" in SERVICES[name]]
    port = free_port()
    words = [sys.executable, *(w.replace(f":{last('EXPOSE')}/", f":{port}/") for w in check[1:])]
    assert str(port) in words[-1]

    def run() -> int:
        proxy = {"http_proxy": "http://127.0.0.1:9"}  # the engine may set one for all containers
        env = {**os.environ, **proxy}
        return subprocess.run(words, stderr=subprocess.DEVNULL, env=env).returncode

    assert run() != 0
    with http.server.HTTPServer(("127.0.0.1", port), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert run() == 0
        Health.code = 503
        assert run() != 0
        server.shutdown()


def reaches_the_build(path: str, rules: list[str]) -> bool:
    """Apply .dockerignore: the last rule that matches a file or a folder above it counts."""
    above, kept = [str(p) for p in (Path(path), *Path(path).parents)][:-1], True
    for rule in rules:
        pattern = re.escape(rule.lstrip("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*\*", ".*")
        if any(re.fullmatch(pattern.replace(r"\*", "[^/]*"), p) for p in above):
            kept = rule.startswith("!")
    return kept


def test_what_reaches_the_build_is_what_it_takes():
    """A build of these files alone is that of the sdist in tests/test_package.py."""
    rules = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    for path in (".env", ".git/config", "data/text/train.bin", "a.pt", "tests/test_package.py",
                 "logs/x", "tinymamba/__pycache__/x.pyc"):  # fmt: skip
        assert not reaches_the_build(path, rules), path
    folders = [path for path in ROOT.glob("[!.]*") if path.is_dir()]
    files = [*ROOT.iterdir(), *(path for folder in folders for path in folder.rglob("*"))]
    names = {path.relative_to(ROOT).as_posix() for path in files if path.is_file()}
    assert {name for name in names if reaches_the_build(name, rules)} == build_sources()


REPLICAS = {"replica1", "replica2"}
OTHERS = {"proxy", "store"}  # images that others make


def test_services_train_and_serve_in_one_volume_within_limits():
    assert {*SERVICES} == {"train", "serve", *REPLICAS, *OTHERS} and "work" in COMPOSE["volumes"]
    for service in (SERVICES[name] for name in {*SERVICES} - OTHERS):
        assert service["volumes"] == ["work:/work"]
        assert {"cpus", "memory", "pids"} == {*service["deploy"]["resources"]["limits"]}
        assert service["image"] == "tinymamba:${DEVICE:-cpu}"
        assert service["build"] == {"context": ".", "args": {"DEVICE": "${DEVICE:-cpu}"}}
        assert service["cap_drop"] == ["ALL"] and service["init"]
        assert service["read_only"] and service["tmpfs"] == ["/tmp"]
    name, *words = SERVICES["train"]["command"]
    assert name == "train" and parse_command_line(words)
    assert SERVICES["train"]["healthcheck"] == {"disable": True}  # it has no port
    assert SERVICES["serve"]["ports"] == [f"127.0.0.1:8000:{last('EXPOSE')}"]
    assert "command" not in SERVICES["serve"]


def test_replicas_share_a_store_behind_a_proxy():
    for name in (*REPLICAS, *OTHERS):
        service = SERVICES[name]
        assert service["profiles"] == ["replicas"] and service["cap_drop"] == ["ALL"]
        assert service["read_only"] and service["security_opt"] == ["no-new-privileges:true"]
        assert service["restart"] == "on-failure" and service["stop_grace_period"]
    for name in REPLICAS:
        word, *words = SERVICES[name]["command"]
        options = serve.parse(words)
        assert word == "serve" and options.host == "0.0.0.0"
        assert urlsplit(options.session_store).hostname in SERVICES[name]["depends_on"]
        assert str(options.port) == last("EXPOSE") and options.grace <= 5
        assert SERVICES[name]["environment"] == SERVICES["serve"]["environment"]
    assert ("ARG", "EXTRAS=serve,redis") in STEPS
    store, proxy = SERVICES["store"], SERVICES["proxy"]
    assert "ports" not in store and store["volumes"] == ["sessions:/data"]
    assert store["command"][1:5] == ["--appendonly", "yes", "--appendfsync", "always"]
    assert proxy["ports"] == SERVICES["serve"]["ports"] and {*proxy["depends_on"]} == REPLICAS
    [source] = [v.partition(":")[0] for v in proxy["volumes"]]
    config = (ROOT / source).read_text()
    [hard_stop] = re.findall(r"(?m)^ +hard-stop-after (\d+)s", config)
    assert int(hard_stop) < int(proxy["stop_grace_period"].removesuffix("s"))
    assert {*re.findall(r"(?m)^ +server \w+ (\S+)", config)} == {
        f"{n}:{last('EXPOSE')}" for n in REPLICAS
    }


def test_commands_in_comments_are_those_of_the_files():
    comments = re.findall(r"^# +(docker .*)$", TEXT + (ROOT / "compose.yaml").read_text(), re.M)
    assert len(comments) == 8
    for words in map(shlex.split, (c.partition("  #")[0] for c in comments)):
        match words[1:]:
            case ["build", "--tag", _, *rest, "."]:
                assert rest in ([], ["--build-arg", "DEVICE=cuda"])
            case ["run", *rest]:
                at = rest.index("tinymamba:cpu")
                assert rest[at - 1] == f"tinymamba:{last('VOLUME')}"
                assert not rest[at + 1 :] or parse_command_line(rest[at + 2 :])
            case ["compose", "up", service]:
                assert service in ("serve", "proxy")
            case ["compose", "run", "--rm", "train", *rest]:
                assert not rest or (rest[0] in COMMANDS and parse_command_line(rest[1:]))
            case _:
                pytest.fail(f"no such command: {words}")


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if not hadolint:
        pytest.skip("requirements-dev.txt has hadolint for Linux on x86-64 only")
    done = subprocess.run(
        [hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
