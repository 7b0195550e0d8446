"""Settings that have no effect in a run: a typo and a forgotten flag look the same."""

from collections.abc import Container
from dataclasses import fields

from pdvit.config.schema import TERMS, Config, DiversityConfig, SegmentConfig
from pdvit.data.sources import SETTINGS, SOURCE_TYPES, source_type


def unused_settings(config: Config, in_memory: bool = False, inherited: Container[str] = ()) -> list[str]:
    """Return a note for each setting of a resolved configuration that differs from its default without effect.

    `inherited` settings (`section.name`) are not the user's but those of a checkpoint, and have no note.
    """
    diversity, augment, segment = config.diversity, config.augment, config.segment
    terms, source = {term for term in TERMS if getattr(diversity, term)}, config.data.source
    source_settings = SOURCE_TYPES[source_type(source) or "folder"].settings
    # The keys of a condition, whether it holds, and the reason that the note gives.
    conditions: list[tuple[str, bool, str]] = [
        *((f"diversity.{term}_schedule", term in terms, f"the {term} term is off") for term in TERMS),
        ("diversity.variant", bool(terms & {"cosine", "contrastive", "mixing"}), "no term with variants is on"),
        ("diversity.gram_variant", "gram" in terms, "the gram term is off"),
        ("diversity.cosine_layers", "cosine" in terms, "the cosine term is off"),
        ("diversity.patch_head", "mixing" in terms, "the mixing term is off"),
        ("augment.mixup_prob mixup_mode", bool(augment.cutmix or augment.mixup), "no images are mixed"),
        ("augment.mixup_switch_prob", bool(augment.cutmix and augment.mixup), "CutMix and Mixup are not both on"),
        ("augment.color_jitter", not augment.auto_augment, "RandAugment has its own colour operations"),
        *((f"data.{name}", name in source_settings, f"'{source}' does not have it") for name in SETTINGS),
    ]
    if in_memory:
        conditions += [
            ("data.resident crop_pct crop_mode on_bad_image", False, "the images are in memory"),
            ("augment.ratio", augment.scale is not None, "images in memory are not cropped by default"),
        ]
    if segment.head is None:
        names = " ".join(item.name for item in fields(SegmentConfig))
        conditions.append((f"segment.{names}", False, "segment.head is unset"))
    else:
        upernet, made = segment.head == "upernet", source == "scenes"
        own = "segmentation augments with segment.jitter, max_share, photometric and augment.hflip"
        crops = "segmentation crops with segment.crop; this one is for the probe of P only"
        conditions += [
            ("augment.shift scale ratio auto_augment color_jitter reprob smoothing", False, own),
            ("data.resident", False, "images with masks are read when they are used"),
            ("data.crop_pct crop_mode", False, crops),
            ("segment.width aux norm", upernet, f"the {segment.head} head has none"),
            ("segment.classes check_masks", not made, "the scenes are generated"),
        ]
    defaults = Config(diversity=DiversityConfig(variant="paper", patch_head="own"))
    notes: dict[str, str] = {}
    for keys, used, reason in conditions:
        section, _, names = keys.partition(".")
        for name in () if used else names.split():
            value = getattr(getattr(config, section), name)
            if value != getattr(getattr(defaults, section), name) and f"{section}.{name}" not in inherited:
                notes[f"{section}.{name}"] = f"{section}.{name} = {value} has no effect: {reason}"
    return list(notes.values())
