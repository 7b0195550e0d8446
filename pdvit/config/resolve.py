"""Fill in the settings that depend neither on the data nor on the weights."""

import math
import re
from dataclasses import replace
from typing import Any

from pdvit.config.duration import weight_schedule
from pdvit.config.schema import PRESETS, TERMS, Config
from pdvit.errors import UserError

# The small vision transformer of `pdvit train` without --model: 64 tokens of width 48.
SMALL: dict[str, Any] = {"name": "vit_tiny_patch16_224", "depth": 8, "width": 48, "patch_size": 4}
SMALL_HEAD_WIDTH, SMALL_IMAGE, SMALL_LR = 16, 32, 2e-3
HEAD_LR = 1e-3  # of a fresh classifier on pretrained weights (docs/finetune.md)
SCENE = 64  # side of the digit scenes
# DeiT's learning rate for 512 images per update, and the tenth of it with which the paper's authors finetune.
LR_PER_512, FINETUNE_FACTOR = 5e-4, 0.1
MIN_LR_FACTOR = 1e-3
NARROW, NARROW_LR = 192, 1e-3  # models narrower than timm's finetune with this rate (docs/finetune.md)
# The paper's (and MMSegmentation's) for 16 images: the head of a segmentation is new even on a pretrained backbone.
LR_PER_16 = 6e-5

# timm's RandAugment: magnitude, layers, upper bound, probability, standard deviation, increasing.
RAND_AUGMENT = re.compile(r"rand(-((m|n|mmax)[0-9]+|(p|mstd)[0-9]+(\.[0-9]+)?|inc[01]))*")


def resolve(config: Config) -> Config:
    """Return the configuration with preset, model and learning rate filled in; resolving twice changes nothing.

    With initial weights, the model is unset until `apply_checkpoint_defaults` has read them. Raises UserError for a
    schedule or policy that can't be parsed, contradictory settings, and a final learning rate above the peak.
    """
    for term in TERMS:
        weight_schedule(config.diversity, term)  # raises the error before the run
    policy = config.augment.auto_augment
    numbers = dict(re.findall(r"-([a-z]+)([0-9.]+)", policy)) if RAND_AUGMENT.fullmatch(policy) else {"p": math.inf}
    if policy and (float(numbers.get("m", 10)) > float(numbers.get("mmax", 10)) or float(numbers.get("p", 1)) > 1):
        tip = "for example rand-m9-mstd0.5-inc1: m is at most mmax (10 by default), p at most 1; n sets the layers"
        raise UserError(f"'{policy}' is not a RandAugment policy of timm", "augment.auto_augment (--aa)", tip)
    for name in ("freeze", "weights") if config.model.init is None else ():
        if getattr(config.model, name) is not None:
            why = ": new weights would never learn" if name == "freeze" else ""
            what = f"model.{name} needs initial weights{why}"
            raise UserError(what, f"model.{name} (--{name})", "name a checkpoint with --init, or leave it out")
    diversity, augment = config.diversity, config.augment
    values = dict(PRESETS[diversity.preset])
    values |= {name: getattr(diversity, name) for name in values if getattr(diversity, name) is not None}
    if values["variant"] == "released" and diversity.cosine is None:
        values["cosine"] = 0.0  # the variant has no cosine term
    if values["gram"] and config.model.init is None:
        what = "the gram term compares with the model that the run begins from, and this one begins from random weights"
        raise UserError(what, "diversity.gram (--gram)", "name a checkpoint with --init, or leave it out")
    if config.segment.head is not None:
        if diversity.mixing:
            what = "the mixing term needs patches of one class, which pixel labels do not give"
            raise UserError(what, "diversity.mixing (--mixing)", "leave it out: the other terms work")
        values["mixing"] = 0.0
    if augment.cutmix is None:
        augment = replace(augment, cutmix=float(values["mixing"] > 0 or diversity.preset == "cutmix"))
    if config.segment.head is not None and (augment.cutmix or augment.mixup):
        where = "augment.cutmix, augment.mixup (--cutmix, --mixup)"
        raise UserError("images with masks are not mixed", where, "leave them at 0")
    config = with_crop(_model(replace(config, diversity=replace(diversity, **values), augment=augment)))
    lr, final = config.optim.lr, config.optim.min_lr
    if lr is not None and final is not None and final > lr:
        raise UserError(f"the final learning rate {final:g} is above the peak, {lr:g}", "optim.min_lr", "lower it")
    return config


def with_crop(config: Config) -> Config:
    """Return the configuration of a segmentation with equal crop and image sizes, if one of them is known."""
    segment, data = config.segment, config.data
    crop = segment.crop or data.img_size or (SCENE if data.source == "scenes" else None)
    if segment.head is None or crop is None:
        return config
    return replace(config, segment=replace(segment, crop=crop), data=replace(data, img_size=crop))


def _model(config: Config) -> Config:
    """Return the configuration with the model's shape, the image size of the small model, and the learning rate."""
    model, data, optim, segments = config.model, config.data, config.optim, config.segment.head is not None
    if model.name is None and model.init is not None:
        return config
    small = model.name is None
    model = replace(model, drop_path=model.drop_path or 0.0)
    if small:
        shape: dict[str, Any] = {name: getattr(model, name) or value for name, value in SMALL.items()}
        model = replace(model, **shape, heads=model.heads or max(1, shape["width"] // SMALL_HEAD_WIDTH))
        data = replace(data, img_size=data.img_size or (SCENE if segments else SMALL_IMAGE))
    if optim.lr is None:
        # As timm's script: adaptive optimizers take the square root of the batch.
        power = 0.5 if any(name in optim.opt.lower() for name in ("ada", "lamb")) else 1
        lr = LR_PER_512 * (data.batch_size / 512) ** power
        if small:
            lr = SMALL_LR
        elif model.init is not None and model.width is not None and model.width < NARROW:
            lr = NARROW_LR
        elif segments:
            lr = LR_PER_16 * (data.batch_size / 16) ** power
        elif model.init is not None:
            lr = FINETUNE_FACTOR * lr
            optim = replace(optim, head_lr=optim.head_lr or HEAD_LR)
        optim = replace(optim, lr=lr)
    if optim.min_lr is None and optim.lr is not None:
        optim = replace(optim, min_lr=MIN_LR_FACTOR * optim.lr)
    return replace(config, model=model, data=data, optim=optim)
