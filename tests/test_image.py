"""The image, built and run by docker or podman. Run by `make container`.

ENGINE=podman      instead of the first of docker and podman that answers
WHEELS=FOLDER      PyTorch's wheel is in this folder; its index is not asked
"""

import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
import urllib.request
import uuid
from pathlib import Path

import pytest
from helpers import ROOT, assert_refused

pytestmark = pytest.mark.container
IMAGE = "tinymamba:test"
PORT = 8731  # of the index of WHEELS; the engine caches a layer by its arguments
LOCKED = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL"]
LOCKED += ["--security-opt", "no-new-privileges", "--env", "OMP_NUM_THREADS=1"]
TINY_RUN = ["train", "--preset", "demo", "--n_layer", "1", "--d_model", "64", "--num_heads", "4"]
TINY_RUN += ["--batch_size", "2", "--block_size", "64", "--max_steps"]


def answers(name: str) -> bool:
    found = shutil.which(name)
    return bool(found) and subprocess.run([name, "info"], capture_output=True).returncode == 0


@functools.cache
def engine_name() -> str:
    names = [os.environ["ENGINE"]] if os.environ.get("ENGINE") else ["docker", "podman"]
    name = next(filter(answers, names), None)
    assert name, f"no container engine answers: install and start one of {names}"
    return name


def is_podman() -> bool:
    return Path(engine_name()).name == "podman"


def engine(*words: object, code: int | None = 0) -> subprocess.CompletedProcess:
    """Run a command of the engine, which must exit with `code`."""
    done = subprocess.run([engine_name(), *map(str, words)], capture_output=True, text=True)
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return done


@contextlib.contextmanager
def torch_index(tmp_path: Path):
    """The flags of a build that takes PyTorch from the folder WHEELS, if it is given."""
    if not os.environ.get("WHEELS"):
        yield []
        return
    (tmp_path / "torch").symlink_to(Path(os.environ["WHEELS"]).resolve())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", PORT), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield ["--network", "host", "--build-arg", f"TORCH_INDEX=http://127.0.0.1:{PORT}/"]
        server.shutdown()


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> str:
    """The Dockerfile's image; its layers stay in the engine's cache."""
    kind = ["--layers", "--format", "docker"] if is_podman() else []
    with torch_index(tmp_path_factory.mktemp("index")) as flags:
        engine("build", *kind, *flags, "--tag", IMAGE, ROOT)
    return IMAGE


@contextlib.contextmanager
def new_volume(owner: str = ""):
    """The name of an empty volume, of the image's user or of another owner."""
    name = f"tinymamba-{uuid.uuid4().hex[:8]}"
    engine("volume", "create", name)
    try:
        if owner:
            # docker gives the folder of an empty volume to the image's user again.
            as_root = ["--user", "0", "--entrypoint", "sh", "--volume", f"{name}:/work"]
            fill = f"touch /work/file && chown -R {owner} /work"
            engine("run", "--rm", *as_root, IMAGE, "-c", fill)
        yield name
    finally:
        engine("volume", "rm", "--force", name)


@contextlib.contextmanager
def container(volume: str, *words: str, flags: list[str] = LOCKED):
    """The name of a container that runs a command of `tinymamba`, by default the server."""
    name = f"tinymamba-{uuid.uuid4().hex[:8]}"
    engine("run", "--detach", "--name", name, "--volume", f"{volume}:/work", *flags, IMAGE, *words)
    try:
        yield name
    finally:
        engine("rm", "--force", "--volumes", name)


def run(volume: str, *words: str, flags: list[str] = LOCKED, code: int = 0):
    """Run a command of `tinymamba` to its end."""
    mount = ["--rm", "--no-healthcheck", "--volume", f"{volume}:/work"]
    return engine("run", *mount, *flags, IMAGE, *words, code=code)


def read_until(name: str, text: str) -> None:
    """Follow what a container prints until it has printed `text`."""
    command = [engine_name(), "logs", "--follow", name]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as log:
        said = []
        for line in log.stdout:
            said.append(line)
            if text in line:
                log.terminate()
                return
    pytest.fail("".join(said))


def exit_code(name: str) -> int:
    return int(engine("inspect", "--format", "{{.State.ExitCode}}", name).stdout)


def health_check(name: str) -> int:
    """The exit code, in a container, of the check that the image names."""
    shown = json.loads(engine("image", "inspect", IMAGE).stdout)[0]
    found = shown if is_podman() else shown["Config"]
    kind, *words = found["Healthcheck"]["Test"]
    assert kind == "CMD"
    return engine("exec", name, *words, code=None).returncode


@pytest.fixture(scope="module")
def trained(image):
    """A volume with a checkpoint of the demo, and what that training printed."""
    with new_volume() as volume:
        yield volume, run(volume, "train", "--preset", "demo", "--max_steps", "2")


def test_two_steps_of_the_demo_in_a_read_only_system_without_privileges(trained):
    volume, done = trained
    assert "saved tinymamba_model_latest.pt at step 2" in done.stdout
    assert not [line for line in done.stderr.splitlines() if "step" not in line and line.strip()]
    find = ["--rm", "--volume", f"{volume}:/work", "--entrypoint", "find", IMAGE, "/work"]
    files = engine("run", *find).stdout.splitlines()
    assert {"/work/tinymamba_model_best.pt", "/work/data/text/train.bin"} <= {*files}
    assert not engine("run", *find, "!", "-uid", "1000", "-o", "!", "-gid", "1000").stdout


def test_nothing_is_written_outside_the_volume_and_tmp(trained):
    words = [*TINY_RUN, "2", "--checkpoint_path", "other_latest.pt"]
    with container(trained[0], *words, flags=["--env", "OMP_NUM_THREADS=1"]) as name:
        read_until(name, "loss curve in")
        engine("wait", name)
        assert exit_code(name) == 0
        changed = {line.split()[1] for line in engine("diff", name).stdout.splitlines()}
    assert not {p for p in changed if not p.startswith(("/tmp", "/work", "/run", "/etc"))}
    assert {p for p in changed if p.startswith("/etc")} <= {"/etc", "/etc/mtab"}  # the engine's


def post(url: str, **body):
    """The open answer to a request; its headers have come."""
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), kind)
    return urllib.request.urlopen(request, timeout=60)


def test_the_server_is_healthy_answers_and_keeps_its_sessions_on_sigterm(trained):
    proxy = ["--env", "http_proxy=http://127.0.0.1:9", "--publish", "127.0.0.1::8000"]
    names = [f"s{i}" for i in range(6)]
    endless = {"prompt": "c", "stream": True, "max_tokens": 4096, "logit_bias": {"0": -100}}
    with container(trained[0], flags=[*LOCKED, *proxy]) as name, contextlib.ExitStack() as stack:
        read_until(name, "serving tinymamba_model_latest at")
        assert health_check(name) == 0
        url = "http://" + engine("port", name, "8000/tcp").stdout.split()[0] + "/v1"
        with post(f"{url}/completions", prompt="import os", max_tokens=4) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 4
        for session in names:
            post(f"{url}/sessions", id=session).close()
            stack.enter_context(post(f"{url}/sessions/{session}/completions", **endless))
        engine("stop", name)
        assert exit_code(name) == 143
        said = engine("logs", name)
        assert "Traceback" not in said.stdout + said.stderr
    kept = ["--rm", "--volume", f"{trained[0]}:/work", "--entrypoint", "ls", IMAGE, "sessions/kept"]
    assert {f"{session}.safetensors" for session in names} <= {*engine("run", *kept).stdout.split()}


def test_sigterm_ends_a_server_that_has_not_begun_to_serve(trained):
    with container(trained[0]) as name:
        while engine("inspect", "--format", "{{.State.Running}}", name).stdout == "true\n":
            engine("kill", "--signal", "TERM", name, code=None)
        assert exit_code(name) == 143
        assert "serving" not in engine("logs", name).stdout


def test_sigterm_saves_a_run(trained):
    words = [*TINY_RUN, "1000000", "--checkpoint_path", "long_latest.pt"]
    with container(trained[0], *words) as name:
        read_until(name, "steps 0 to 1000000")
        engine("stop", "-t", "60", name)
        assert exit_code(name) == 143
        assert "saved long_latest.pt at step" in engine("logs", name).stdout


def test_the_health_check_fails_where_nothing_serves(trained):
    words = [*TINY_RUN, "1000000", "--checkpoint_path", "busy_latest.pt"]
    with container(trained[0], *words) as name:
        assert health_check(name) == 1


@pytest.mark.parametrize("words", [["train", "--preset", "demo"], ["quantize"], ["serve"]])
def test_a_volume_of_root_is_one_line(trained, words):
    with new_volume(owner="0:0") as volume:
        source = ["--volume", f"{trained[0]}:/trained:ro"]
        if words != ["train", "--preset", "demo"]:
            words = [*words, "--checkpoint", "/trained/tinymamba_model_latest.pt"]
        if words[0] == "serve":
            words = [*words, "--session_dir", "sessions"]
        done = run(volume, *words, flags=[*LOCKED, *source], code=2)
        assert_refused(done, "Permission denied", "let user 1000 write to /work")


def test_a_user_that_the_image_does_not_know(image):
    with new_volume(owner="4242:4242") as volume:
        done = run(volume, *TINY_RUN, "1", flags=[*LOCKED, "--user", "4242:4242"])
        assert "saved tinymamba_model_latest.pt at step 1" in done.stdout


@functools.cache
def compose_command() -> list[str] | None:
    """Compose of version 2, as a plugin of the engine or alone."""
    for words in ([engine_name(), "compose"], ["docker-compose"]):
        if shutil.which(words[0]):
            done = subprocess.run([*words, "version", "--short"], capture_output=True, text=True)
            if done.returncode == 0 and done.stdout.strip().lstrip("v") >= "2":
                return words
    return None


def test_compose_trains_and_serves(image):
    command = compose_command()
    if not command:
        pytest.skip("no Compose of version 2")
    project = ["--project-name", f"tinymamba-{uuid.uuid4().hex[:8]}"]
    env = {**os.environ, "DEVICE": image.partition(":")[2]}

    def compose(*words: str) -> str:
        all_words = [*command, *project, *words]
        done = subprocess.run(all_words, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        said = compose("run", "--rm", "-T", "train", *TINY_RUN, "1")
        assert "saved tinymamba_model_latest.pt at step 1" in said
        compose("up", "--detach", "--wait", "serve")  # until it is healthy
        with urllib.request.urlopen("http://127.0.0.1:8000/health", timeout=60) as answer:
            assert answer.status == 200
        compose("stop")
        assert "(143)" in compose("ps", "--all")
    finally:
        compose("--profile", "train", "down", "--volumes")


def test_no_package_is_missing_or_broken_and_the_size_is_known(image):
    shell = ["run", "--rm", "--entrypoint", "sh", image, "-c"]
    assert "No broken requirements" in engine(*shell, "pip check").stdout
    size = int(engine(*shell, "du -sm /opt/tinymamba").stdout.split()[0])
    assert size < 1000  # MiB, with PyTorch for CPUs
