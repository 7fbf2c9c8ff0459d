"""Atomic, checksummed files: tensors, checkpoints and model folders.

A file is written under a temporary name, flushed, and renamed; a checksum over its content finds
every flipped bit. Only tensors and plain values are read, so no code in a file is ever run.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from tinymamba.cli import UserError, from_launcher, grant_or_choose, require, say
from tinymamba.kernels import settle_ties
from tinymamba.lock import hold_lock

# ----------------------------------------------------------------------------------- writing


def digest(value: Any) -> str:
    """SHA-256 over nested dicts and lists of tensors, functions that make one, and plain values."""
    h = hashlib.sha256()

    def feed(v: Any) -> None:
        if isinstance(v, Tensor):
            h.update(f"{v.dtype}{tuple(v.shape)}".encode())
            v = v.detach().cpu().contiguous()
            v = v.as_strided((v.numel(),), (1,))  # a lone element may have any stride
            h.update(v.view(torch.uint8).numpy().data)
        elif callable(v):
            feed(v())
        elif isinstance(v, dict):
            feed([[str(k), v[k]] for k in sorted(v, key=str)])
        elif isinstance(v, list | tuple):
            h.update(b"[%d" % len(v))
            for item in v:
                feed(item)
        else:
            h.update(f"{type(v).__name__} {v!r};".encode())

    feed(value)
    return h.hexdigest()


WRITING = threading.Lock()  # two writers of one file would share its temporary name


def atomic_write(
    path: str | Path, write: Callable[[str], object], previous: Path | None = None
) -> None:
    """Let `write(temporary name)` make the file, then rename it into place, and flush to disk.

    An older file at `path` becomes `previous`, if that is given.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        if os.path.lexists(path) and not path.is_file() and not is_sharded(path):
            raise OSError("something other than a plain file is there")
        path.parent.mkdir(parents=True, exist_ok=True)
        with WRITING:
            clear_folder(temporary, path)
            write(str(temporary))
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            move_into_place(temporary, path, previous)
    except (OSError, RuntimeError, ValueError) as e:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink()
        remedy = "free space or choose another path"
        raise UserError(str(path), f"cannot be written ({e})", remedy) from e


def temporary_name(path: Path) -> Path:
    """The name of a file or folder until it is whole."""
    return path.parent / f"{path.name}.tmp"


def clear_folder(temporary: Path, path: Path) -> None:
    """Remove what a killed save has left of a folder; a whole one that waits gets its name."""
    if folder_of(path) == temporary:
        move_into_place(temporary, path)
    if is_sharded(temporary):
        remove_checkpoint(temporary)
    elif temporary.is_dir():
        temporary.rmdir()  # an error if it is another's


def move_into_place(temporary: Path, path: Path, previous: Path | None = None) -> None:
    """Rename a finished file or folder to `path`, and flush that to disk.

    What was there becomes `previous`, if that is given.
    """
    if previous and path.exists():
        replace_path(path, previous)
    replace_path(temporary, path)
    sync_folder(path.parent)


def replace_path(source: Path, target: Path) -> None:
    """Rename a file or folder; if either is one, the checkpoint it replaces is put aside first."""
    if not os.path.lexists(target) or not (source.is_dir() or target.is_dir()):
        os.replace(source, target)
        return
    if not is_checkpoint(target):
        raise OSError(f"{target} is no checkpoint")
    aside = target.with_name(f"{target.name}.old")
    remove_checkpoint(aside)
    os.replace(target, aside)
    os.replace(source, target)
    remove_checkpoint(aside)


def remove_checkpoint(path: Path) -> None:
    """Delete a file or a folder, if it is there; the manifest first, so that no part is taken."""
    (path / MANIFEST if path.is_dir() else path).unlink(missing_ok=True)
    if path.is_dir():
        shutil.rmtree(path)


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk: a rename in it is there once the folder is."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def write_json(path: str | Path, value: Any) -> None:
    """Write plain values as indented JSON."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write bytes."""
    atomic_write(path, lambda temporary: Path(temporary).write_bytes(data))


# ------------------------------------------------------------------------------ tensor files

STATE_FORMAT = "tinymamba-state-2"


def pack_tensors(tensors: dict[str, Tensor], notes: dict[str, str]) -> bytes:
    """A safetensors file with a checksum over the tensors and the notes."""
    return b"".join(tensor_parts(tensors, notes))


def write_tensors(path: str | Path, tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
    """Write such a file."""
    parts = tensor_parts(tensors, notes)

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            file.writelines(parts)

    atomic_write(path, write)


def tensor_parts(tensors: dict[str, Tensor], notes: dict[str, str]) -> list[bytes | memoryview]:
    """The bytes of such a file, in parts: large data are not copied once more."""
    from safetensors.torch import save

    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    notes = {"format": STATE_FORMAT, **notes}
    notes["checksum"] = digest([tensors, notes])
    return order_notes(save(tensors, notes), notes)


def order_notes(data: bytes, notes: dict[str, str]) -> list[bytes | memoryview]:
    """The parts of a safetensors file with its notes in this order.

    So equal content is equal bytes: the library writes notes in a random order (issue 584 of
    github.com/safetensors/safetensors).
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end]) | {"__metadata__": notes}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return [len(text).to_bytes(8, "little"), text, memoryview(data)[end:]]


def read_notes(data: bytes) -> dict[str, str]:
    """The notes at the head of a safetensors file, unchecked; none if it is no such file.

    The file begins with 8 bytes, the length of the JSON that follows, little-endian.
    """
    size = int.from_bytes(data[:8], "little")
    try:
        return dict(json.loads(data[8 : 8 + size])["__metadata__"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def require_state(
    name: str,
    said: dict[str, str],
    notes: dict[str, str],
    found: dict[str, tuple[list[int], torch.dtype]],
    like: dict[str, Tensor],
    most: int | None,
) -> None:
    """Reject a file whose notes or tensors (shape and dtype of each) are not as they must be."""
    wanted = {**notes, "format": STATE_FORMAT}
    same = all(said.get(k) == v for k, v in wanted.items())
    problem, remedy = "is not a state of this model", "load the model that it belongs to"
    require(same, name, problem, remedy)
    known = found.keys() == like.keys()
    rows = found["position"][0][0] if known and found["position"][0] else 1
    for n, t in like.items() if known else ():
        known = known and found[n] == ([rows, *t.shape[1:]], t.dtype)
    known = known and (most is None or 1 <= rows <= most)
    require(known, name, "has other tensors than a state of this model", "save it again")


def unpack_tensors(
    data: bytes, name: str, like: dict[str, Tensor], notes: dict[str, str], most: int | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `read_tensors`, from the bytes of a file that errors call `name`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    said, remedy = read_notes(data), "save it again"
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as e:
        raise UserError(name, f"cannot be read ({e})", remedy) from None
    found = {n: ([*t.shape], t.dtype) for n, t in tensors.items()}
    require_state(name, said, notes, found, like, most)
    checksum = said.pop("checksum", None)
    require(checksum == digest([tensors, said]), name, "is damaged", remedy)
    return tensors, said


def read_tensors(
    path: str | Path, like: dict[str, Tensor], notes: dict[str, str], most: int | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and notes of such a file, whose notes must include `notes`.

    Names, dtypes and shapes must be those of `like`, but for the number of rows: it is at most
    `most`, if that is given. All this is checked before a tensor is read; a file that differs is a
    UserError.
    """
    from safetensors import SafetensorError, safe_open

    name, remedy = str(path), "save it again"
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            slices = {n: file.get_slice(n) for n in file.keys()}  # noqa: SIM118
            found = {
                n: (s.get_shape(), s[:0].dtype if s.get_shape() else None)
                for n, s in slices.items()
            }
            require_state(name, said, notes, found, like, most)
            tensors = {n: file.get_tensor(n).clone() for n in like}  # the file may be replaced
    except (SafetensorError, OSError) as e:
        raise UserError(name, f"cannot be read ({e})", remedy) from None
    checksum = said.pop("checksum", None)
    require(checksum == digest([tensors, said]), name, "is damaged", remedy)
    return tensors, said


def read_all_tensors(
    path: str | Path, remedy: str, unsigned: str | tuple[str, ...] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and notes of a safetensors file of any content; a damaged one is a UserError.

    A file without a checksum is accepted only if all its names begin with `unsigned`: other
    libraries write none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
            notes = file.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise UserError(str(path), f"cannot be read ({e})", remedy) from None
    checksum = notes.pop("checksum", None)
    if checksum is None and unsigned is not None:
        sound = all(name.startswith(unsigned) for name in tensors)
    else:
        sound = checksum == digest([tensors, notes])
    require(sound, str(path), "is damaged", remedy)
    return tensors, notes


# ------------------------------------------------------------------------------- checkpoints

CHECKPOINT_FORMAT = 3
MANIFEST = "manifest.json"  # of the folder that a sharded run writes: see sharded_checkpoint


def folder_of(path: str | Path) -> Path:
    """The folder of a sharded checkpoint.

    Between the two renames that replace a folder it has its temporary name, and is whole.
    """
    path, temporary = Path(path), temporary_name(Path(path))
    waiting = not os.path.lexists(path) and (temporary / MANIFEST).is_file()
    return temporary if waiting else path


def is_sharded(path: str | Path) -> bool:
    """Whether a sharded checkpoint is there, whole or not."""
    folder = folder_of(path)
    return (folder / MANIFEST).is_file() or any(folder.glob("shard_*.safetensors"))


def is_checkpoint(path: str | Path) -> bool:
    """Whether there is a file, or the folder of a sharded checkpoint."""
    return Path(path).is_file() or is_sharded(path)


def save_checkpoint(path: str | Path, state: dict, previous: Path | None = None) -> None:
    """Write `state` (tensors and plain values) with a checksum, and read it back.

    Only then does it replace the file at `path`, which becomes `previous`, if that is given.
    """
    state = {**state, "format_version": CHECKPOINT_FORMAT}
    state["checksum"] = digest(state)

    def write(temporary: str) -> None:
        torch.save(state, temporary)
        load_checkpoint(temporary)

    atomic_write(path, write, previous)


def save_model(path: str | Path, model: Any, weights: dict[str, Tensor] | None = None) -> None:
    """Write a checkpoint of a model without the state of training; None takes its own weights."""
    weights = model.state_dict() if weights is None else weights
    settle_ties(model, weights)
    config, tokenizer = model.config.to_dict(), model.tokenizer
    save_checkpoint(path, {"model": weights, "config": config, "tokenizer": tokenizer})


def open_checkpoint(path: str | Path) -> dict:
    """As `load_checkpoint`, but the tensors of a folder are left to `read_saved`."""
    if not is_sharded(path):
        return load_checkpoint(path)
    from tinymamba.sharded_checkpoint import UnreadCheckpoint

    return UnreadCheckpoint(path)


def load_checkpoint(path: str | Path, mapped: bool = False, skip: tuple[str, ...] = ()) -> dict:
    """Read a file or folder onto the CPU; a missing, damaged or foreign one is a UserError.

    The tensors of a `mapped` file stay there: the processes of a machine share its pages in memory.
    Those of a `mapped` folder are on the meta device, but for the tables: see `fill_parameters`.
    The parts of `skip` are left out.
    """
    if is_sharded(path):
        from tinymamba.sharded_checkpoint import read_sharded

        return read_sharded(path, skip, mapped)
    name, remedy = str(path), "use a checkpoint that testv2.py saved"
    require(Path(path).is_file(), name, "no such checkpoint", "train one, or check the path")
    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise UserError(name, "is damaged, or holds code, which is never run", remedy) from None
    except Exception as e:  # what a damaged pickle raises depends on where it is damaged
        raise UserError(name, f"is damaged ({type(e).__name__})", remedy) from e
    require(
        isinstance(state, dict) and state.get("format_version") == CHECKPOINT_FORMAT,
        name,
        f"is not a TinyMamba checkpoint of format {CHECKPOINT_FORMAT}",
        remedy,
    )
    require(
        state.pop("checksum", None) == digest(state),
        name,
        "is damaged: its checksum is wrong",
        remedy,
    )
    return {name: value for name, value in state.items() if name not in skip}


# How the names of a run's other files end: see `sibling`.
OTHER_TAG = re.compile(r"_(best|previous|step\d+)$")


def require_run_name(path: str | Path) -> None:
    """Reject a path that no run can save its newest state to."""
    field, problem = "checkpoint_path", f"{str(path)!r} is not a file name"
    folder = os.path.isdir(path) and not is_sharded(path)
    require(str(path) and not folder, field, problem, "name a file")
    longest = sibling(path, "previous").name + ".tmp"
    problem, remedy = f"{path} is too long for the names made of it", "choose a shorter one"
    require(len(os.fsencode(longest)) <= 255, field, problem, remedy)
    stem = Path(path).stem
    other = stem.removesuffix("_latest") if stem.endswith("_latest") else f"{stem}_latest"
    twin = Path(path).with_name(other + Path(path).suffix)
    problem = f"{path} would share {sibling(path, 'best').name} with the run of {twin}"
    require(not is_checkpoint(twin), field, problem, "choose another")
    found = OTHER_TAG.search(stem)
    problem = f"{path} is what a run calls its {found and found[1]} checkpoint"
    remedy = f"to continue from it pass --resume_from {path}, and another --checkpoint_path"
    require(not found, field, problem, remedy)


def run_lock(path: str | Path) -> contextlib.AbstractContextManager:
    """Keep a second run from writing the files of the run that saves to `path`.

    Of the processes of a run, the first one holds the lock.
    """
    if from_launcher("RANK", 0) != 0:
        return contextlib.nullcontext()
    remedy = "wait until that run has ended, or choose another --checkpoint_path"
    return hold_lock(mark_file(path, "lock"), str(path), remedy)


def mark_file(path: str | Path, mark: str) -> Path:
    """A small file of the run that saves to `path`: lock, or begins (see `find_saved`)."""
    file = sibling(path, "run")
    return file.with_name(f"{file.name}.{mark}")


def run_files(path: str | Path) -> list[Path]:
    """The checkpoints of the run that saves to `path`: that file, then the others that exist."""
    path = Path(path)
    stem = path.stem.removesuffix("_latest")
    near = path.parent.glob(f"{glob.escape(stem)}_*{glob.escape(path.suffix)}")
    tagged = ((file, OTHER_TAG.fullmatch(file.stem.removeprefix(stem))) for file in near)
    others = [file for file, tag in tagged if tag and is_checkpoint(file) and file != path]
    return [path, *sorted(others)]


def load_newest(
    path: str | Path,
    say: Callable[[str], object] | None = say,
    load: Callable[[Path], dict] = load_checkpoint,
) -> dict:
    """The checkpoint at `path`, or if that is damaged or gone the newest good one of its run.

    Damaged files are renamed, so that no save takes them for good ones, and `say` reports it.
    Without `say` nothing is renamed: of several processes, only one should do it.
    """
    damaged: dict[Path, UserError] = {}
    newest: dict | None = None
    source = Path(path)
    for file in run_files(path):
        try:
            saved = load(file)
        except UserError as e:
            damaged[file] = e
            continue
        if newest is None or saved.get("global_step", 0) > newest.get("global_step", 0):
            newest, source = saved, file
        if file == Path(path):
            break
    if newest is None:
        raise next(iter(damaged.values()))
    if say:
        for file, error in damaged.items():
            say(f"warning: {file}: {error.args[1]}; continuing from {source}")
            move_aside(file, ".damaged", say)
    return newest


def find_saved(config: Any) -> tuple[dict | None, str]:
    """The checkpoint that a run continues and, if that is another run's, its file.

    None and "" if the run begins. `config` has checkpoint_path, resume, resume_from and init_from.
    A run that torchrun has started again continues if it has saved anything. If it failed before
    it could move an earlier run's files aside, what is there is not its own: a file marks that.
    """
    path, first = config.checkpoint_path, from_launcher("RANK", 0) == 0
    require_one_start(config)
    begins, life = mark_file(path, "begins"), from_launcher("TORCHELASTIC_RESTART_COUNT", 0)
    there = any(map(is_checkpoint, run_files(path)))
    goes_on = config.resume is True or Path(config.resume_from).resolve() == Path(path).resolve()
    if config.resume == "auto" or (life > 0 and not begins.exists()):
        goes_on = goes_on or there
    if "TORCHELASTIC_RESTART_COUNT" in os.environ and first and there and not goes_on:
        begins.touch()
    if not goes_on and not config.resume_from:
        return None, ""
    source = "" if goes_on else config.resume_from
    report = say if first else None
    saved = load_newest(path, report, open_checkpoint) if goes_on else open_checkpoint(source)
    remedy = "start a new run from it: --init_from, or python peft.py --method full"
    require("optimizer" in saved, source or path, "holds no run to resume", remedy)
    return saved, source


def require_one_start(config: Any) -> None:
    """Reject flags that name two starts, or one whose file this run would overwrite."""
    path, given = config.checkpoint_path, {}
    for name in ("init_from", "resume_from"):
        if file := getattr(config, name):
            given[name] = Path(file).resolve()
    words = [*given, *(["resume"] if config.resume is True else [])]
    remedy = "leave one of them out, or use --resume auto"
    require(len(words) < 2, " and ".join(words), "name two starts", remedy)
    own = {file.resolve() for file in run_files(path)}
    if given.get("resume_from") == Path(path).resolve():
        return
    for name, file in given.items():
        problem = f"{file.name} is a file of the run that saves to {path}"
        require(file not in own, name, problem, "choose another --checkpoint_path")


def keep_best(trainer: Any, loss: float) -> None:
    """Write ..._best.pt, and with save_top_k > 1 each of the best as ..._stepN.pt too.

    `loss` is that of a Trainer of testv2.py in validation.
    """
    t, k, path = trainer, trainer.config.save_top_k, trainer.config.checkpoint_path
    name = sibling(path, f"step{t.step}").name
    if not math.isfinite(loss):
        return
    ranked = sorted([*t.progress["best"], [loss, name]])
    t.progress["best"] = ranked[:k]
    if [loss, name] not in ranked[:k]:
        return
    state = t.state(loss)
    if ranked[0][1] == name:
        t.write(sibling(path, "best"), state)
    if k > 1:
        t.write(Path(path).with_name(name), state)
        t.writer.finish()  # before the file that it replaces is deleted
        for _, old in ranked[k:] if t.main else ():
            remove_checkpoint(Path(path).with_name(old))


class BackgroundWriter:
    """Writes checkpoints one after another, in a thread of its own if `background`."""

    everywhere = False  # the first process alone writes

    def __init__(self, background: bool):
        self.background, self.pool = background, ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def write(self, path: str | Path, state: dict, previous: Path | None = None) -> None:
        """Save one: now, or in the background from a copy of `state` in host memory."""
        self.finish()
        if not self.background:
            self.save(path, state, previous)
            return
        self.pending = self.pool.submit(self.save, path, self.copy(state), previous)

    def save(self, path: str | Path, state: dict, previous: Path | None = None) -> None:
        """Write one checkpoint."""
        save_checkpoint(path, state, previous)

    def copy(self, state: dict) -> dict:
        """A copy that training does not change."""
        return copy_to_host(state)

    def finish(self) -> None:
        """Wait for the write in progress; its error is raised here."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def close(self) -> None:
        """End the thread."""
        self.pool.shutdown()


def copy_to_host(state: Any) -> Any:
    """A copy of nested dicts and lists, with all tensors in host memory; tied ones stay tied."""
    copies: dict[tuple, Tensor] = {}

    def copy_one(t: Tensor) -> Tensor:
        key = t.device, t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.stride()
        if key not in copies:
            copies[key] = t.detach().to("cpu", copy=True)
        return copies[key]

    return tree_map(lambda value: copy_one(value) if isinstance(value, Tensor) else value, state)


def sibling(path: str | Path, tag: str) -> Path:
    """The name of a related checkpoint: x_latest.pt -> x_tag.pt."""
    path = Path(path)
    return path.with_name(f"{path.stem.removesuffix('_latest')}_{tag}{path.suffix}")


def name_of(path: str | Path) -> str:
    """What users call a model: the name of a folder, or of a file without its last suffix."""
    path = Path(os.path.abspath(path))
    return path.name if path.is_dir() else path.stem


def move_aside(path: Path, mark: str = "", say: Callable[[str], object] = say) -> None:
    """Rename a checkpoint to path.1, path.2, ..., with the mark before the number: it is kept."""
    there = folder_of(path)
    if there.exists():
        number = next(n for n in range(1, 1 << 30) if not Path(f"{path}{mark}.{n}").exists())
        there.rename(f"{path}{mark}.{number}")
        say(f"{path}{'' if mark else ' of an earlier run'} is now {path}{mark}.{number}")


class Unfilled(TorchFunctionMode):
    """Inside it, tensors keep what is in memory instead of random numbers.

    New modules of PyTorch draw some, which init_weights or a file would replace at once.
    """

    METHODS = (Tensor.normal_, Tensor.uniform_)
    OF_INIT = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Call a function of PyTorch, unless it draws random numbers."""
        kwargs = kwargs or {}
        if func in self.OF_INIT:
            return kwargs["tensor"]
        return args[0] if func in self.METHODS else func(*args, **kwargs)


# ----------------------------------------------------------------------------------- folders


def weight_files(path: Path) -> list[Path]:
    """The file of weights, or the shards that `transformers` has split it into."""
    index = path.with_name(f"{path.name}.index.json")
    if path.is_file() or not index.is_file():
        return [path]
    try:
        names = {Path(name).name for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(str(index), f"cannot be read ({e})", "export the model again") from None
    return [path.with_name(name) for name in sorted(names)]


def require_writable(folder: Path, field: str) -> None:
    """Create the folder if it is missing; reject one that cannot be created or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        problem = f"{folder} cannot be created ({e.strerror})"
        denied = isinstance(e, PermissionError)
        remedy = grant_or_choose(folder.parent) if denied else "choose another"
        raise UserError(field, problem, remedy) from e
    problem = f"{folder} cannot be written to"
    require(os.access(folder, os.W_OK), field, problem, grant_or_choose(folder))


def replace_files(made: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Move files from `made` to `folder`, delete those that `made` lacks, and remove `made`."""
    for name in names:
        if (made / name).exists():
            (made / name).replace(folder / name)
        else:  # the tokenizer of another model must not stay
            (folder / name).unlink(missing_ok=True)
    made.rmdir()


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill; it replaces `folder` on success, and is removed otherwise."""
    temporary, place = None, Path(os.path.realpath(folder))  # "." has no name, a link is followed
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=f"{place.name}."))
        temporary.chmod(0o755)
        yield temporary
        old = place.rename(f"{temporary}.old") if place.is_dir() else None
        temporary.rename(place)
        if old:
            shutil.rmtree(old)
    except OSError as e:
        remedy = "free space or choose another path"
        raise UserError(str(folder), f"cannot be written ({e})", remedy) from e
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
