"""The configuration of a run that is taken up again, and its errors: settings are changed there, not given by flags."""

import re
from dataclasses import fields
from pathlib import Path

from pdvit.cli.settings import make_config
from pdvit.config.keys import info_of
from pdvit.config.load import read_toml, sections
from pdvit.config.schema import Config
from pdvit.errors import UserError

# The key in "optim.lr (--lr)", which is how errors say where.
WHERE = re.compile(r"([a-z]+\.[a-z_]+)(?: \(--[^)]*\))?")
# A flag in a tip, with the value that follows it where that is more than a word of the sentence.
FLAG = re.compile(r"(--[a-z][a-z-]*)(?: (?!(?:or|and|to|in)\b)(\w+))?")


def recipe_of(run: Path, change: list[str]) -> Config:
    """Return the configuration in run.toml, with the changes; raises UserError."""
    file = run / "run.toml"
    if not read_toml(file):
        tip = "restore it: state.json of each checkpoint has its values, under config"
        raise UserError("run.toml is empty, so nobody knows what was trained", str(file), tip)
    return make_config(file, change, {}, assigned_by="--change")


def as_change(error: UserError, run: Path, again: str) -> UserError:
    """Return the error of a run that is resumed: with --change for flags, and what can't change said so.

    `again` is the command that resumes it.
    """
    from pdvit.engine.recipe import FIXED

    match = WHERE.fullmatch(error.where)
    tip = FLAG.sub(_changed, error.tip)
    if match is None:
        return UserError(error.what, error.where, tip)
    if match[1] == "data.source":
        tip = f"restore it, or say where it is now: {again} --change data.source=PATH (it has to hold the same images)"
    elif match[1] in FIXED:
        tip = f"this can't change within a run: see that what it needs is there, or start anew: --config {run}/run.toml"
    return UserError(error.what, f"{match[1]} of {run}", tip)


def _changed(match: re.Match[str]) -> str:
    """Return `--change key=value` for a flag of the configuration and its value."""
    for section, cls in sections().items():
        for item in fields(cls):
            if match[1] in info_of(item).flags:
                if isinstance(item.default, bool):
                    return f"--change {section}.{item.name}=true" + (f" {match[2]}" if match[2] else "")
                return f"--change {section}.{item.name}={match[2] or '...'}"
    return match[0]
