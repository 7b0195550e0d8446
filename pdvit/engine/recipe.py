"""Checks that a checkpoint belongs to a configuration and a data set."""

from collections.abc import Mapping
from typing import Any

from pdvit.config import build, resolve, to_dict
from pdvit.errors import UserError

# With another value of these, batches, their order or the weights would not fit the checkpoint.
OF_SECTIONS = {
    "data": "batch_size split_seed img_size mean std crop_pct interpolation crop_mode",
    "model": "name depth width heads patch_size args init weights init_hash freeze",
    "segment": "head width norm classes crop short_side",
    "diversity": "preset patch_head",  # the weights stand in the configuration, and can change
    "optim": "opt",
    "run": "seed",
}
FIXED = frozenset(f"{section}.{name}" for section, names in OF_SECTIONS.items() for name in names.split())
SWITCHES = ("diversity.mixing", "diversity.gram", "segment.aux")  # zero or not: with a head or an anchor, or without


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings of two configurations that differ, with both values; None if it is unset."""
    old, new = (
        {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}
        for config in (before, after)
    )
    return {key: (old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)}


def check_changes(changes: Mapping[str, tuple[Any, Any]], where: str) -> None:
    """Raise UserError for a change `{key: (old, new)}` that needs a new run."""
    for key, (old, new) in changes.items():
        if key in FIXED or (key in SWITCHES and bool(old) != bool(new)):
            raise UserError(f"{key} can't change from {old} to {new} within a run", where, "start a new run with it")


def check_recipe(saved: Mapping[str, Any], config: Mapping[str, Any], recorded: Mapping[str, Any], where: str) -> None:
    """Raise UserError if the configuration differs from the saved one, except in `recorded` changes."""
    saved, config = (to_dict(resolve(build((where, recipe)))) for recipe in (saved, config))  # fills in defaults
    changes = changed_keys(saved, config).items()
    differ = [(key, old, new) for key, (old, new) in changes if not (key in recorded and recorded[key] == new)]
    if differ:
        what = "; ".join(f"{key} was {old!r}, is {new!r}" for key, old, new in differ)
        tip = f"restore run.toml ({differ[0][0]} = {differ[0][1]!r}); to resume with another setting, --change"
        raise UserError(f"the checkpoint is of another recipe: {what}", where, f"{tip} section.key=value")


def check_data(saved: Mapping[str, Any], data: Mapping[str, Any], where: str) -> None:
    """Raise UserError if the data are not those that the run began with."""
    for name in {**saved, **data}:
        old, new = saved.get(name), data.get(name)
        if old == new:
            continue
        what = f"{name}: there were {old!r}, now {new!r}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            before, now = old.get("images"), new.get("images")
            what = f"{name} has {now} images, and had {before}" if now != before else f"{name} has changed"
        tip = "restore them, or start a new run; moved data are found with --change data.source=PATH"
        raise UserError(f"the data are not those that the run began with: {what}", where, tip)
