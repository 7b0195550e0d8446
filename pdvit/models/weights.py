"""Weights on disk: a timm folder whose `model.safetensors` describes itself; reading one executes nothing."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.models._hub import save_config_for_hf
from torch import nn

from pdvit.errors import UserError
from pdvit.models.build import build_model, sketch_model
from pdvit.models.layers import with_image_size

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# The key of the header under which the text of config.json stands.
HEADER_KEY = "config.json"


@dataclass(frozen=True)
class Loaded:
    """A model read from disk, and what is known about it."""

    model: nn.Module
    name: str
    config: dict[str, Any]

    @property
    def weights(self) -> str:
        """Which weights these are: `raw`, `ema`, or `unknown` where the file does not say."""
        facts = self.config.get("pdvit")
        return str(facts.get("weights", "unknown")) if isinstance(facts, dict) else "unknown"


def export(
    model: nn.Module,
    classes: list[str],
    data_config: dict[str, Any],
    weights: str,
    state: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, bytes]:
    """Return the files of a timm folder (name -> content) for a bare timm model built by `timm.create_model`.

    `state` holds the weights where they are not the model's own (a moving average), and `weights` says which they are.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, and the header of the weights carries the text of
    config.json, so that the file alone is enough. Neither holds a name, path or time.
    """
    text = _config_text(model, classes, data_config, weights)
    tensors = {name: value.detach().cpu().contiguous() for name, value in (state or model.state_dict()).items()}
    return {
        CONFIG: text.encode(),
        WEIGHTS: _in_order(save(tensors, metadata={"format": "pt", HEADER_KEY: text})),
    }


def _in_order(file: bytes) -> bytes:
    """Return a safetensors file with sorted metadata: the library writes them in an order that changes by chance."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items()))} | header
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format keeps the tensors aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


def _config_text(model: nn.Module, classes: list[str], data_config: dict[str, Any], weights: str) -> str:
    extra = {"label_names": classes, "pdvit": {"weights": weights}}
    with TemporaryDirectory() as folder:
        # timm's public save_for_hf writes the model's weights too: twice, and not where they are spread over processes.
        save_config_for_hf(model, str(Path(folder) / CONFIG), model_config=extra, data_config=data_config)
        config = json.loads((Path(folder) / CONFIG).read_text())
    for foreign in ("tag", "license"):  # of the published weights of this architecture, which these are not
        config["pretrained_cfg"].pop(foreign, None)
    return json.dumps(config, indent=2) + "\n"


def load(path: Path, model_name: str | None = None) -> Loaded:
    """Read a run directory, a timm folder or a single `.safetensors` file.

    Args:
        path: the folder or file.
        model_name: timm's name for the architecture, for a file that does not carry its configuration.

    Raises:
        UserError: nothing is there, the file is truncated, foreign or of another format, or weights and model differ.
    """
    if path.is_dir():
        file = path / WEIGHTS
        if not file.is_file():
            tip = "wait for the run to finish, or resume it" if (path / "run.toml").exists() else "name a run"
            raise UserError(f"no {WEIGHTS} in the folder", str(path), tip)
    else:
        file = path
        if not file.is_file():
            raise UserError("there is no such checkpoint", str(path), "name a run directory or a .safetensors file")
    if file.suffix != ".safetensors":
        raise UserError(
            f"'{file.suffix or file.name}' is not a format that pdvit reads",
            str(file),
            "convert it to .safetensors; pickled checkpoints can run code when they are opened",
        )
    tensors, config = _read(file)
    config = config or _config_beside(file)
    architecture, arguments = _architecture(file, config, model_name)
    _compare(architecture, arguments, tensors, file)
    model = build_model(architecture, arguments, str(file))
    model.load_state_dict(tensors)
    _describe_input(model, config, file)
    return Loaded(model.eval(), name_of(path), config)


def name_of(path: Path) -> str:
    """Return what a checkpoint is called: its folder's name, or the file's where that says more than `model`."""
    folder = path if path.is_dir() else path.parent
    return folder.resolve().name if path.is_dir() or path.stem == "model" else path.stem


def _read(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"the file is not a whole safetensors file: {error}", str(file), "copy or download it again"
        ) from error
    return tensors, _parse(header.get(HEADER_KEY, "{}"), file)


def _config_beside(file: Path) -> dict[str, Any]:
    beside = file.parent / CONFIG
    if not beside.is_file():
        return {}
    return _parse(beside.read_bytes().decode("utf-8", errors="replace"), beside)


def _parse(text: str, where: Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"its configuration is not JSON: {error}", str(where), "copy the file again") from error
    if not isinstance(config, dict):
        raise UserError("its configuration is not a table", str(where), "copy the file again")
    return config


def _architecture(file: Path, config: dict[str, Any], name: str | None) -> tuple[str, dict[str, Any]]:
    architecture = name or config.get("architecture")
    if not isinstance(architecture, str):
        raise UserError(
            "the file does not say which architecture its weights belong to",
            str(file),
            "put its config.json beside it, or name the timm model: --model NAME",
        )
    arguments = config.get("model_args", {}) if name is None else {}
    if not isinstance(arguments, dict):
        raise UserError("its model_args are not a table", str(file), "copy the file again")
    if name is None:  # published folders often say these two at the top only
        top: dict[str, Any] = {key: config[key] for key in ("num_classes", "global_pool") if key in config}
        arguments = top | arguments
    if isinstance(arguments.get("img_size"), list):
        arguments = arguments | {"img_size": tuple(arguments["img_size"])}
    return architecture, arguments


def _describe_input(model: Any, config: dict[str, Any], file: Path) -> None:
    """Let the model expect the input that the file's configuration describes; UserError where that makes no sense."""
    told = config.get("pretrained_cfg", config)
    if not isinstance(told, dict):
        raise UserError("its pretrained_cfg is not a table", str(file), "copy the file again")
    told = {key: told[key] for key in ("mean", "std", "crop_pct", "interpolation", "crop_mode") if key in told}
    for key in ("mean", "std"):
        value = told.get(key, [0.5] * 3)
        sound = isinstance(value, list) and len(value) == 3 and all(isinstance(x, int | float) for x in value)
        if not sound or (key == "std" and min(value) <= 0):
            raise UserError(f"its {key} is not three numbers", str(file), "copy the file again")
    crop = told.get("crop_pct", 1.0)
    if not (isinstance(crop, int | float) and 0.05 < crop <= 2):
        raise UserError(f"its crop_pct is {crop!r}", str(file), "copy the file again")
    model.pretrained_cfg = model.pretrained_cfg | told
    size = config.get("pretrained_cfg", config).get("input_size")
    if isinstance(size, list) and len(size) == 3 and all(isinstance(side, int) and side > 0 for side in size):
        with_image_size(model, size[1], size[2])  # models that take any size know theirs from nowhere else


def _compare(name: str, arguments: dict[str, Any], tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Raise UserError unless the weights are those of the model: checked by shape, before it takes any memory."""
    sketch_model(name, {}, str(file))  # a family that is refused never sees the arguments
    if isinstance(arguments.get("depth"), int) and arguments["depth"] > len(tensors):
        raise UserError("its configuration has more blocks than the file has tensors", str(file), "copy the file again")
    expected = sketch_model(name, arguments, str(file)).state_dict()
    missing = sorted(set(expected) - set(tensors))
    extra = sorted(set(tensors) - set(expected))
    shapes = sorted(n for n in set(expected) & set(tensors) if expected[n].shape != tensors[n].shape)
    for names, what in ((missing, "lack"), (extra, "hold an unknown"), (shapes, "have another shape of")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"the weights {what} '{names[0]}'{more}",
                str(file),
                "the file belongs to another architecture; name the right one with --model",
            )
