"""Fill in what the user left open, where neither the data nor the model has to be looked at."""

from dataclasses import replace
from typing import Any

from pdvit.config.policy import parse_policy
from pdvit.config.presets import PRESETS, TERMS
from pdvit.config.schema import Config
from pdvit.config.weights import weight_schedule
from pdvit.errors import UserError

# The small vision transformer that `pdvit train` uses unless --model names another: 64 tokens of length 48.
SMALL = "vit_tiny_patch16_224"
SMALL_DEPTH, SMALL_WIDTH, SMALL_HEAD_WIDTH, SMALL_PATCH, SMALL_IMAGE = 8, 48, 16, 4, 32
SMALL_LR = 1e-3
# Side of the digit scenes.
SCENE = 64
# With initial weights: a tenth, as the paper's authors fine-tune; but where tokens are shorter than any of timm's, what
# the small model learns with (docs/finetune.md).
FINE, NARROW = 0.1, 192
# DeiT's learning rate for 512 images per update.
LR_PER_512 = 5e-4
# The paper's (and MMSegmentation's) for 16 images of a segmentation, whose head is fresh whatever the backbone is.
LR_PER_16 = 6e-5
# Keys of the diversity section that a preset fills in.
OF_PRESET = ("variant", "first", "last", "patch_head", *TERMS)


def resolve(config: Config) -> Config:
    """Return the configuration with preset, model and learning rate spelled out.

    Resolving twice changes nothing, so that a written run.toml means the same run. The model of initial weights is
    known when they are read; until then it is left open. Raises UserError where the learning rate would end above its
    peak, where the course of a weight or the policy can't be read, and where what depends on initial weights comes
    without them.
    """
    for term in TERMS:
        weight_schedule(config.diversity, term)
    parse_policy(config.augment.auto_augment)
    for name in ("freeze", "weights") if config.model.init is None else ():
        if getattr(config.model, name) is not None:
            why = ": fresh ones would never learn" if name == "freeze" else ""
            what = f"model.{name} needs initial weights{why}"
            raise UserError(what, f"model.{name} (--{name})", "name a checkpoint with --init, or leave it out")
    config = with_crop(_learning_rate(_model(_preset(config))))
    lr, least = config.optim.lr, config.optim.min_lr
    if lr is not None and least > lr:
        raise UserError(f"the least learning rate {least:g} is above the peak, {lr:g}", "optim.min_lr", "lower it")
    return config


def _preset(config: Config) -> Config:
    diversity, augment = config.diversity, config.augment
    preset = PRESETS[diversity.preset]
    spelled: dict[str, Any] = {
        name: getattr(preset if getattr(diversity, name) is None else diversity, name) for name in OF_PRESET
    }
    if spelled["variant"] == "released" and diversity.cosine is None:
        spelled["cosine"] = 0.0  # it has no cosine term, whatever the preset says
    if config.segment.head is not None:
        if diversity.mixing:
            what = "the mixing term needs whole patches of one class, which the pixels of an image do not give"
            raise UserError(what, "diversity.mixing (--mixing)", "leave it out: the other terms work")
        spelled["mixing"] = 0.0  # whatever the preset says
    if augment.cutmix is None:
        mixes = spelled["mixing"] > 0 or preset.mixed
        augment = replace(augment, cutmix=1.0 if mixes else 0.0)
    if config.segment.head is not None and (augment.cutmix or augment.mixup):
        what = "images whose pixels have classes of their own are not mixed"
        raise UserError(what, "augment.cutmix, augment.mixup (--cutmix, --mixup)", "leave them at 0")
    return replace(config, diversity=replace(diversity, **spelled), augment=augment)


def with_crop(config: Config) -> Config:
    """Return a configuration of a segmentation with the side of its crops, where that is known: it is the image size.

    Called before initial weights say what size theirs was, too: what the user wants comes first.
    """
    segment, data = config.segment, config.data
    crop = segment.crop or data.img_size or (SCENE if data.source == "scenes" else None)
    if segment.head is None or crop is None:
        return config
    return replace(config, segment=replace(segment, crop=crop), data=replace(data, img_size=crop))


def _model(config: Config) -> Config:
    model, data = config.model, config.data
    if model.name is None and model.init is not None:
        return config
    model = replace(model, drop_path=model.drop_path or 0.0)
    if model.name is not None:
        return replace(config, model=model)
    if config.optim.lr is None:
        config = replace(config, optim=replace(config.optim, lr=SMALL_LR))
    width = model.width or SMALL_WIDTH
    model = replace(
        model,
        name=SMALL,
        depth=model.depth or SMALL_DEPTH,
        width=width,
        heads=model.heads or max(1, width // SMALL_HEAD_WIDTH),
        patch_size=model.patch_size or SMALL_PATCH,
    )
    side = SMALL_IMAGE if config.segment.head is None else SCENE
    return replace(config, model=model, data=replace(data, img_size=data.img_size or side))


def _learning_rate(config: Config) -> Config:
    model = config.model
    if config.optim.lr is not None or model.name is None:
        return config
    lr = LR_PER_512 * config.data.batch_size / 512
    if model.init is not None and model.width is not None and model.width < NARROW:
        lr = SMALL_LR
    elif config.segment.head is not None:
        lr = LR_PER_16 * config.data.batch_size / 16
    elif model.init is not None:
        lr = FINE * lr
    return replace(config, optim=replace(config.optim, lr=lr))
