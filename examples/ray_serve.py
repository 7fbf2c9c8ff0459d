"""Several replicas of serve.py under Ray Serve, on one machine or a cluster, with common sessions.

    pip install "ray[serve]" redis
    python examples/ray_serve.py --replicas 2 --checkpoint tinymamba_model_latest.pt \\
        --session_store redis://127.0.0.1:6379/0

All flags but --replicas are those of serve.py. Ray listens on --host and --port, sends a request to
any replica, and starts one again that has died. The sessions are in the store: any replica
continues any of them, from the last turn that was acknowledged. On a cluster, the checkpoint must
be at the same path on all machines, and the repository or the package on each. The replicas get
TINYMAMBA_API_KEY and REDIS_URL as they are in the environment of this command.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import ray
from ray import serve  # Ray Serve; serve.py is tinymamba.serve here

ROOT = Path(__file__).resolve().parent.parent
PATHS = ("checkpoint", "tokenizer", "adapter", "onnx_folder", "session_store", "session_dir")
SECRETS = ("TINYMAMBA_API_KEY", "REDIS_URL")  # of this command


def make_app(replicas: int, flags: list[str]) -> Any:
    """The Ray Serve application of so many replicas."""

    def build() -> Any:  # in each replica
        from tinymamba.serve import open_api, parse

        return open_api(parse(flags)).app()

    deployment = serve.deployment(
        name="tinymamba",
        num_replicas=replicas,
        max_ongoing_requests=320,  # --batch_size and --max_queue together: the replica decides
        ray_actor_options={"num_cpus": 1},
    )
    return deployment(serve.ingress(build)()).bind()


def main(argv: list[str]) -> None:
    """Serve until SIGINT or SIGTERM."""
    sys.path.insert(0, str(ROOT))
    from tinymamba.serve import parse

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--replicas", type=int, default=2)
    own, flags = parser.parse_known_args(argv)
    options = parse(flags)  # a wrong flag is reported here, before any replica starts
    for name in PATHS:  # replicas run in other folders
        if (path := getattr(options, name)) and "://" not in path:
            flags += [f"--{name}", os.path.abspath(path)]
    env = {name: os.environ[name] for name in SECRETS if name in os.environ}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ray.init(runtime_env={"env_vars": env})
    serve.start(http_options={"host": options.host, "port": options.port})
    serve.run(make_app(own.replicas, flags), blocking=True)


if __name__ == "__main__":
    main(sys.argv[1:])
