"""Whether a checkpoint belongs to a configuration and a data set: what may differ, and what may not."""

from collections.abc import Mapping
from typing import Any

from pdvit.config import build, resolve, to_dict
from pdvit.errors import UserError

# Another value of these would be another run: batches, order and weights would not fit what was done so far.
FIXED = frozenset(
    {
        *(f"data.{name}" for name in ("batch_size", "split_seed", "img_size")),
        *(f"data.{name}" for name in ("mean", "std", "crop_pct", "interpolation", "crop_mode")),
        *(f"model.{name}" for name in ("name", "depth", "width", "heads", "patch_size", "args")),
        *(f"model.{name}" for name in ("init", "weights", "init_hash", "freeze")),
        *(f"segment.{name}" for name in ("head", "width", "norm", "classes", "crop", "short_side")),
        "diversity.preset",  # the weights are spelled out: those can change
        "diversity.patch_head",
        "optim.opt",
        "run.seed",
    }
)
SHOWN = 5


def flat(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return {section: {key: value}} as {section.key: value}."""
    return {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys of two configurations that differ, with both values; None is a key that is not set."""
    old, new = flat(before), flat(after)
    keys = sorted(set(old) | set(new))
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def check_changes(changes: Mapping[str, tuple[Any, Any]], where: str) -> None:
    """Raise UserError where a change, `{key: (old, new)}`, would make another run of it."""
    for key, (old, new) in changes.items():
        # a head comes and goes with these
        switched = key in ("diversity.mixing", "segment.aux") and bool(old) != bool(new)
        if key in FIXED or switched:
            raise UserError(f"{key} can't change from {old} to {new} within a run", where, "start a new run with it")


def check_recipe(saved: Mapping[str, Any], config: Mapping[str, Any], recorded: Mapping[str, Any], where: str) -> None:
    """Raise UserError where run.toml is not what the checkpoint was made with.

    Args:
        saved: the configuration in the checkpoint.
        config: that of run.toml, with what was changed on purpose.
        recorded: keys that were changed on purpose, with their values.
        where: the run.
    """
    # an earlier pdvit did not know every key of today
    saved, config = (to_dict(resolve(build((where, recipe)))) for recipe in (saved, config))
    differ = {
        key: (old, new)
        for key, (old, new) in changed_keys(saved, config).items()
        if not (key in recorded and recorded[key] == new)
    }
    if differ:
        listed = [f"{key} was {old!r}, is {new!r}" for key, (old, new) in list(differ.items())[:SHOWN]]
        more = [f"{len(differ) - SHOWN} more"] if len(differ) > SHOWN else []
        key, (old, _) = next(iter(differ.items()))
        raise UserError(
            f"the checkpoint is of another recipe: {'; '.join(listed + more)}",
            where,
            f"restore run.toml ({key} = {old!r}); to go on with another setting, --change section.key=value",
        )


def check_data(saved: Mapping[str, Any], data: Mapping[str, Any], where: str) -> None:
    """Raise UserError where the data are not those the run began with."""
    if dict(saved) == dict(data):
        return
    for name in [*saved, *(name for name in data if name not in saved)]:
        old, new = saved.get(name), data.get(name)
        if old != new:
            break
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        counts = (old.get("images"), new.get("images"))
        what = (
            f"{name} has {counts[1]} images, and had {counts[0]}" if counts[0] != counts[1] else f"{name} has changed"
        )
    else:
        what = f"{name}: there were {old!r}, now {new!r}"
    raise UserError(
        f"the data are not those the run began with: {what}",
        where,
        "restore them, or start a new run; moved data are found with --change data.source=PATH",
    )
