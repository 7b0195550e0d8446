"""Weights in several files: shards with an index, and folders of torch.distributed.checkpoint."""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from pdvit.files import read_json
from pdvit.models.layouts.conversion import Tensors

INDEX, DISTRIBUTED = ".index.json", ".metadata"
RECORDS = ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")
RECORDS += ("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")
OPTIMIZER = re.compile(r"(?:^|\.)optim\w*\.")


def files_of(file: Path) -> list[Path]:
    """Return the files that hold the tensors of a checkpoint; ValueError if an index names files elsewhere."""
    if file.name == DISTRIBUTED:
        return sorted(file.parent.glob("*.distcp"))
    if not file.name.endswith(INDEX):
        return [file]
    names = sorted(set(read_json(file)["weight_map"].values()))
    return [_inside(file.parent, name) for name in names]


def _inside(folder: Path, name: str) -> Path:
    if Path(name).name != name:
        raise ValueError(f"it names a file outside its folder: {name}")
    return folder / name


class _Records(pickle.Unpickler):
    """Reads pickles that consist of torch's records of a distributed checkpoint, and executes nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch.distributed.checkpoint.metadata" and name in RECORDS:
            return getattr(metadata, name)
        if (module, name) == ("torch.distributed.checkpoint.filesystem", "_StorageInfo"):
            return filesystem._StorageInfo
        if (module, name) == ("torch", "Size") or (
            module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)
        ):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return lambda _: torch.strided
        if module.startswith("pathlib") and name.endswith("Path"):
            return lambda *parts: "/".join(parts)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, which could run code")


def read_distributed(file: Path) -> Tensors:
    """Return the tensors of a folder by its `.metadata`, whole, without those of optimizers; any error of torch."""
    with file.open("rb") as opened:
        table = _Records(opened).load()
    total = sum(part.stat().st_size for part in files_of(file))
    tensors: Tensors = {}
    for name, entry in table.state_dict_metadata.items():
        if OPTIMIZER.search(name) or not isinstance(entry, metadata.TensorStorageMetadata):
            continue
        total -= entry.size.numel() * entry.properties.dtype.itemsize
        if total < 0:
            raise ValueError("its tensors claim more numbers than its files hold")
        tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            place = table.storage_data[metadata.MetadataIndex(name, chunk.offsets)]
            with _inside(file.parent, place.relative_path).open("rb") as opened:
                opened.seek(place.offset)
                part = torch.load(io.BytesIO(opened.read(place.length)), map_location="cpu", weights_only=True)
            at = tuple(slice(begin, begin + size) for begin, size in zip(chunk.offsets, chunk.sizes, strict=True))
            tensors[name][at].copy_(part)
    return tensors
