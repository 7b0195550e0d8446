"""Beginning with a checkpoint: its model and images go into the configuration, its weights into the model."""

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import torch
from torch import nn

from pdvit.config import Config, build, to_dict
from pdvit.config.schema import DataConfig, ModelConfig
from pdvit.errors import UserError
from pdvit.models.build import sketch_model
from pdvit.models.description import Described
from pdvit.models.families import family_of
from pdvit.models.matching import Match, match
from pdvit.models.segmentation.backbone import arguments_of
from pdvit.models.segmentation.files import begin_head
from pdvit.models.segmentation.segmenter import Segmenter
from pdvit.models.wrapper import Wrapper

INIT = "model.init (--init)"
# Keys of the configuration for timm's arguments; those of plain models first.
PLAIN = {"depth": "depth", "embed_dim": "width", "num_heads": "heads", "patch_size": "patch_size"}
# Which share of the backbone's weights has to come from the file, and may be left over in it.
ENOUGH, TOO_MANY = 0.9, 0.1
# What stands between tokens and classes besides the classifier.
HEADS = ("head", "fc_norm", "attn_pool", "pre_logits")
# A norm between them.
POOLED = ("fc_norm.", "head.norm.")
NAMED = 5


def settle(config: Config, described: Described) -> Config:
    """Fill in what the checkpoint says and the user left open, and which weights these are.

    The model and its drop path, the size of its images and how they are prepared, so that the run does not need the
    file again. A configuration that knows its weights already, from run.toml, is complete; it must be these.

    What a file says is no more than a claim: it passes the checks of a configuration, and the shapes of the model that
    it describes are compared with its tensors before anything is built.

    Raises:
        UserError: the weights are not those that the configuration knows, are of images that are not square, or differ
            too much from the model; or what the checkpoint says is out of range.
    """
    digest, known = fingerprint(described), config.model.init_hash
    if known not in (None, digest):
        what = f"the weights are not those of this configuration: their hash is {digest}, not {known}"
        raise UserError(what, described.where, "restore the file, or name it anew with --init and without --config")
    path = os.path.expanduser(str(config.model.init).removeprefix("local-dir:"))
    init = os.path.abspath(path) if os.path.exists(path) else config.model.init
    config = replace(config, model=replace(config.model, init=init, init_hash=digest))
    if known is not None:
        return config
    model = replace(config.model, weights=described.weights if described.weights != "unknown" else None)
    config = replace(config, model=_model(model, described), data=_data(config, described))
    build((described.where, to_dict(config)))
    assert config.model.name is not None
    _matched(described, sketch_model(config.model.name, arguments_of(config), described.where))
    return config


def fingerprint(described: Described) -> str:
    """Return a hash of the weights: of names, types, shapes and numbers."""
    digest = sha256()
    head = {} if described.segment is None else described.chosen.outside
    for name, value in sorted([*described.chosen.tensors.items(), *head.items()]):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def begin(network: nn.Module, described: Described, classes: Sequence[str]) -> list[str]:
    """`begin_from` for the timm model inside, and for a segmentation model's head where the file has the like of it."""
    assert isinstance(network, Wrapper)
    if not isinstance(network, Segmenter):
        return begin_from(network.inside, described, classes)
    notes = begin_from(network.backbone, described, classes, network.adapter.pruned)
    return [*notes, begin_head(network, described, classes)]


def begin_from(
    model: nn.Module, described: Described, classes: Sequence[str], pruned: Collection[str] = ()
) -> list[str]:
    """Put a checkpoint's weights into a timm model; return what to say of it.

    `pruned` are names that were left out of the model, which the file may have.

    The classifier stays fresh where classes differ in number or names. Positions and tables of relative positions are
    resampled to the model's grid, patch embeddings to its patches.

    Raises:
        UserError: too little of the model's backbone is in the file, or too much else; or fresh weights are frozen.
    """
    found = _matched(described, model, pruned)
    if described.classes is not None and described.classes != list(classes):
        found = found.without([name for name in found.tensors if name.startswith(_own(model))])
    fresh = sorted([*found.missing, *found.misshapen])
    # A fresh norm behind the pooling only normalizes; the classifier, which learns, scales what comes out of it.
    still = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    if frozen := [name for name in fresh if name in still and not name.startswith(POOLED)]:
        what = f"{frozen[0]} is not in the file, and would stay fresh for good"
        raise UserError(what, "model.freeze (--freeze)", "freeze less")
    broken = [name for name, value in found.tensors.items() if not bool(value.isfinite().all())]
    if broken:
        what = f"{_listed(broken)} of its weights are infinite or not numbers"
        raise UserError(what, described.where, "take an earlier checkpoint, or copy it again")
    model.load_state_dict(found.tensors, strict=False)
    return _notes(found, fresh, described, len(model.state_dict()))


def _model(model: ModelConfig, described: Described) -> ModelConfig:
    """Take the checkpoint's architecture where the user names none."""
    arguments = {key: value for key, value in described.arguments.items() if value is not None}
    arguments = {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}
    for name in ("num_classes", "img_size"):  # the data decide on one, and data.img_size is the other
        arguments.pop(name, None)
    if arguments.get("in_chans") == 3:  # the only number there is
        arguments.pop("in_chans")
    drop_path = arguments.pop("drop_path_rate", None)
    if isinstance(drop_path, int | float) and model.drop_path is None:
        model = replace(model, drop_path=float(drop_path))
    if model.name not in (None, described.architecture):
        return model
    plain = family_of(described.sketch).plain
    sizes = {key: arguments.pop(name) for name, key in PLAIN.items() if plain and isinstance(arguments.get(name), int)}
    sizes |= {key: value for key in sizes if (value := getattr(model, key)) is not None}
    more = arguments | (model.args or {})
    return replace(model, name=described.architecture, args=more or None, **sizes)


def _data(config: Config, described: Described) -> DataConfig:
    """Take the checkpoint's size and form of images where the user sets none, but no centre crop for a segmentation."""
    data, cropped = config.data, ("crop_pct", "crop_mode") if config.segment.head is not None else ()
    told: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in described.input.items() if key not in cropped
    }
    size = described.arguments.get("img_size") or described.image_size
    if isinstance(size, tuple):
        if len(set(size)) > 1 and data.img_size is None:
            what = f"the checkpoint takes images of {size[0]}x{size[1]}"
            raise UserError(what, described.where, "pdvit trains on square ones: give --img-size")
        size = size[0]
    told["img_size"] = size
    return replace(data, **{key: value for key, value in told.items() if getattr(data, key) is None})


def _classifiers(model: Any) -> tuple[str, ...]:
    told = model.pretrained_cfg.get("classifier") or ()
    return (told,) if isinstance(told, str) else tuple(told)


def _heads(model: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}." for name in (*HEADS, *_classifiers(model)))


def _own(model: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}." for name in _classifiers(model))


def _matched(described: Described, model: nn.Module, pruned: Collection[str] = ()) -> Match:
    """Compare weights and model; UserError where file and backbone have too little in common."""
    found, heads = match(described.chosen.tensors, model, described.where), _heads(model)
    backbone = [name for name in model.state_dict() if not name.startswith(heads)]
    lacking = [name for name in (*found.missing, *found.misshapen) if not name.startswith(heads)]
    left = [name for name in found.left if not name.startswith(heads) and name not in pruned]
    if len(lacking) <= (1 - ENOUGH) * len(backbone) and len(left) <= TOO_MANY * len(backbone):
        return found
    parts = {"missing": found.missing, "of another shape": found.misshapen, "left over": left}
    listed = "; ".join(f"{what}: {_listed(names)}" for what, names in parts.items() if names)
    what = f"{len(backbone) - len(lacking)} of the backbone's {len(backbone)} weights are in the file ({listed})"
    tip = "it belongs to another architecture: name the right one with --model, --depth, --width"
    raise UserError(what, described.where, tip)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} ({', '.join(names[:NAMED])}{more})"


def _notes(found: Match, fresh: list[str], described: Described, total: int) -> list[str]:
    chosen = described.chosen
    kind = "" if described.weights == "unknown" else f", {described.weights} weights"
    under = f", found under '{chosen.prefix}'" if chosen.prefix else ""
    notes = [f"begins with {described.name}{kind}: {len(found.tensors)} of {total} tensors{under}"]
    if chosen.others:
        notes.append(f"it holds others too ({', '.join(chosen.others)}): --weights raw or ema chooses")
    if chosen.outside and described.segment is None:
        notes.append(f"passed over: {len(chosen.outside)} tensors that stand elsewhere in it")
    for what, names in (("fresh", fresh), ("resampled", found.resampled), ("left over", found.left)):
        if names:
            notes.append(f"{what}: {_listed(names)}")
    return notes
