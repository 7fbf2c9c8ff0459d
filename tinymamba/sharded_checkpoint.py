"""Checkpoints of sharded runs: a folder with one file per process, and a manifest of them all.

    tinymamba_model_latest.pt/shard_00000.safetensors   what process 0 holds of model and optimizer
    tinymamba_model_latest.pt/shard_00001.safetensors
    tinymamba_model_latest.pt/manifest.json             the rest, and what the shards must be

The folder has the name that the file of another run would have. torch.distributed.checkpoint plans
which process writes and reads what (see `shard_files`); its own metadata would be a pickle, which
can hold code, so the manifest is JSON: hashes and sizes of the shards, where each tensor lies, and
the plain values. It is written last. A folder without it is no checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from tinymamba.checkpoint import (
    CHECKPOINT_FORMAT,
    MANIFEST,
    BackgroundWriter,
    clear_folder,
    folder_of,
    is_checkpoint,
    load_newest,
    move_into_place,
    open_checkpoint,
    run_files,
    sync_folder,
    temporary_name,
)
from tinymamba.cli import UserError, from_launcher, require, say
from tinymamba.distributed import all_reduce, fill_parameter, is_same, keep, local_tensor
from tinymamba.initial_weights import TABLES

SHARDS_FORMAT = "tinymamba-sharded-1"
SHARD_NAME = re.compile(r"shard_\d{5,}\.safetensors")
REMEDY = "use a checkpoint that testv2.py saved"

# -------------------------------------------------------------------------- values and tensors


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that has not been read yet: its chunks are (file, offsets, sizes)."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    chunks: list[tuple[str, list[int], list[int]]]


@torch.no_grad()
def split(state: dict) -> tuple[Any, dict[str, Tensor]]:
    """The state as JSON, in which names stand for tensors, and these tensors by name.

    Tied tensors have one name. A shard that is empty in this process is left out.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[tuple, str] = {}

    def encode(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            return {"$tensor": add(value, path)}
        if isinstance(value, dict):
            items = [[k, encode(v, f"{path}/{k}" if path else str(k))] for k, v in value.items()]
            plain = all(isinstance(k, str) and not k.startswith("$") for k in value)
            return dict(items) if plain else {"$dict": items}
        if isinstance(value, list | tuple):
            items = [encode(v, f"{path}/{i}") for i, v in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        if isinstance(value, float) and not math.isfinite(value):
            return {"$float": str(value)}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{path}: a checkpoint cannot hold a {type(value).__name__}")

    def add(t: Any, path: str) -> str:
        local = local_tensor(t)
        if local.numel() == 0 < t.numel():
            return path
        place = local.untyped_storage().data_ptr(), local.storage_offset(), local.stride()
        name = names.setdefault((*place, t.shape, t.dtype), path) if t.numel() else path
        tensors.setdefault(name, t)
        return name

    return encode(state, ""), tensors


def join(value: Any, tensors: dict[str, Any]) -> Any:
    """The inverse of `split`."""
    if isinstance(value, list):
        return [join(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$dict" in value:
        return {k: join(v, tensors) for k, v in value["$dict"]}
    if "$tuple" in value:
        return tuple(join(value["$tuple"], tensors))
    if "$float" in value:
        return float(value["$float"])
    return {k: join(v, tensors) for k, v in value.items()}


# ------------------------------------------------------------------------------------ manifest


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(body: dict) -> str:
    """SHA-256 of a manifest's content."""
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


class Manifest:
    """What manifest.json says of the folder of a checkpoint; a damaged one is a UserError."""

    def __init__(self, path: str | Path):
        self.path, self.folder = Path(path), folder_of(path)
        missing = "is not a whole checkpoint: manifest.json, which is written last, is missing"
        require((self.folder / MANIFEST).is_file(), str(path), missing, REMEDY)
        try:
            body = json.loads((self.folder / MANIFEST).read_bytes())
            self.checksum = body.pop("checksum", None)
            sound = self.checksum == checksum(body)
            require(sound, str(path), "is damaged: the checksum of manifest.json is wrong", REMEDY)
            problem = f"is not a TinyMamba checkpoint of format {SHARDS_FORMAT}"
            require(body["format"] == SHARDS_FORMAT, str(path), problem, REMEDY)
            self.files: dict[str, dict] = body["files"]
            self.tensors = {n: stored_tensor(n, said) for n, said in body["tensors"].items()}
            self.values = dict(join(body["values"], self.tensors))
            named = all(map(SHARD_NAME.fullmatch, self.files))
            hashed = all(isinstance(facts["sha256"], str) for facts in self.files.values())
            sound = named and hashed and self.is_covered()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            problem = f"is damaged: manifest.json cannot be read ({type(e).__name__})"
            raise UserError(str(path), problem, REMEDY) from None
        require(sound, str(path), "is damaged: manifest.json contradicts itself", REMEDY)

    def is_covered(self) -> bool:
        """Whether the chunks of every tensor are as large as it is, and the files as all chunks."""
        size = 0
        for t in self.tensors.values():
            chunks = [math.prod(sizes) for file, _, sizes in t.chunks if file in self.files]
            if sum(chunks) != math.prod(t.shape) or min(t.shape, default=0) < 0:
                return False
            size += math.prod(t.shape) * t.dtype.itemsize
        return size <= sum(facts["bytes"] for facts in self.files.values())

    def what_is_wrong(self, name: str) -> str:
        """What is wrong with a shard: all of it is read; empty if nothing is."""
        path, facts = self.folder / name, self.files[name]
        try:
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {facts['bytes']}"
            return "" if hash_file(path) == facts["sha256"] else f"the checksum of {name} is wrong"
        except OSError as e:
            return f"{name} cannot be read ({e.strerror})"


def stored_tensor(name: str, said: dict) -> StoredTensor:
    """A tensor as the manifest describes it."""
    dtype = getattr(torch, said["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(said["dtype"])
    return StoredTensor(name, dtype, torch.Size(said["shape"]), said["chunks"])


def write_manifest(folder: Path, values: Any, tensors: dict, files: dict) -> None:
    """Write the manifest of a folder whose shards are all there, and flush both to disk."""
    for name, facts in files.items():
        problem = "is not where process 0 wrote: the processes do not see the same folder"
        there = (folder / name).is_file() and (folder / name).stat().st_size == facts["bytes"]
        require(there, str(folder / name), problem, "put --checkpoint_path where all of them do")
    body = {"format": SHARDS_FORMAT, "files": files, "tensors": tensors, "values": values}
    temporary = folder / f"{MANIFEST}.tmp"
    with open(temporary, "xb") as file:
        file.write(json.dumps({**body, "checksum": checksum(body)}).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST)  # never seen in part
    sync_folder(folder)


# ------------------------------------------------------------------------------------- writing


def save_sharded(
    path: str | Path, state: dict, previous: Path | None = None, group: Any = None
) -> None:
    """Write the folder at `path`, to which all processes of `group` call it; None: one process.

    Each writes what it holds of `state`, hashes it and reads it back; then the first one writes the
    manifest and renames the folder. What was at `path` becomes `previous`, if that is given.
    """
    import torch.distributed.checkpoint as dcp

    from tinymamba.shard_files import ShardFileWriter

    path = Path(path)
    temporary = temporary_name(path)
    values, tensors = split({**state, "format_version": CHECKPOINT_FORMAT})

    made: list[Path] = []

    def begin() -> None:
        if os.path.lexists(path) and not is_checkpoint(path):
            raise OSError("something other than a checkpoint is there")
        clear_folder(temporary, path)
        temporary.unlink(missing_ok=True)  # what a killed save has left of a file
        temporary.mkdir(parents=True)
        made.append(temporary)

    def finish(stored: dict, files: dict) -> None:
        write_manifest(temporary, values, stored, files)
        move_into_place(temporary, path, previous)

    quiet = warnings.catch_warnings(action="ignore")  # that one process is no group
    try:
        with contextlib.nullcontext() if group else quiet:
            dcp.save(
                tensors,
                storage_writer=ShardFileWriter(temporary, begin, finish),
                planner=dcp.DefaultSavePlanner(False, False),
                process_group=group,
                no_dist=group is None,
            )
    except dcp.api.CheckpointException as e:
        whole = (temporary / MANIFEST).is_file()  # so it only waits for its name
        if made and not whole:
            shutil.rmtree(temporary, ignore_errors=True)  # to free the space
        rank, (error, _) = next(iter(e.failures.items()))
        if isinstance(error, UserError):
            raise error from None
        where = f"process {rank}: " if group is not None else ""
        remedy = "free space or choose another path"
        raise UserError(str(path), f"cannot be written ({where}{error})", remedy) from None


class ShardedWriter(BackgroundWriter):
    """Writes the folders of a sharded run; every process calls it at the same steps.

    In the background, from a copy of the shards of this process in host memory, which is pinned
    where there is CUDA and used again. The writers talk over a group of their own: the training's
    collective operations run meanwhile.
    """

    everywhere = True

    def __init__(self, background: bool):
        super().__init__(background)
        self.group = dist.new_group(backend="gloo")
        keep(self.group)
        self.stager: Any = None

    def save(self, path: str | Path, state: dict, previous: Path | None = None) -> None:
        """Write one folder."""
        save_sharded(path, state, previous, self.group)

    def copy(self, state: dict) -> dict:
        """A copy of the state with the shards in host memory."""
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        cuda = torch.cuda.is_available()
        options = StagingOptions(
            use_pinned_memory=cuda,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=cuda,
        )
        self.stager = self.stager or DefaultStager(options)
        return self.stager.stage(state)

    def close(self) -> None:
        """End the thread and free the copies."""
        super().close()
        if self.stager is not None:
            self.stager.close()


# ------------------------------------------------------------------------------------- reading


class UnreadCheckpoint(dict):
    """The plain values of a folder; its tensors are StoredTensors until `read_tensors_of`."""

    def __init__(self, path: str | Path):
        self.manifest = Manifest(path)
        super().__init__(self.manifest.values)


def read_sharded(path: str | Path, skip: Iterable[str] = (), mapped: bool = False) -> dict:
    """The whole checkpoint of a folder in this process, without the parts of `skip`.

    If a run that goes on replaces the folder meanwhile, the new one is read. Of a `mapped` one
    only embedding and head are read; the other tensors are on the meta device.
    """
    while True:
        begun = identity(path)
        try:
            return read_whole(path, skip, mapped)
        except UserError:
            if identity(path) == begun:
                raise


def identity(path: str | Path) -> tuple[int, int] | None:
    """What tells a folder from the one that replaces it."""
    try:
        facts = os.stat(folder_of(path) / MANIFEST)
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns


def read_whole(path: str | Path, skip: Iterable[str], mapped: bool) -> dict:
    """Verify and read a folder that nobody replaces."""
    saved = UnreadCheckpoint(path)
    require_sound(saved.manifest, [saved.manifest.what_is_wrong(n) for n in saved.manifest.files])
    for part in skip:
        saved.pop(part, None)
    tables = {f"model/{name}" for name in TABLES}

    def like(t: StoredTensor) -> Tensor | None:
        return torch.empty(t.shape, device="meta") if mapped and t.name not in tables else None

    return read_tensors_of(saved, like)


@contextlib.contextmanager
def unchanged(path: str | Path) -> Iterator[None]:
    """An error if another run replaces the folder at `path` meanwhile."""
    begun = identity(path)
    yield
    problem = "was replaced while it was read"
    require(identity(path) == begun, str(path), problem, "start again")


def fill_parameters(model: Any, weights: dict[str, Tensor], path: str | Path) -> None:
    """Give a model, which may be sharded, the weights by name.

    Those on the meta device are in the folder at `path`, which has been verified: each process
    reads its rows. All must read the same folder, which a run that goes on may replace.
    """
    unread = {}
    for name, p in model.named_parameters():
        if weights[name].is_meta:
            unread[name] = p.detach()
        else:
            fill_parameter(p, weights[name])
    if unread:
        saved = UnreadCheckpoint(path)
        read_tensors(saved.manifest, {saved["model"][n].name: p for n, p in unread.items()})
        same = is_same(int(saved.manifest.checksum[:6], 16), next(iter(unread.values())).device)
        problem = "was replaced while the processes read it, or they see different ones"
        require(same, str(path), problem, "start again")


def require_sound(manifest: Manifest, problems: list[str]) -> None:
    """Reject a folder with a damaged shard."""
    found = [problem for problem in problems if problem]
    require(not found, str(manifest.path), f"is damaged: {', '.join(found)}", REMEDY)


def read_tensors_of(saved: UnreadCheckpoint, like: Callable[[StoredTensor], Any]) -> dict:
    """The checkpoint with its tensors, each on the device and sharded as `like` says.

    None stands for a whole tensor on the CPU. Nothing is read for one on the meta device. The
    shards must have been verified.
    """
    targets: dict[str, Tensor] = {}

    def make(t: Any) -> Any:
        if not isinstance(t, StoredTensor):
            return t
        if t.name not in targets:
            pattern = like(t)
            if pattern is None:
                targets[t.name] = torch.empty(t.shape, dtype=t.dtype)
            else:
                targets[t.name] = torch.empty_like(pattern, dtype=t.dtype, requires_grad=False)
        return targets[t.name]

    whole = tree_map(make, dict(saved))
    read_tensors(saved.manifest, {name: t for name, t in targets.items() if not t.is_meta})
    return whole


def read_tensors(manifest: Manifest, targets: dict[str, Tensor]) -> None:
    """Fill tensors, which may be sharded, with those of the same names in a folder."""
    import torch.distributed.checkpoint as dcp

    from tinymamba.shard_files import ShardFileReader

    reader, planner = ShardFileReader(manifest), dcp.DefaultLoadPlanner(False, False)
    try:
        with warnings.catch_warnings(action="ignore"):  # that one process is no group
            dcp.load(dict(targets), storage_reader=reader, planner=planner, no_dist=True)
    except dcp.api.CheckpointException as e:
        error, _ = next(iter(e.failures.values()))
        problem = f"is damaged: its shards are not what its manifest says ({error})"
        raise UserError(str(manifest.path), problem, REMEDY) from None


def read_saved(saved: dict, config: Any, weights: dict[str, Tensor], optimizer: Any) -> dict:
    """The checkpoint of a resumed run, with the shards that this process needs.

    `weights` and `optimizer` say how this run shards. All processes share the verification, agree
    on the newest good checkpoint, and fall back to the one before, as with files.
    """
    if not isinstance(saved, UnreadCheckpoint):
        return saved
    device, path = next(iter(weights.values())).device, saved.manifest.path
    if path in run_files(config.checkpoint_path):
        report = say if from_launcher("RANK", 0) == 0 else None
        saved = load_newest(config.checkpoint_path, report, lambda path: agree_on(path, device))
    else:
        saved = agree_on(path, device)
    if not isinstance(saved, UnreadCheckpoint):
        return saved
    owners = [p for group in optimizer.param_groups for p in group["params"]]
    patterns = {f"model/{name}": t for name, t in weights.items()}
    patterns |= {f"optimizer/state/{number}": p for number, p in enumerate(owners)}

    def like(t: StoredTensor) -> Tensor | None:
        name = t.name.rpartition("/")[0] if t.name.startswith("optimizer/") else t.name
        pattern = patterns.get(name)
        return pattern if pattern is not None and pattern.shape == t.shape else None

    return read_tensors_of(saved, like)


def agree_on(path: str | Path, device: torch.device) -> dict:
    """Open a checkpoint in all processes; one that any of them cannot use is a UserError in all.

    Shard i is verified by process i modulo their number, the one that wrote it if as many wrote.
    """
    rank, world, error = from_launcher("RANK", 0), from_launcher("WORLD_SIZE", 1), None
    try:
        found = open_checkpoint(path)
    except UserError as e:
        found, error = {}, e
    failed = all_reduce([float(error is not None)], device)[0]
    if failed:
        problem, remedy = "cannot be opened by another process", "see what all of them can see"
        raise error or UserError(str(path), problem, remedy)
    if not isinstance(found, UnreadCheckpoint):
        return found
    manifest = found.manifest
    own = [name for number, name in enumerate(manifest.files) if number % world == rank]
    problems = {name: manifest.what_is_wrong(name) for name in own}
    counts = all_reduce([float(bool(problems.get(name))) for name in manifest.files], device)
    for number, (name, count) in enumerate(zip(manifest.files, counts, strict=True)):
        if count and not problems.get(name):
            problems[name] = f"{name} is not what it was, says process {number % world}"
    require_sound(manifest, list(problems.values()))
    return found
