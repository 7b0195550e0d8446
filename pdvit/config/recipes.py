"""The defaults of the commands that train, and what a run differs in from them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pdvit.config.schema import PRESETS, TERMS, Config, DiversityConfig

Layer = Mapping[str, Mapping[str, Any]]  # values by section and key
NamedLayer = tuple[str, Layer]  # the name is for errors
# docs/finetune.md and docs/segment.md give the reasons.
FINETUNE: Layer = {"data": {"source": "digits:5-9"}, "diversity": {"preset": "none"}, "optim": {"epochs": "12"}}
SEGMENT: Layer = {
    "data": {"source": "scenes"},
    "diversity": {"preset": "none"},
    "segment": {"head": "upernet"},
    "optim": {"epochs": "24"},
}
DEFAULTS: dict[str, Layer] = {"train": {}, "finetune": FINETUNE, "segment": SEGMENT}
# Scenes are small and never repeat.
SCENES: Layer = {
    "data": {"batch_size": 8},
    "segment": {"jitter": (1.0, 1.0), "photometric": False},
    "optim": {"epochs": "1.25"},
}
SCENES_UPERNET: Layer = {"segment": {"width": 32, "aux": 0.0}}
SCENES_MODEL: Layer = {
    "model": {"depth": 4, "width": 96, "heads": 3, "patch_size": 8},
    "optim": {"lr": 2e-3, "min_lr": 1e-6},
}
NOT_IN_NAMES = re.compile(r"[^\w.+%-]+")  # becomes _ in the name of a run
IN_TERMS = ("preset", "variant", *TERMS)  # what `terms_of` names


def terms_of(diversity: DiversityConfig) -> str:
    """Return the preset and what differs from it: `paper`, `cosine`, `paper-mixing=0.5`, `paper-released`."""
    own, variant = PRESETS[diversity.preset], diversity.variant
    weights = {term: value for term in TERMS if (value := getattr(diversity, term)) not in (None, own[term])}
    if variant == "released" and weights.get("cosine") == 0:  # it has no such term
        del weights["cosine"]
    changed = [term if value == 1 else f"{term}={value:g}" for term, value in weights.items()]
    changed += [variant] if variant not in (None, own["variant"]) else []
    return "-".join(changed if changed and diversity.preset == "none" else [diversity.preset, *changed])


def text_in_name(value: Any) -> str:
    """Return a value as part of a folder's name."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "_".join(text_in_name(item) for item in value)
    return NOT_IN_NAMES.sub("_", str(value)).strip("_")


def merge_layers(layers: Iterable[Layer]) -> dict[str, dict[str, Any]]:
    """Return the layers as one; later layers override earlier ones."""
    merged: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for section, values in layer.items():
            merged[section] = merged.get(section, {}) | dict(values)
    return merged


def recipe_defaults(config: Config) -> Layer:
    """Return the defaults of the command that a configuration is for; of `segment` by data, head and model."""
    if config.segment.head is None:
        return {} if config.model.init is None else FINETUNE
    if config.data.source != "scenes":
        return SEGMENT
    upernet = SCENES_UPERNET if config.segment.head == "upernet" else {}
    small = SCENES_MODEL if config.model.init is None and config.model.name is None else {}
    return merge_layers([SEGMENT, SCENES, upernet, small])
