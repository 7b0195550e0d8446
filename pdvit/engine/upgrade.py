"""Checkpoints of earlier formats, brought to today's; `state.VERSION` counts the formats."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upgrade(facts: dict[str, Any], rest: dict[str, Tensor], names: Sequence[str]) -> None:
    """Change facts and tensors of an older format in place, one format at a time.

    Args:
        facts: what state.json holds.
        rest: the tensors of state.safetensors.
        names: the parameters in the optimizer's order, which the first format did not name.
    """
    if facts["version"] == 1:
        _name_parameters(facts, rest, names)
    if facts["version"] != 2:
        raise ValueError(f"no format has the number {facts['version']}")


def _name_parameters(facts: dict[str, Any], rest: dict[str, Tensor], names: Sequence[str]) -> None:
    """1 to 2: parameters by name, seconds by phase, generators by rank; configuration and data were not kept."""
    packed, progress = facts["optimizer"], facts["progress"]
    by_name = {names[int(index)]: value for index, value in packed["state"].items()}
    facts["optimizer"] = {"state": by_name, "groups": packed["param_groups"]}
    progress["spent"] = {"step": progress.pop("seconds")}
    progress["skipped"] = 0
    facts["meter_names"] = [name.removeprefix("meter.") for name in rest if name.startswith("meter.")]
    for name in [name for name in rest if name.startswith(("generator.", "meter."))]:
        rest[f"0.{name}"] = rest.pop(name)
    none = torch.zeros((), dtype=torch.float64)
    rest |= {"0.meter.skipped": none, "0.meter.in_a_row": none.clone()}
    facts |= {"version": 2, "config": None, "data": None, "scaler": {}}
