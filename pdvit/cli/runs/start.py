"""Beginning a new run, or the one that this very command began before torchrun started its processes again."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pdvit.cli.runs.command import Command
from pdvit.cli.runs.prepare import Prepared, prepare
from pdvit.cli.runs.report import say, train_and_report
from pdvit.config.schema import Config
from pdvit.data.kinds import list_kinds
from pdvit.errors import UserError

if TYPE_CHECKING:
    from pdvit.engine.interrupts import StopRequest
    from pdvit.tracking import RunDirectory


def start(command: Command, config: Config, as_json: bool, stop: "StopRequest") -> int:
    """Begin a new run; raises UserError before there is a run directory wherever that is possible.

    The source `help` lists the kinds of sources instead.
    """
    if config.data.source == "help":
        print(list_kinds())
        return 0
    ready = prepare(command, config, as_json)
    ready.load()
    from pdvit.engine.interrupts import EXIT_STOPPED
    from pdvit.tracking import RunDirectory

    if any(ready.ranks.all_gather(bool(stop))):
        say(ready.console, "stopped before the first step; nothing was written")
        return EXIT_STOPPED
    begun = ready.ranks.broadcast(_begun_before_restart(ready.config) if ready.ranks.main else None)
    directory = RunDirectory(begun or _shared_directory(ready), ready.ranks.main)
    if begun and (begun / "status.json").is_file() and directory.read_json("status.json").get("status") == "stopped":
        return EXIT_STOPPED  # on purpose: torchrun's restart must not undo it
    with directory.locked():
        if begun:
            for note in ready.trainer.restore(directory, directory.changes()):
                say(ready.console, note)
        return train_and_report(ready, directory, stop)


def _shared_directory(ready: Prepared) -> Path:
    """Let the main process make the run directory, and tell the others; where it can't, all end with its error."""
    made: Path | UserError | None = None
    if ready.ranks.main:
        try:
            made = _new_directory(ready.config, ready.device).path
        except UserError as error:
            made = error
    shared = ready.ranks.broadcast(made)
    if isinstance(shared, UserError):
        raise shared
    assert isinstance(shared, Path)
    return shared


def _new_directory(config: Config, device: str) -> "RunDirectory":
    """Make the run directory and write what is known before the first step."""
    import torch

    from pdvit.config import to_toml
    from pdvit.data.sources import source_label
    from pdvit.engine.distributed import launch
    from pdvit.tracking import RunDirectory, command_line, describe_environment

    name = config.run.name
    if name is None:
        begun_from = None if config.model.init is None else f"from-{_label(config.model.init)}"
        name = f"{source_label(config.data)}-{begun_from or config.diversity.preset}"
    text = to_toml(config, command_line())
    directory = RunDirectory.create(config.run.out, name)
    directory.write("run.toml", text)
    facts = {"threads": torch.get_num_threads(), "launch": launch()[0]}
    directory.write_json("environment.json", describe_environment(device) | facts)
    return directory


def _label(init: str) -> str:
    """Return a short name of the initial weights, fit for a run's name."""
    from pdvit.data.sources import as_file_name
    from pdvit.models.checkpoints import name_of

    return as_file_name(name_of(Path(init)) if os.path.exists(init) else init.rpartition("/")[2])


def _begun_before_restart(config: Config) -> Path | None:
    """Return the run that this command began before torchrun started its processes again."""
    from pdvit.engine.distributed import launch
    from pdvit.tracking import RunDirectory, newest

    name, restarts = launch()
    if not (name and restarts):
        return None
    places = [Path(os.path.expanduser(config.run.out))] if config.run.out else newest("environment.json")
    for path in places:
        whole = (path / "environment.json").is_file() and (path / "run.toml").is_file()
        if whole and RunDirectory(path).read_json("environment.json").get("launch") == name:
            return path
    return None
