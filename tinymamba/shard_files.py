"""The storage under torch.distributed.checkpoint: safetensors files, and no pickle.

It is a module of its own because it is slow to import: only what writes or reads shards does.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from tinymamba.cli import require
from tinymamba.sharded_checkpoint import Manifest, hash_file

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_shard(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file tensor by tensor, so that host memory holds one; size and hash.

    The format: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, dict] = {}
    end = 0
    for name, t in tensors.items():
        begin, end = end, end + t.numel() * t.element_size()
        place = {"data_offsets": [begin, end]}
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), **place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little")
        yield text
        for t in tensors.values():
            flat = t.detach().cpu().contiguous().flatten()
            yield flat.view(torch.uint8).numpy().data

    sha256 = hashlib.sha256()
    with open(path, "xb") as file:
        for part in parts():
            file.write(part)
            sha256.update(part)
        file.flush()
        os.fsync(file.fileno())
    facts = {"bytes": path.stat().st_size, "sha256": sha256.hexdigest()}
    same = hash_file(path) == facts["sha256"]
    require(same, str(path), "is damaged: the disk gives back other bytes", "use another disk")
    return facts


def done(value: Any) -> Future:
    """A future that has its value."""
    future: Future = Future()
    future.set_result(value)
    return future


class ShardFileWriter(StorageWriter):
    """One file per process in `folder`.

    The first process calls `begin` before any writes, and when all have written `finish`, with the
    tensors' places and the files' sizes and hashes.
    """

    def __init__(self, folder: Path, begin: Callable, finish: Callable[[dict, dict], None]):
        self.folder, self.begin, self.end = folder, begin, finish

    def reset(self, checkpoint_id: Any = None) -> None:
        """A writer writes one folder."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Other storages are never looked for."""
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan of this process, as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """In the first process: make the folder, and name the files."""
        self.begin()
        name = "shard_{:05}.safetensors".format
        return [replace(plan, storage_data=name(rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's file."""
        if not plan.items:
            return done([])
        name: Any = plan.storage_data
        # On a network file system this also shows a folder that another machine has just made.
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Any] = {i.index.fqn: planner.resolve_data(i) for i in plan.items}
        facts = write_shard(self.folder / name, tensors)
        return done([WriteResult(i.index, 0, (name, facts)) for i in plan.items])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """In the first process: describe all tensors and files."""
        written = [result for of_process in results for result in of_process]
        files = {result.storage_data[0]: result.storage_data[1] for result in written}
        homes = {result.index: result.storage_data[0] for result in written}
        tensors = {}
        for name, t in metadata.state_dict_metadata.items():
            assert isinstance(t, TensorStorageMetadata)
            places = [(MetadataIndex(name, chunk.offsets), chunk) for chunk in t.chunks]
            tensors[name] = {
                "dtype": str(t.properties.dtype).removeprefix("torch."),
                "shape": list(t.size),
                "chunks": [[homes[i], list(c.offsets), list(c.sizes)] for i, c in places],
            }
        self.end(tensors, dict(sorted(files.items())))


class ShardFileReader(StorageReader):
    """Reads what the load planner asks for from the files of a manifest."""

    def __init__(self, manifest: Manifest):
        self.manifest, self.homes = manifest, {}  # type: Manifest, dict[MetadataIndex, str]

    def reset(self, checkpoint_id: Any = None) -> None:
        """A reader reads one folder."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Other storages are never looked for."""
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """All tensors and their chunks."""
        tensors: dict[str, Any] = {}
        for name, t in self.manifest.tensors.items():
            chunks = []
            for file, offsets, sizes in t.chunks:
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                self.homes[MetadataIndex(name, torch.Size(offsets))] = file
            tensors[name] = TensorStorageMetadata(TensorProperties(t.dtype), t.shape, chunks)
        return Metadata(tensors)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan of this process, as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans, as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every piece that is asked for to its place."""
        from safetensors import safe_open

        by_file: dict[str, list] = {}
        for item in plan.items:
            by_file.setdefault(self.homes[item.storage_index], []).append(item)
        for name, items in by_file.items():
            with safe_open(self.manifest.folder / name, framework="pt") as file:
                for item in items:
                    ranges = zip(item.storage_offsets, item.lengths, strict=True)
                    piece = tuple(slice(begin, begin + length) for begin, length in ranges)
                    key, target = item.storage_index.fqn, planner.resolve_tensor(item).detach()
                    stored = file.get_slice(key)[piece] if piece else file.get_tensor(key)
                    target.copy_(stored)
                    planner.commit_tensor(item, target)
        return done(None)
