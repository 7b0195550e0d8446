"""Taking up a run again, as it was configured or with settings that are changed on purpose."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdvit.cli.runs.command import Command
from pdvit.cli.runs.prepare import prepare
from pdvit.cli.runs.recipe import as_change, recipe_of
from pdvit.cli.runs.report import close, make_console, say, train_and_report
from pdvit.errors import UserError

if TYPE_CHECKING:
    from pdvit.engine.interrupts import StopRequest
    from pdvit.tracking import RunDirectory


def resume(command: Command, name: str, change: list[str], as_json: bool, stop: "StopRequest") -> int:
    """Go on with the run at `name`, or `auto`: the newest; raises UserError where it can't be taken up."""
    from pdvit.config import resolve, to_dict, to_toml
    from pdvit.engine.recipe import changed_keys, check_changes
    from pdvit.tracking import RunDirectory, command_line

    path = _run_named(name)
    directory = RunDirectory.open(path)
    if summary := _finished(directory):
        if change:
            raise UserError("the run is finished, so nothing can change", f"--resume {path}", "start a new run")
        console = make_console(as_json)
        say(console, f"{path} is finished already")
        close(command.kind_of(recipe_of(path, [])), path, summary, console, as_json)
        return 0
    for text in change:
        if text.partition("=")[0].strip() in ("run.out", "run.name"):
            raise UserError("a run stays where it is", f"--change {text}", "move its folder instead")
    before, config = recipe_of(path, []), recipe_of(path, change)
    check_changes(changed_keys(to_dict(before), to_dict(config)), f"--resume {path} --change")
    try:
        ready = prepare(command, config, as_json, begun=(path / "checkpoints" / "last").is_file())
        ready.load()
    except UserError as error:
        raise as_change(error, path, command("--resume", shlex.quote(str(path)))) from error
    directory = RunDirectory.open(path, ready.ranks.main)
    with directory.locked():
        changes = changed_keys(to_dict(resolve(before)), to_dict(ready.config))  # an earlier pdvit wrote fewer keys
        changed = directory.changes() | {key: new for key, (_, new) in changes.items()}
        for note in ready.trainer.restore(directory, changed):
            say(ready.console, note)
        step = ready.trainer.state.progress.step
        say(ready.console, f"going on after step {step}" if step else "no checkpoint yet: starting again")
        if changes:
            directory.record_changes(step, changes, to_toml(ready.config, command_line()))
        return train_and_report(ready, directory, stop)


def _run_named(name: str) -> Path:
    """Return the run that --resume names; UserError where there is none."""
    from pdvit.tracking import newest

    if name != "auto":
        return Path(os.path.expanduser(name))
    runs = newest("run.toml")
    if not runs:
        raise UserError("there is no run here to go on with", "--resume auto", "name its folder, or start one")
    return runs[0]


def _finished(directory: "RunDirectory") -> dict[str, Any] | None:
    """Return the summary of a run that is finished."""
    if not all((directory.path / name).is_file() for name in ("status.json", "summary.json")):
        return None
    done = directory.read_json("status.json").get("status") == "finished"
    return directory.read_json("summary.json") if done else None
