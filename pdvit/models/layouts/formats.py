"""Weights in several files, and files that hold no state dict, which are named for what they are."""

import io
import pickle
import re
import zipfile
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from pdvit.errors import UserError
from pdvit.files import read_json
from pdvit.models.layouts.conversion import Tensors

INDEX, DISTRIBUTED = ".index.json", ".metadata"
OPTIMIZER = re.compile(r"(?:^|\.)optim\w*\.")
# Regular expression for the first bytes, or for a name in a zip -> what the file is, and what to do.
STARTS = {
    rb"version https://git-lfs": ("a pointer of git-lfs, not the file it stands for", "run: git lfs pull"),
    rb"\s*<(?:!doctype|html|\?xml)": ("a web page, not weights", "open the address in a browser, and save the file"),
    rb"GGUF": ("a GGUF file, whose weights are for llama.cpp", "use the weights that it was made from"),
    rb"\x08[\x01-\x1f][\x12\x1a\x22\x2a\x32\x3a\x42]": ("an ONNX model", "use the weights that it was exported from"),
}
SAVE = "save its weights alone: torch.save({}, 'weights.pt')"
NAMES = {
    r"/constants\.pkl$": ("a model of TorchScript", SAVE.format("torch.jit.load('FILE').state_dict()")),
    r"(?:^|/)archive_format$": ("a program of torch.export", SAVE.format("torch.export.load('FILE').state_dict")),
    r"(?:^|/)data\.pkl$|\.npy$": ("", ""),  # of torch.save, of NumPy
    r"": ("a zipped folder", "unpack it, and name the folder"),
}


def refuse_container(file: Path) -> None:
    """Raise UserError if a file is of a known format that holds no state dict."""
    with file.open("rb") as opened:
        start = opened.read(64)
    found = [texts for pattern, texts in STARTS.items() if re.match(pattern, start, re.IGNORECASE)]
    if zipfile.is_zipfile(file) and start.startswith(b"PK"):
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        found = [texts for pattern, texts in NAMES.items() if any(re.search(pattern, name) for name in names)]
    if found and found[0][0]:
        what, tip = found[0]
        raise UserError(f"it is {what}", str(file), tip.replace("FILE", file.name))


def files_of(file: Path) -> list[Path]:
    """Return the files that hold the tensors of a checkpoint; ValueError if one is missing or in another folder."""
    if file.name == DISTRIBUTED:
        return sorted(file.parent.glob("*.distcp"))
    names = set(read_json(file)["weight_map"].values()) if file.name.endswith(INDEX) else {file.name}
    return [_beside(file, name) for name in sorted(names)]


def _beside(file: Path, name: str) -> Path:
    if Path(name).name != name or not (file.parent / name).is_file():
        raise ValueError(f"it names a file that is not in its folder: {name}")
    return file.parent / name


@cache
def _records() -> dict[tuple[str, str], Any]:
    """Return what the metadata of a distributed checkpoint consists of, by module and name."""
    from torch.distributed.checkpoint import filesystem, metadata  # here, as it takes a twentieth of a start

    return {(metadata.__name__, name): value for name, value in vars(metadata).items() if is_dataclass(value)} | {
        (metadata.__name__, "_MEM_FORMAT_ENCODING"): metadata._MEM_FORMAT_ENCODING,
        (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
        ("torch", "Size"): torch.Size,
        ("torch.serialization", "_get_layout"): lambda _: torch.strided,
    }


class _Records(pickle.Unpickler):
    """Reads pickles that consist of torch's records of a distributed checkpoint, and executes nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _records():
            return _records()[module, name]
        if module.startswith("pathlib") and name.endswith("Path"):  # the place where it was saved
            return PurePosixPath
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, which could run code")


def read_distributed(file: Path) -> Tensors:
    """Return the whole tensors of a folder by its `.metadata`, without those of optimizers; any error of torch."""
    from torch.distributed.checkpoint import metadata

    with file.open("rb") as opened:
        table = _Records(opened).load()
    left, tensors = sum(part.stat().st_size for part in files_of(file)), Tensors()
    for name, entry in table.state_dict_metadata.items():
        if OPTIMIZER.search(name) or not isinstance(entry, metadata.TensorStorageMetadata):
            continue
        left -= entry.size.numel() * entry.properties.dtype.itemsize
        if left < 0:
            raise ValueError("its tensors claim more numbers than its files hold")
        tensors[name] = torch.zeros(entry.size, dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            place = table.storage_data[metadata.MetadataIndex(name, chunk.offsets)]
            with _beside(file, place.relative_path).open("rb") as opened:
                opened.seek(place.offset)
                part = torch.load(io.BytesIO(opened.read(place.length)), map_location="cpu", weights_only=True)
            at = tuple(slice(begin, begin + size) for begin, size in zip(chunk.offsets, chunk.sizes, strict=True))
            tensors[name][at].copy_(part)
    return tensors
