"""The saved configuration of a run, changed by --change, and its errors with tips that name --change."""

import re
from dataclasses import fields
from pathlib import Path

from pdvit.cli.options import make_config
from pdvit.config.load import read_toml, sections
from pdvit.config.schema import Config, info_of
from pdvit.errors import UserError

# The key in "optim.lr (--lr)": how errors name a setting.
WHERE = re.compile(r"([a-z]+\.[a-z_]+)(?: \(--[^)]*\))?")
# A flag in a tip, and its value if that is more than a word of the sentence.
FLAG = re.compile(r"(--[a-z][a-z-]*)(?: (?!(?:or|and|to|in)\b)(\w+))?")


def saved_config(run: Path, change: list[str]) -> Config:
    """Return the configuration in run.toml with changes; raises UserError."""
    file = run / "run.toml"
    if not read_toml(file):
        tip = "restore it from state.json of a checkpoint, which has its values under config"
        raise UserError("run.toml is empty", str(file), tip)
    return make_config(file, change, assigned_by="--change")


def with_change_tips(error: UserError, run: Path, command: str) -> UserError:
    """Return the error of a resumed run with tips that name --change, not flags. `command` resumes the run."""
    from pdvit.engine.recipe import FIXED

    match = WHERE.fullmatch(error.where)
    tip = FLAG.sub(_as_change, error.tip)
    if match is None:
        return UserError(error.what, error.where, tip)
    if match[1] == "data.source":
        tip = f"restore it, or give its new place: {command} --change data.source=PATH (with the same images)"
    elif match[1] in FIXED:
        tip = f"this can't change within a run: restore what it needs, or start a new run: --config {run}/run.toml"
    return UserError(error.what, f"{match[1]} of {run}", tip)


def _as_change(match: re.Match[str]) -> str:
    """Return `--change key=value` for a flag of the configuration and its value."""
    for section, cls in sections().items():
        for item in fields(cls):
            if match[1] in info_of(item).flags:
                if isinstance(item.default, bool):
                    return f"--change {section}.{item.name}=true" + (f" {match[2]}" if match[2] else "")
                return f"--change {section}.{item.name}={match[2] or '...'}"
    return match[0]
