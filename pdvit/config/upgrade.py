"""Recipes that an earlier pdvit wrote, as today's."""

from collections.abc import Mapping
from typing import Any


def as_today(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what an earlier pdvit's run.toml means today; anything else as it is.

    Before `data.resident`, every run.toml had a crop and a flip, and on digits they did nothing.
    """
    data, augment = layer.get("data"), layer.get("augment")
    if not (isinstance(data, Mapping) and isinstance(augment, Mapping)):
        return layer
    written = "split_seed" in data and "resident" not in data and {"hflip", "scale"} <= set(augment)
    if not written or data.get("source") != "digits":
        return layer
    return {**layer, "augment": {key: value for key, value in augment.items() if key not in ("hflip", "scale")}}
