"""A checkpoint that is opened to be run, with the preprocessing and the images of its run."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pdvit.config.load import RESTORE, build, read_toml
from pdvit.config.recipes import Layer
from pdvit.config.schema import KEYS, OF_CHECKPOINTS, Config
from pdvit.data.images import BadImages
from pdvit.data.loader import LoaderConfig
from pdvit.data.opening import ImageSet, held_out_images, sample_photographs
from pdvit.data.preprocessing import Preprocessing
from pdvit.engine.device import DTYPES, choose_device, is_out_of_memory, set_up
from pdvit.engine.distributed import Ranks
from pdvit.errors import UserError
from pdvit.models.build import SIZES
from pdvit.models.loading import check_finite, load_model
from pdvit.models.resolved_checkpoint import ResolvedCheckpoint, resolve_checkpoint
from pdvit.models.segmentation.segmenter import Segmenter
from pdvit.models.wrapper import Wrapper
from pdvit.tasks.segmentation import sliding_windows
from pdvit.tasks.windows import SCALES, SlidingWindowConfig


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A model on its device, the configuration of its run (else the defaults), and the settings of its loader."""

    path: Path
    is_run: bool  # a run directory
    loaded: ResolvedCheckpoint
    config: Config
    loader: LoaderConfig
    options: Sequence[str] = ()  # with which it is opened again
    origins: Mapping[str, list[str]] = field(default_factory=dict)  # what decides the tokens, by where it is from

    @property
    def model(self) -> nn.Module:
        """The model, in evaluation mode."""
        return self.loaded.model

    @property
    def preprocessing(self) -> Preprocessing:
        """Size, crop and normalisation of the model's images."""
        return self.loader.preprocessing

    @cached_property
    def images(self) -> ImageSet:
        """The run's held-out images, to be read as the run did; without a run, two sample photographs."""
        return held_out_images(self.config) if self.is_run else sample_photographs()

    def windows(self, flags: Mapping[str, Any]) -> SlidingWindowConfig | None:
        """Return the windows and views of a segmentation model; None for a classifier; raises UserError."""
        if isinstance(self.loaded.model, Segmenter):
            windows = sliding_windows(self.loaded.model, self.config.segment, self.loader.per_pass)
            return replace(windows, scales=SCALES if flags["--ms"] else (1.0,), flip=flags["--flip"])
        if used := [flag for flag, value in flags.items() if value not in (None, False)]:
            tip = "leave it out: it is for segmentation"
            raise UserError("the checkpoint labels images, not pixels", ", ".join(used), tip)
        return None

    def not_finite(self, images: str) -> UserError:
        """Return the error of a model whose finite weights gave logits that are not finite for some images."""
        precision, tip = self.config.run.precision, "the checkpoint is broken, or it is of another model"
        if precision != "fp32":
            tip = f"{precision} may be too narrow for it: try --precision fp32"
        return UserError(f"the model's logits are infinite or not numbers for {images}", str(self.path), tip)


def open_checkpoint(
    path: Path, ranks: Ranks, model: str | None, weights: str | None, given: Layer, backbone: bool = False
) -> OpenedCheckpoint:
    """Load a checkpoint to run as its run did, except for `given` settings; or as timm's model, `backbone`."""
    recipe = path / "run.toml"
    is_run = os.path.isdir(path) and recipe.is_file()
    # A run is evaluated in its own precision, any other checkpoint in float32 without TF32.
    defaults = {} if is_run else {"run": {"tf32": False, "precision": "fp32"}}
    saved = read_toml(recipe, RESTORE) if is_run else {}
    config = build(("the command's defaults", defaults), (str(recipe), saved), ("the command line", given))
    own_settings = build(("the command line", given))
    checkpoint = resolve_checkpoint(path, model, weights, own_settings.model, own_settings.data.img_size)
    loaded = load_model(checkpoint, backbone)
    own_data, own_segment = given.get("data", {}), dict(given.get("segment", {}))
    if loaded.segment is not None:
        if "source" not in own_data and config.segment.classes is not None:  # the run's table is for the run's data
            own_segment["classes"] = config.segment.classes
        config = replace(config, segment=replace(loaded.segment, **own_segment))
    check_finite(loaded.model.state_dict(), str(path))
    device = choose_device(config.run.device, ranks.local_rank)
    if not backbone:  # `analyze` measures in exact float32
        config = replace(config, run=set_up(device, config.run))
    to_device(loaded.model, device, str(path))
    bare = loaded.model.inside if isinstance(loaded.model, Wrapper) else loaded.model
    if backbone and (precision := given.get("run", {}).get("precision")):
        loaded.model.to(DTYPES[precision])
    preprocessing = Preprocessing.for_model(bare, own_settings.data)
    data, bad = config.data, BadImages(skip=config.data.on_bad_image == "skip")
    images = None if "batch_size" in own_data else data.micro_batch
    seed, size = config.run.seed, ranks.world_size
    loader = LoaderConfig(data.batch_size, seed, data.workers, device, preprocessing, images, ranks.rank, size, bad)
    options: list[str] = []
    of_model = {key.flags[0]: given.get(key.section, {}).get(key.name) for key in map(KEYS.__getitem__, OF_CHECKPOINTS)}
    for option, value in {"--model": model, "--weights": weights, **of_model}.items():
        pairs = [f"{key}={json.dumps(item)}" for key, item in value.items()] if isinstance(value, dict) else [value]
        for item in [] if value is None else pairs:
            options += [option, *map(str, item if isinstance(item, tuple | list) else [item])]
    origins = _origins(checkpoint, bare, preprocessing, own_settings, model)
    return OpenedCheckpoint(path, is_run, loaded, config, loader, options, origins)


def _origins(
    checkpoint: ResolvedCheckpoint, model: nn.Module, images: Preprocessing, given: Config, name: str | None
) -> dict[str, list[str]]:
    """Return what decides the tokens, as text, by where it is from: the options, the file, or timm's default."""
    found = {"--model" if name else "the file": [checkpoint.architecture]}
    types = Counter(str(value.dtype).removeprefix("torch.") for value in checkpoint.selected.tensors.values())
    sizes = {key: getattr(given.model, key) for key in SIZES.values()} | (given.model.args or {})
    texts = {"img_size": f"{images.size} px", "interpolation": images.interpolation}
    texts |= {key: f"{key} {' '.join(f'{value:g}' for value in getattr(images, key))}" for key in ("mean", "std")}
    texts |= {"crop_pct": f"crop {images.crop_pct:g}", "weights": f"weights in {types.most_common(1)[0][0]}"}
    texts |= {key: f"{key} {value}" for key, value in sizes.items() if value is not None}
    for path, part in model.named_modules():
        if path.endswith(".act"):
            texts["act_layer"] = type(part).__name__
        if isinstance(getattr(part, "eps", None), float):
            texts["norm_layer"] = f"norm epsilon {part.eps:g}"
    options, in_file = vars(given.data) | sizes, {"weights": True} | checkpoint.preprocessing | checkpoint.arguments
    in_file["img_size"] = in_file.get("img_size") or checkpoint.image_size
    for key, text in texts.items():
        default = "the file" if in_file.get(key) is not None else f"timm's default for {checkpoint.architecture}"
        found.setdefault("the options" if options.get(key) is not None else default, []).append(text)
    return found


def to_device(model: nn.Module, device: torch.device, where: str) -> nn.Module:
    """Move a model to the device; UserError if it does not fit."""
    try:
        return model.to(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        tip = "choose another --device, or end what else runs on it"
        raise UserError(f"the model does not fit in the memory of {device}", where, tip) from error


def label_names(loaded: ResolvedCheckpoint) -> list[str] | None:
    """Return the names of a checkpoint's classes, or None; UserError without a classifier, or for another number."""
    model: Any = loaded.model
    if model.num_classes < 1:
        raise UserError("the model has no classifier", loaded.name, "choose a checkpoint with a classifier")
    names = loaded.classes
    if names is not None and len(names) != model.num_classes:
        what = f"it has {len(names)} label_names for {model.num_classes} classes"
        raise UserError(what, loaded.name, "mend its config.json")
    return names


def match_classes(loaded: ResolvedCheckpoint, classes: list[str], source: str) -> tuple[list[int] | None, str]:
    """Match the classes of a source with the outputs of a checkpoint, by name if it has names.

    Returns the output of each class, None for the same order; and how they were matched, as text. Raises UserError if
    the classes differ in number or by name.
    """
    names = label_names(loaded) if loaded.segment is None else loaded.classes
    model: Any = loaded.model
    count, where = model.num_classes if names is None else len(names), f"{loaded.name} on {source}"
    if names is None and count == len(classes):
        return None, "by position: the checkpoint does not name its classes"
    if names == classes:
        return None, "by name"
    if names is None or sorted(names) != sorted(classes):
        what = f"the checkpoint has {count} classes, {source} has {len(classes)}"
        if other := [name for name in classes if name not in (names or classes)]:
            what += f"; the checkpoint does not name '{other[0]}'"
        tip = "evaluate it on its own classes, by their names, or train it on these: pdvit finetune, for pixels "
        raise UserError(what, where, f"{tip}pdvit segment")
    if twice := [name for name in names if names.count(name) > 1]:
        what = f"the classes stand in another order, and '{twice[0]}' is the name of two of them"
        raise UserError(what, where, "put the source's classes into the checkpoint's order")
    return [names.index(name) for name in classes], "by name, in another order"
