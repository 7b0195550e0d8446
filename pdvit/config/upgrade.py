"""Recipes that an earlier pdvit wrote, as today's."""

from collections.abc import Mapping
from typing import Any

# What every run.toml of then has, and hardly a file that somebody wrote.
SECTIONS = {"data", "model", "diversity", "augment", "optim", "run", "checkpoint"}
DATA = {"source", "batch_size", "workers", "split_seed"}
AUGMENT = {"cutmix", "mixup_prob", "shift", "hflip", "scale"}


def as_today(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what an earlier pdvit's run.toml means today; anything else as it is.

    Before `data.resident`, every run.toml had a crop and a flip, and on digits they did nothing.
    """
    data, augment = layer.get("data"), layer.get("augment")
    if not (isinstance(data, Mapping) and isinstance(augment, Mapping)):
        return layer
    written = "resident" not in data and set(data) >= DATA and set(augment) >= AUGMENT and set(layer) >= SECTIONS
    if not written or data.get("source") != "digits":
        return layer
    return {**layer, "augment": {key: value for key, value in augment.items() if key not in ("hflip", "scale")}}
