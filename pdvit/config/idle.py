"""Settings that were given and do nothing in this run: said, because a typo or a forgotten flag looks the same."""

from dataclasses import fields

from pdvit.config.presets import TERMS
from pdvit.config.schema import AugmentConfig, Config, DataConfig, DiversityConfig, SegmentConfig


def idle_settings(config: Config) -> list[str]:
    """Return, for a resolved configuration, one sentence for each setting that differs from its default in vain."""
    diversity, augment = config.diversity, config.augment
    on = {term for term in TERMS if getattr(diversity, term)}
    mixes = [bool(augment.cutmix), bool(augment.mixup)]
    needs: dict[str, tuple[bool, str]] = {
        f"diversity.{term}_schedule": (term in on, f"the {term} term is off") for term in TERMS
    }
    needs |= {
        "diversity.variant": (bool(on & {"cosine", "contrastive", "mixing"}), "none of the terms that it shapes is on"),
        "diversity.cosine_layers": ("cosine" in on, "the cosine term is off"),
        "diversity.patch_head": ("mixing" in on, "the mixing term is off"),
        "augment.mixup_prob": (any(mixes), "nothing is mixed"),
        "augment.mixup_mode": (any(mixes), "nothing is mixed"),
        "augment.mixup_switch_prob": (all(mixes), "CutMix and Mixup are not both on"),
        "augment.color_jitter": (not augment.auto_augment, "RandAugment jitters colours itself"),
    }
    if config.data.source.split(":")[0] == "digits":
        in_memory = "the digits lie in memory"
        files = ("resident", "crop_pct", "crop_mode", "on_bad_image")
        needs |= {f"data.{name}": (False, in_memory) for name in files}
        needs["augment.ratio"] = (augment.scale is not None, "nothing is cropped")
    needs |= _of_segmentation(config)
    defaults = {
        "data": DataConfig(),
        "diversity": DiversityConfig(variant="paper", patch_head="own"),
        "augment": AugmentConfig(),
        "segment": SegmentConfig(),
    }
    idle: list[str] = []
    for name, (used, why) in needs.items():
        section, _, item = name.partition(".")
        value = getattr(getattr(config, section), item)
        if not used and value != getattr(defaults[section], item):
            idle.append(f"{name} = {value} has no effect: {why}")
    return idle


def _of_segmentation(config: Config) -> dict[str, tuple[bool, str]]:
    """Return what is needed where pixels have classes, and what is only needed there."""
    segment = config.segment
    if segment.head is None:
        return {f"segment.{item.name}": (False, "segment.head is unset") for item in fields(SegmentConfig)}
    why = "images with masks have augmentations of their own: segment.jitter, max_share, photometric, augment.hflip"
    others = ("shift", "scale", "ratio", "auto_augment", "color_jitter", "reprob", "smoothing")
    needs = {f"augment.{name}": (False, why) for name in others}
    needs["data.resident"] = (False, "images with masks are read when they are needed")
    crops = "images with masks are cropped by segment.crop; only those of the probe, which P is of, are cropped so"
    needs |= {f"data.{name}": (False, crops) for name in ("crop_pct", "crop_mode")}
    upernet = segment.head == "upernet"
    needs |= {f"segment.{name}": (upernet, f"the {segment.head} head has none") for name in ("width", "aux", "norm")}
    if config.data.source == "scenes":
        needs |= {f"segment.{name}": (False, "the scenes are made") for name in ("classes", "check_masks")}
    return needs
