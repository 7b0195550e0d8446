"""Models from checkpoints: loaded whole, or as the initial weights of a run."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from pdvit.config import Config, build, to_dict
from pdvit.config.schema import DataConfig, ModelConfig
from pdvit.errors import UserError
from pdvit.models.build import SIZES, build_model, sketch_model
from pdvit.models.families import family_of
from pdvit.models.matching import (
    OTHER_MODEL,
    UNLABELLED,
    StateDictMatch,
    classifiers_of,
    compare,
    listed,
    match_state_dict,
)
from pdvit.models.resolved_checkpoint import COPY, ResolvedCheckpoint
from pdvit.models.segmentation.segmenter import HEAD, OPTIONS, Segmenter, arguments_of, prune
from pdvit.models.wrapper import Wrapper

# At most this fraction of the backbone's weights can be missing in the file, and as many can be unexpected.
MAX_DIFFERENCE = 0.1
# Modules between tokens and classes beside the classifier, and the norms among them.
HEADS = ("head.", "fc_norm.", "attn_pool.", "pre_logits.")
POOLED_NORMS = ("fc_norm.", "head.norm.")
PRUNED = (*OPTIONS, "global_pool", "fc_norm")  # timm's arguments that differ in the backbone of a segmentation model


def load_model(checkpoint: ResolvedCheckpoint, backbone: bool = False) -> ResolvedCheckpoint:
    """Return a checkpoint whose model has its weights, in evaluation mode; UserError if they differ.

    The model is a timm model, or a Segmenter, unless only its `backbone` is asked for.
    """
    where, selected, adapter, notes = checkpoint.where, checkpoint.selected, checkpoint.adapter, checkpoint.notes
    sketch, classes, segment = checkpoint.model, checkpoint.classes or [], None if backbone else checkpoint.segment
    match = match_state_dict(selected.tensors, sketch, where, sketch)
    if checkpoint.resized:
        notes += tuple(f"{text}, for the image size" for text in listed({"resampled": match.resampled}))
        match = replace(match, resampled=[])
    match.refuse_difference(where)  # before the model takes memory
    if segment is not None and adapter is not None:
        if not classes:
            raise UserError("its configuration does not name its classes", where, COPY)
        with torch.device("meta"):
            expected = Segmenter(sketch, adapter, len(classes), segment).head.state_dict(prefix=HEAD)
        head = compare(selected.outside, expected, where)
        head.refuse_difference(where)
    model: Any = build_model(checkpoint.architecture, checkpoint.arguments, where)
    if adapter is not None:
        prune(model, adapter)
    model.load_state_dict(match.tensors)
    size = {"input_size": (3, *checkpoint.image_size)} if checkpoint.image_size else {}  # of some models nowhere else
    model.pretrained_cfg = model.pretrained_cfg | checkpoint.preprocessing | size
    if segment is not None and adapter is not None:
        model = Segmenter(model, adapter, len(classes), segment)
        model.load_state_dict(head.tensors, strict=False)
    selected = replace(selected, tensors={}, outside={})
    return replace(checkpoint, model=model.eval(), selected=selected, segment=segment, notes=notes)


def apply_checkpoint_defaults(config: Config, checkpoint: ResolvedCheckpoint) -> Config:
    """Fill unset model, image and weight settings from the checkpoint, so that the run no longer needs its file.

    A configuration with a hash of its initial weights (from run.toml) is complete; the hash must be the checkpoint's.
    Values from the checkpoint pass the configuration's checks, and its model's shapes are compared with its tensors.
    Raises UserError if a value is invalid, images are not square, or weights and model differ too much.
    """
    digest, known = fingerprint(checkpoint), config.model.init_hash
    if known not in (None, digest):
        what = f"the hash of the weights is {digest}, not that of the configuration: {known}"
        raise UserError(what, checkpoint.where, "restore the file, or name it again with --init and without --config")
    path = os.path.expanduser(str(config.model.init).removeprefix("local-dir:"))
    init = os.path.abspath(path) if os.path.exists(path) else config.model.init
    config = replace(config, model=replace(config.model, init=init, init_hash=digest))
    if known is not None:
        return config
    weights = checkpoint.selected.weights
    model = replace(config.model, weights=None if weights == UNLABELLED else weights)
    config = replace(config, model=_model_defaults(model, checkpoint), data=_data_defaults(config, checkpoint))
    build((checkpoint.where, to_dict(config)))
    _match_backbone(checkpoint, sketch_model(str(config.model.name), arguments_of(config), checkpoint.where))
    return config


def fingerprint(checkpoint: ResolvedCheckpoint) -> str:
    """Return a hash of the weights: names, types, shapes and values."""
    digest = sha256()
    head = {} if checkpoint.segment is None else checkpoint.selected.outside
    for name, value in sorted([*checkpoint.selected.tensors.items(), *head.items()]):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _model_defaults(model: ModelConfig, checkpoint: ResolvedCheckpoint) -> ModelConfig:
    """Return the model section with the checkpoint's architecture, unless the user names another."""
    # The data set the number of classes, data.img_size the size; unset values and three channels are the defaults.
    # A segmentation backbone was built for any size and pruned of its pooling: `arguments_of` sets these again.
    left_out = ("num_classes", "img_size", *(PRUNED if checkpoint.segment is not None else ()))
    arguments = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in checkpoint.arguments.items()
        if not (value is None or key in left_out or (key, value) == ("in_chans", 3))
    }
    drop_path = arguments.pop("drop_path_rate", None)
    if isinstance(drop_path, int | float) and model.drop_path is None:
        model = replace(model, drop_path=float(drop_path))
    if model.name not in (None, checkpoint.architecture):
        return model
    sizes: dict[str, Any] = {}
    if family_of(checkpoint.model).plain:
        for argument, key in SIZES.items():
            if isinstance(arguments.get(argument), int):
                size, own = arguments.pop(argument), getattr(model, key)
                sizes[key] = size if own is None else own
    return replace(model, name=checkpoint.architecture, args=arguments | (model.args or {}) or None, **sizes)


def _data_defaults(config: Config, checkpoint: ResolvedCheckpoint) -> DataConfig:
    """Return the data section with the checkpoint's preprocessing; segmentation has no centre crop."""
    size = checkpoint.arguments.get("img_size") or checkpoint.image_size
    if isinstance(size, tuple):
        if size[0] != size[1] and config.data.img_size is None:
            what = f"the checkpoint takes images of {size[0]}x{size[1]}, and pdvit trains on square ones"
            raise UserError(what, checkpoint.where, "set --img-size")
        size = size[0]
    defaults = checkpoint.preprocessing | {"img_size": size}
    if config.segment.head is not None:
        defaults = {key: value for key, value in defaults.items() if key not in ("crop_pct", "crop_mode")}
    return replace(config.data, **{key: value for key, value in defaults.items() if getattr(config.data, key) is None})


def load_pretrained(network: Wrapper, checkpoint: ResolvedCheckpoint, classes: Sequence[str]) -> list[str]:
    """Load a checkpoint's weights into the timm model of a network; return notes for the log.

    The classifier stays fresh if the classes differ, the head of a segmentation model also if the heads do. Raises
    UserError if weights and model differ too much, weights are not finite, or fresh weights would be frozen.
    """
    model = network.inside
    pruned = network.adapter.pruned if isinstance(network, Segmenter) else frozenset()
    match = _match_backbone(checkpoint, model, pruned)
    if checkpoint.classes is not None and checkpoint.classes != list(classes):
        other = {name for name in match.tensors if name.rpartition(".")[0] in classifiers_of(model)}
        kept = {name: value for name, value in match.tensors.items() if name not in other}
        match = replace(match, tensors=kept, missing=[*match.missing, *other])
    fresh = sorted([*match.missing, *match.mismatched])
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    # A fresh norm after the pooling only normalizes; the classifier, which learns, scales its output.
    if stuck := [name for name in fresh if name in frozen and not name.startswith(POOLED_NORMS)]:
        what = f"{stuck[0]} is not in the file, and would stay fresh because it is frozen"
        raise UserError(what, "model.freeze (--freeze)", "freeze less")
    check_finite(match.tensors, checkpoint.where)
    model.load_state_dict(match.tensors, strict=False)
    selected, weights = checkpoint.selected, model.state_dict()
    label = "" if selected.weights == UNLABELLED else f", {selected.weights} weights"
    under = f", found under '{selected.prefix}'" if selected.prefix else ""
    notes = [f"initial weights: {checkpoint.name}{label}: {len(match.tensors)} of {len(weights)} tensors{under}"]
    notes += checkpoint.notes
    if selected.rivals:
        notes.append(f"the file holds others too ({', '.join(selected.rivals)}): choose by --weights raw or ema")
    if selected.outside and checkpoint.segment is None:
        notes.append(f"ignored: {len(selected.outside)} tensors elsewhere in the file")
    notes += listed({"fresh": fresh, "resampled": match.resampled, "unexpected": match.unexpected})
    return [*notes, _load_head(network, checkpoint, classes)] if isinstance(network, Segmenter) else notes


def _load_head(segmenter: Segmenter, checkpoint: ResolvedCheckpoint, classes: Sequence[str]) -> str:
    """Load the head of another segmentation model if it fits; return a note."""
    if checkpoint.segment is None:
        return "head: fresh"
    if checkpoint.classes != list(classes):
        return "head: fresh, because the file has other classes"
    own = segmenter.head.state_dict()
    theirs = {name.removeprefix(HEAD): value for name, value in checkpoint.selected.outside.items()}
    match = compare(theirs, own, checkpoint.where)  # it can lack the auxiliary head
    if checkpoint.segment.head != segmenter.segment.head or match.mismatched:
        return f"head: fresh, because the file has another {checkpoint.segment.head} head"
    check_finite(match.tensors, checkpoint.where)
    segmenter.head.load_state_dict(match.tensors, strict=False)
    return f"head: {len(match.tensors)} of {len(own)} tensors from the file"


def _match_backbone(
    checkpoint: ResolvedCheckpoint, model: nn.Module, pruned: frozenset[str] = frozenset()
) -> StateDictMatch:
    """Match weights and model; raises UserError if too little of the backbone is in the file, or too much else."""
    match = match_state_dict(checkpoint.selected.tensors, model, checkpoint.where, checkpoint.model)
    heads = (*HEADS, *(f"{name}." for name in classifiers_of(model)))
    backbone = [name for name in model.state_dict() if not name.startswith(heads)]
    lacking = [name for name in (*match.missing, *match.mismatched) if not name.startswith(heads)]
    unexpected = [name for name in match.unexpected if not name.startswith(heads) and name not in pruned]
    if max(len(lacking), len(unexpected)) <= MAX_DIFFERENCE * len(backbone):
        return match
    groups = {"missing": match.missing, "of another shape": match.mismatched, "unexpected": unexpected}
    what = f"{len(backbone) - len(lacking)} of the backbone's {len(backbone)} weights are in the file"
    raise UserError(f"{what} ({'; '.join(listed(groups))})", checkpoint.where, OTHER_MODEL)


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError if a weight is infinite or not a number."""
    broken = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    for text in listed({"infinite or not numbers": broken}):
        raise UserError(f"some weights are {text}", where, "use an earlier checkpoint, or copy it again")
