"""Reading a checkpoint: any file of weights becomes named tensors and what it says of itself; nothing is executed."""

import argparse
import json
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pdvit.errors import UserError, closest
from pdvit.models.hub import downloaded, published
from pdvit.models.memory import check_bytes

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# The key of the header under which the text of config.json stands.
HEADER_KEY = "config.json"
# Where timm looks for weights in a folder, in its order: these names first, then the first file of these kinds.
PREFERRED = (WEIGHTS, "pytorch_model.bin", "pytorch_model.pth", "model.pth")
KINDS = (".safetensors", ".pth", ".pth.tar", ".bin")
# Files that torch wrote.
PICKLED = (".pth", ".pt", ".tar", ".bin", ".ckpt")
HUB = ("hf-hub", "hf_hub")
# How deep and how many values a file may nest: it can hold itself.
DEPTH, VALUES = 5, 200_000
JAX = "timm's reader of JAX arrays needs the model: load it with timm.create_model, then timm.models.save_for_hf"
# What torch.load raises on files that are not whole, or not its own.
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, and what it says of itself.

    Attributes:
        name: what it is called: its folder, its file, or the model's published name.
        where: how an error names it.
        tensors: every tensor; those of tables inside one another by names with dots between.
        config: in the form of timm's config.json, as far as it says anything.
    """

    name: str
    where: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]


def read_checkpoint(given: str | Path) -> Checkpoint:
    """Read a run directory, a timm folder, a file, or published weights.

    Args:
        given: a path; `local-dir:FOLDER`, `hf-hub:OWNER/NAME`, or timm's name of a model with published weights.

    Raises:
        UserError: nothing is there, the file is truncated, foreign or of another format, or could run code.
    """
    scheme, _, rest = str(given).partition(":")
    path = Path(os.path.expanduser(given))
    if os.path.exists(path):  # of os.path, because Path's own raises where a name is too long
        return _read_path(path)
    if scheme.lower() == "local-dir":
        return _read_path(Path(os.path.expanduser(rest)))
    if scheme.lower() in HUB:
        return _read_path(downloaded(rest, (CONFIG, *PREFERRED)), rest.partition("@")[0].rpartition("/")[2])
    if timm.is_model(str(given)):
        tensors, config = published(str(given))
        return Checkpoint(str(given), str(given), tensors, config)
    tip = "name a run directory, a file, or a model of timm"
    if os.sep not in str(given) and "." not in str(given):
        tip = closest(str(given), timm.list_models(), shown=3)
    raise UserError("there is no such checkpoint", str(given), tip)


def name_of(path: Path) -> str:
    """Return what a checkpoint is called: its folder's name, or the file's where that says more than `model`.

    What is not there is called by the last part of the name that is given: of published weights, say.
    """
    if not os.path.exists(path):
        path = Path(str(path).partition("@")[0].rpartition(":")[2])
        if not os.path.exists(path):
            return path.name if path.suffix not in (".safetensors", *PICKLED) else path.stem
    folder = path if path.is_dir() else path.parent
    return folder.resolve().name if path.is_dir() or path.stem == "model" else path.stem


def parse_config(text: str, where: Path) -> dict[str, Any]:
    """Read the text of a config.json; UserError where it is not a table."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"its configuration is not JSON: {error}", str(where), "copy the file again") from error
    if not isinstance(config, dict):
        raise UserError("its configuration is not a table", str(where), "copy the file again")
    return config


def _read_path(path: Path, name: str | None = None) -> Checkpoint:
    file = _weights_in(path) if path.is_dir() else path
    if not file.is_file():
        raise UserError("there is no such checkpoint", str(file), "name a run directory or a file of weights")
    if file.suffix in (".safetensors", *PICKLED):
        check_bytes(file.stat().st_size, str(file))  # a file holds hardly anything but weights
    if file.suffix == ".safetensors":
        tensors, config = _read_safetensors(file)
    elif file.suffix in PICKLED:
        tensors, config = _read_pickled(file)
    else:
        what = f"'{file.suffix or file.name}' is not a format that pdvit reads"
        tip = JAX if file.suffix in (".npz", ".npy") else f"convert it to .safetensors, or one of {', '.join(PICKLED)}"
        raise UserError(what, str(file), tip)
    beside = file.parent / CONFIG
    if not config.get("architecture") and beside.is_file():
        config = parse_config(beside.read_bytes().decode("utf-8", errors="replace"), beside)
    return Checkpoint(name or name_of(path), str(file), tensors, config)


def _weights_in(folder: Path) -> Path:
    for name in PREFERRED:
        if (folder / name).is_file():
            return folder / name
    if (folder / "run.toml").exists():
        raise UserError(f"no {WEIGHTS} in the folder", str(folder), "wait for the run to finish, or resume it")
    for kind in KINDS:
        files = sorted(folder.glob(f"*{kind}"))
        if len(files) > 1:
            listed = ", ".join(file.name for file in files[:4])
            raise UserError(f"the folder holds several checkpoints: {listed}", str(folder), "name one of the files")
        if files:
            return files[0]
    raise UserError(f"no {WEIGHTS} in the folder", str(folder), "name a run, or a folder of timm's")


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"the file is not a whole safetensors file: {error}", str(file), "copy or download it again"
        ) from error
    return tensors, parse_config(header.get(HEADER_KEY, "{}"), file)


def _read_pickled(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of torch.save that holds tensors, plain values and argparse's namespaces, and nothing else."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols, storages: what matters is whether it comes out
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error) or "invalid load key" in str(error):
            raise UserError("the file is not one of torch's", str(file), "copy or download it again") from error
        raise UserError(
            f"it holds more than tensors and plain values{_foreign(file)}, which could run code: it was not opened",
            str(file),
            "where you trust it, save its weights alone: save_file(model.state_dict(), 'x.safetensors')",
        ) from error
    except DAMAGE as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"the file is not a whole torch file: {reason}", str(file), "copy it again") from error
    if not isinstance(content, Mapping):
        raise UserError(f"it holds a {type(content).__name__}, not a table of weights", str(file), "save a state_dict")
    return _flatten(content, file), _said(content)


def _foreign(file: Path) -> str:
    """Name what a pickle would call, where torch can tell without opening it."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # it is no file of torch's at all
        return ""
    return f" ({', '.join(sorted(set(names) - {'argparse.Namespace'})[:3])})"


def _flatten(content: Mapping[Any, Any], file: Path) -> dict[str, Tensor]:
    left = VALUES

    def walk(value: Any, name: str, depth: int) -> Iterator[tuple[str, Tensor]]:
        nonlocal left
        left -= 1
        if left < 0:
            raise UserError("it holds more values than weights have", str(file), "save the state_dict alone")
        if isinstance(value, Tensor) and _is_plain(value):
            yield name, value.detach()
        elif isinstance(value, Mapping) and depth < DEPTH:
            for key, item in value.items():
                if isinstance(key, str):
                    yield from walk(item, f"{name}.{key}" if name else key, depth + 1)

    return dict(walk(content, "", 0))


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is dense and has all its numbers: a shape alone can claim any size."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _said(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Return what the arguments in a training checkpoint say of its model (timm's, DeiT's, DINO's, MAE's names)."""
    given: Any = content.get("args")
    given = vars(given) if isinstance(given, argparse.Namespace) else given
    told = given.items() if _table(given) else ()
    # timm's script has an empty text for some of what nobody chose
    args: dict[str, Any] = {key: value for key, value in told if value is not None and value != ""}
    config: dict[str, Any] = {}
    for name in (args.get("model"), args.get("arch"), content.get("arch")):
        if isinstance(name, str) and "architecture" not in config:
            config["architecture" if timm.is_model(name) else "called"] = name
    size = args.get("img_size", args.get("input_size"))
    size = size[-1] if isinstance(size, list | tuple) and size else size
    extra = args.get("model_kwargs")
    arguments = {"img_size": size, "global_pool": args.get("gp"), "drop_path_rate": args.get("drop_path")}
    arguments = {key: value for key, value in arguments.items() if isinstance(value, int | float | str)}
    config["model_args"] = arguments | (dict(extra) if isinstance(extra, Mapping) and _table(extra) else {})
    data = {key: args[key] for key in ("mean", "std", "crop_pct", "interpolation", "crop_mode") if key in args}
    config["pretrained_cfg"] = {key: list(v) if isinstance(v, tuple) else v for key, v in data.items()}
    return config


def _table(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
