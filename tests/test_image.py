"""The image, built and run by docker or podman. Run by `make container`.

ENGINE=podman      instead of the first of docker and podman that answers
WHEELS=FOLDER      PyTorch's wheel is in this folder; its index is not asked
"""

import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from helpers import ROOT, SERVICES, assert_refused
from serve_helpers import wait_until

pytestmark = pytest.mark.container
IMAGE = "tinymamba:test"
PORT = 8731  # of the index of WHEELS; the engine caches a layer by its arguments
ADDRESS = "http://127.0.0.1:8000"  # of compose.yaml
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


class Project:
    """compose.yaml in a project of its own."""

    def __init__(self, command: list[str], image: str):
        self.name = f"tinymamba-{uuid.uuid4().hex[:8]}"
        self.words = [*command, "--project-name", self.name]
        self.image, self.env = image, {**os.environ, "DEVICE": image.partition(":")[2]}

    def compose(self, *words: str) -> str:
        done = subprocess.run(
            [*self.words, *words], cwd=ROOT, env=self.env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def container(self, service: str) -> str:
        everything = self.compose("--profile", "replicas", "ps", "--all", "--quiet", service)
        [name] = everything.split()
        return name

    def inside(self, service: str, *words: str, code: int | None = 0):
        """Run a command in the container of a service."""
        return engine("exec", self.container(service), *words, code=code)

    def crash(self, service: str) -> None:
        """Kill it as the kernel does if memory ends, not as the engine does if told to."""
        pid = engine("inspect", "--format", "{{.State.Pid}}", self.container(service)).stdout
        host = ["--rm", "--privileged", "--pid", "host", "--user", "0", "--entrypoint", "sh"]
        engine("run", *host, self.image, "-c", f"kill -9 {pid}")

    @contextlib.contextmanager
    def health_checks(self):
        """Podman leaves them to timers of systemd: without it, they are run here."""
        if not is_podman() or Path("/run/systemd/system").is_dir():
            yield
            return
        ended = threading.Event()
        own = ["ps", "--quiet", "--filter", f"label=com.docker.compose.project={self.name}"]

        def check() -> None:
            while not ended.wait(1):
                for name in engine(*own).stdout.split():
                    engine("healthcheck", "run", name, code=None)

        thread = threading.Thread(target=check, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@pytest.fixture(scope="module")
def project(image):
    """A project whose volume has a checkpoint."""
    command = compose_command()
    if not command:
        pytest.skip("no Compose of version 2")
    project = Project(command, image)
    try:
        with project.health_checks():
            said = project.compose("run", "--rm", "-T", "train", *TINY_RUN, "1")
            assert "saved tinymamba_model_latest.pt at step 1" in said
            yield project
    finally:
        project.compose("--profile", "train", "--profile", "replicas", "down", "--volumes")


def test_compose_trains_and_serves(project):
    try:
        project.compose("up", "--detach", "--wait", "serve")  # until it is healthy
        with urllib.request.urlopen(f"{ADDRESS}/health", timeout=60) as answer:
            assert answer.status == 200
    finally:
        project.compose("stop")
    assert "(143)" in project.compose("ps", "--all")


REPLICAS = ["replica1", "replica2"]
TURN = {"prompt": "x", "max_tokens": 8, "logit_bias": {"0": -100}}
LONG_TURN = {"prompt": "c", "stream": True, "max_tokens": 4096, "logit_bias": {"0": -100}}
ENDED = "data: [DONE]"
COUNTED = re.compile(r'tinymamba_requests_total\{route="/v1/.*completions",status="200"\}')
# Prints what the server in a container answers, whose port is not published.
ASK = """import sys; from urllib.request import Request, urlopen
kind, body = {"Content-Type": "application/json"}, sys.argv[2].encode() or None
print(urlopen(Request("http://127.0.0.1:8000" + sys.argv[1], body, kind)).read().decode())"""


class Client:
    """A client of the replicas, through the proxy or, inside a container, without it."""

    def __init__(self, project: Project, http: httpx.Client):
        self.project, self.http = project, http

    def ask(self, replica: str, path: str, body: str = "", code: int | None = 0):
        return self.project.inside(replica, "python", "-c", ASK, path, body, code=code)

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/ready").status_code == 200
        return False

    def wait(self) -> None:
        """Until both replicas and the proxy are ready."""
        for replica in REPLICAS:
            wait_until(lambda r=replica: self.ask(r, "/ready", code=None).returncode == 0, 180)
        wait_until(self.is_ready)

    def turn(self, session: str, replica: str = "") -> tuple[int, str]:
        """The number and the text of a turn, which must succeed at once."""
        path = f"/v1/sessions/{session}/completions"
        if replica:
            said = json.loads(self.ask(replica, path, json.dumps(TURN)).stdout)
        else:
            answer = self.http.post(path, json=TURN)
            assert answer.status_code == 200, answer.text
            said = answer.json()
        return said["session"]["turns"], said["choices"][0]["text"]

    def sessions(self) -> tuple[str, Iterator[tuple[int, str]]]:
        """A session of one turn, and the further turns of one of the same seed."""
        calm, name = (uuid.uuid4().hex[:8] for _ in range(2))
        for session in (calm, name):
            self.http.post("/v1/sessions", json={"id": session, "seed": 1}).raise_for_status()
        turns = iter([self.turn(calm) for _ in range(4)])
        assert self.turn(name) == next(turns)
        return name, turns

    def answered(self, replica: str) -> float:
        """How many completions it has answered, in sessions or not."""
        lines = self.ask(replica, "/metrics").stdout.splitlines()
        return sum(float(line.split()[-1]) for line in lines if COUNTED.match(line))

    @contextlib.contextmanager
    def running(self, session: str):
        """A turn that has begun to answer; gives the lines that come until its end."""
        path = f"/v1/sessions/{session}/completions"
        with self.http.stream("POST", path, json=LONG_TURN) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            rest: list[str] = []
            yield rest
            with contextlib.suppress(httpx.TransportError):
                for line in lines:
                    rest.append(line)


@pytest.fixture(scope="module")
def client(project):
    """A client of the services that the documented command starts."""
    project.compose("up", "--detach", "proxy")
    with httpx.Client(base_url=ADDRESS, timeout=60) as http:
        client = Client(project, http)
        client.wait()
        yield client


def test_every_service_has_a_read_only_system_and_no_privileges(client):
    for service in (*REPLICAS, "proxy", "store"):
        lines = client.project.inside(service, "cat", "/proc/1/status").stdout.splitlines()
        status = dict(line.split(":\t", 1) for line in lines)
        assert {int(status[f"Cap{kind}"], 16) for kind in ("Prm", "Eff", "Bnd")} == {0}, service
        assert status["NoNewPrivs"] == "1" and "0" not in status["Uid"].split(), service
        said = client.project.inside(service, "touch", "/file", code=1)
        assert "Read-only file system" in said.stderr, service


def test_the_check_of_the_store_fails_on_errors(client):
    """Valkey is up, but answers errors, while it loads its file, and if it cannot write it."""
    kind, *check = SERVICES["store"]["healthcheck"]["test"]
    assert kind == "CMD"
    inside = functools.partial(client.project.inside, "store")
    inside(*check)
    inside("valkey-cli", "config", "set", "requirepass", "secret")
    inside(*check, code=1)
    inside("valkey-cli", "-a", "secret", "config", "set", "requirepass", "")
    inside(*check)


def test_the_proxy_divides_the_work(client):
    before = [client.answered(replica) for replica in REPLICAS]
    for _ in range(4):
        assert client.http.post("/v1/completions", json=TURN).status_code == 200
    after = [client.answered(replica) for replica in REPLICAS]
    assert [new - old for old, new in zip(before, after, strict=True)] == [2, 2]


def test_turns_of_a_session_go_to_both_replicas(client):
    session, wanted = client.sessions()
    for replica, turn in zip((*REPLICAS, ""), wanted, strict=True):
        assert client.turn(session, replica) == turn


@pytest.mark.parametrize("accident", ["crash", "kill"])
def test_a_kill_in_a_turn_loses_no_other_turn(client, accident):
    """After a crash the engine starts the replica again; after its own command it does not."""
    project = client.project
    session, wanted = client.sessions()
    before = {replica: client.answered(replica) for replica in REPLICAS}
    assert client.turn(session) == next(wanted)
    [home] = [replica for replica in REPLICAS if client.answered(replica) > before[replica]]
    [other] = {*REPLICAS} - {home}
    count = client.answered(other)
    with client.running(session) as rest:
        if accident == "crash":
            project.crash(home)
        else:
            engine("kill", "--signal", "KILL", project.container(home))
    assert ENDED not in rest
    assert client.turn(session) == next(wanted)
    assert client.answered(other) == count + 1
    if accident == "kill":
        project.compose("--profile", "replicas", "start", home)
    client.wait()
    assert client.turn(session) == next(wanted)


def test_the_store_and_the_proxy_return_after_a_crash(client):
    session, wanted = client.sessions()
    for service in ("store", "proxy"):
        client.project.crash(service)
        client.wait()
        assert client.turn(session) == next(wanted)


def test_without_the_store_only_sessions_fail(client):
    session, wanted = client.sessions()
    client.project.compose("stop", "store")
    answer = client.http.get(f"/v1/sessions/{session}")
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "store_unavailable"
    assert client.http.get("/ready").status_code == 503
    assert client.http.get("/health").status_code == 200
    assert client.http.post("/v1/completions", json=TURN).status_code == 200
    client.project.compose("--profile", "replicas", "start", "store")
    client.wait()
    assert client.turn(session) == next(wanted)


def test_down_and_up_lose_no_acknowledged_turn(client):
    """All services end in time by themselves: none is killed."""
    project = client.project
    (session, wanted), (long, _) = client.sessions(), client.sessions()
    with client.running(long) as rest:
        project.compose("--profile", "replicas", "stop")
    codes = {service: exit_code(project.container(service)) for service in ("proxy", "store")}
    assert codes == {"proxy": 0, "store": 0}
    assert {exit_code(project.container(replica)) for replica in REPLICAS} == {143}
    project.compose("--profile", "replicas", "down")
    assert not project.compose("ps", "--all", "--quiet")
    project.compose("up", "--detach", "proxy")
    client.wait()
    assert client.turn(session) == next(wanted)
    assert client.turn(long)[0] == 2 + (ENDED in rest)


def test_no_package_is_missing_or_broken_and_the_size_is_known(image):
    shell = ["run", "--rm", "--entrypoint", "sh", image, "-c"]
    assert "No broken requirements" in engine(*shell, "pip check").stdout
    size = int(engine(*shell, "du -sm /opt/tinymamba").stdout.split()[0])
    assert size < 1000  # MiB, with PyTorch for CPUs
