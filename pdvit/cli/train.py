"""`pdvit train`."""

import json
import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pdvit.cli.settings import given_flags, make_config, with_settings
from pdvit.config.schema import Config
from pdvit.errors import UserError

if TYPE_CHECKING:
    import torch

    from pdvit.data.sources import Source
    from pdvit.engine.display import RunConsole
    from pdvit.engine.interrupts import StopRequest
    from pdvit.engine.loop import Trainer
    from pdvit.engine.ranks import Ranks
    from pdvit.tasks import ClassificationTask
    from pdvit.tracking import RunDirectory


@with_settings
def train(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A TOML file with any keys.")] = None,
    assign: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value; wins over everything; repeatable.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", help="Go on with this run directory, as it was configured; auto: the newest."),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--change", help="section.key=value: go on with another setting; with --resume; repeatable."),
    ] = None,
    replay: Annotated[
        Path | None, typer.Option("--replay", help="Run the step again at which this run broke down, and say where.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON and nothing else.")] = False,
    **settings: Any,
) -> int:
    """Train a vision transformer with the diversity terms.

    Without arguments: a small one on scikit-learn's handwritten digits, with all three terms, in under two minutes.
    """
    from pdvit.engine.interrupts import stop_on_signals

    if resume is not None and replay is not None:
        raise UserError("a run is either resumed or replayed", "--resume, --replay", "give one of them")
    again = f"--resume {resume}" if resume is not None else f"--replay {replay}" if replay is not None else None
    given = given_flags(settings) + (["--set"] if assign else []) + (["--config"] if config else [])
    if again is not None and given:
        raise UserError(
            f"a run that is taken up keeps its configuration, so {given[0]} can't be given",
            again,
            "leave it out, change a setting with --change section.key=value, or start a new run",
        )
    if change and resume is None:
        raise UserError("only a run that is resumed can be changed", "--change", "add --resume RUN")
    with stop_on_signals() as stop:  # before anything slow is imported
        try:
            if replay is not None:
                return _replay(replay, as_json)
            if resume is not None:
                return _resume(_run_named(resume), change or [], as_json, stop)
            return _start(make_config(config, assign or [], settings), as_json, stop)
        finally:
            if "pdvit.engine.ranks" in sys.modules:
                sys.modules["pdvit.engine.ranks"].leave()


@dataclass(frozen=True)
class _Prepared:
    """Everything that a run needs, before it has a directory."""

    config: Config
    ranks: "Ranks"
    device: str
    task: "ClassificationTask"
    trainer: "Trainer"
    console: "RunConsole"


def _prepare(config: Config, as_json: bool) -> _Prepared:
    """Open the data, build model and trainer; raises UserError."""
    from pdvit.config import resolve
    from pdvit.data.sources import open_source
    from pdvit.engine.device import choose_device, device_name, set_up
    from pdvit.engine.display import RunConsole
    from pdvit.engine.loop import Trainer
    from pdvit.engine.ranks import join
    from pdvit.tasks import ClassificationTask
    from pdvit.tracking import check_sinks, tracker_names

    config = resolve(config) if config.data.batch_size else config
    ranks = join()
    console = RunConsole(stderr=as_json, quiet=not ranks.main)
    device = choose_device(config.run.device, ranks.local if ranks.size > 1 else None)
    set_up(device, config.run)
    if ranks.main:
        check_sinks(tracker_names(config.run.track))
    source = open_source(config.data)
    if not config.data.batch_size:
        size = _batch_that_fits(config, source, device, ranks)
        config = resolve(replace(config, data=replace(config.data, batch_size=size)))
    if os.path.isdir(config.data.source):  # so that the run can be resumed and analyzed from anywhere
        config = replace(config, data=replace(config.data, source=os.path.abspath(config.data.source)))
    task = ClassificationTask(config, source, device, ranks)
    trainer = Trainer(task, config, device, ranks)
    parameters = sum(weight.numel() for weight in task.module.model.parameters())
    processes = f" x {ranks.size} processes" if ranks.size > 1 else ""
    say(
        console,
        f"{source.describe()}\n{config.model.name}: {parameters:,} parameters, "
        f"{task.preprocessing.size}x{task.preprocessing.size} pixels, patches of {task.mixing.patch_size}\n"
        f"{_weights(config)}; {trainer.plan.steps} steps of {task.batch_size} images on "
        f"{device_name(device)}{processes}",
    )
    for note in trainer.notes():
        say(console, note)
    return _Prepared(config, ranks, device_name(device), task, trainer, console)


def _batch_that_fits(config: Config, source: "Source", device: "torch.device", ranks: "Ranks") -> int:
    """Find the largest total batch, a power of two or all images, that the GPUs hold; raises UserError without one."""
    from pdvit.config import resolve
    from pdvit.engine.loop import Trainer
    from pdvit.engine.memory import largest_batch
    from pdvit.engine.ranks import ALONE
    from pdvit.tasks import ClassificationTask

    if device.type == "cpu":
        what = "auto needs a GPU: a CPU that runs out of memory gives no error that can be caught"
        raise UserError(what, "data.batch_size (--batch-size)", "give a number, for example 64")
    trial = replace(
        config,
        data=replace(config.data, batch_size=1, micro_batch=None),
        optim=replace(config.optim, lr=config.optim.lr or 1e-3),  # else it would follow the batch of one
        run=replace(config.run, distribute="ddp"),
    )
    trial = resolve(trial)
    # Each process by itself: trials that exchange gradients would wait for one another.
    task = ClassificationTask(trial, source, device)
    images = len(source.splits["train"]) // ranks.size
    size = largest_batch(Trainer(task, trial, device, ALONE).updater, task.batches(0), images)
    size = int(min(ranks.gather(size))) * ranks.size
    if not size:
        raise UserError("not even one image fits", "data.batch_size (--batch-size)", "use a smaller model or image")
    return size


def _start(config: Config, as_json: bool, stop: "StopRequest") -> int:
    """Begin a new run; raises UserError before there is a run directory wherever that is possible."""
    from pdvit.engine.interrupts import EXIT_STOPPED
    from pdvit.tracking import RunDirectory

    ready = _prepare(config, as_json)
    if any(ready.ranks.gather(bool(stop))):
        say(ready.console, "stopped before the first step; nothing was written")
        return EXIT_STOPPED
    begun = ready.ranks.share(_begun_before_restart(ready.config) if ready.ranks.main else None)
    directory = RunDirectory(begun or _shared_directory(ready), ready.ranks.main)
    if begun and (begun / "status.json").is_file() and directory.read_json("status.json").get("status") == "stopped":
        return EXIT_STOPPED  # on purpose: torchrun's restart must not undo it
    with directory.locked():
        if begun:
            ready.trainer.restore(directory, directory.changes())
        return _run(ready, directory, as_json, stop)


def _shared_directory(ready: _Prepared) -> Path:
    """Let the main process make the run directory, and tell the others; where it can't, it says why and all end."""
    made: Path | UserError | None = None
    if ready.ranks.main:
        try:
            made = _new_directory(ready.config, ready.device).path
        except UserError as error:
            made = error
    shared = ready.ranks.share(made)
    if isinstance(shared, UserError):
        if ready.ranks.main:
            raise shared
        raise typer.Exit(2)
    assert isinstance(shared, Path)
    return shared


def _begun_before_restart(config: Config) -> Path | None:
    """Return the run that this command began before torchrun started its processes again."""
    from pdvit.engine.ranks import launch
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


def _resume(path: Path, change: list[str], as_json: bool, stop: "StopRequest") -> int:
    """Go on with a run; raises UserError where it can't be taken up."""
    from pdvit.config import to_dict, to_toml
    from pdvit.engine.display import RunConsole
    from pdvit.engine.recipe import changed_keys, check_changes
    from pdvit.tracking import RunDirectory, command_line

    directory = RunDirectory.open(path)
    if summary := _finished(directory):
        if change:
            raise UserError("the run is finished, so nothing can change", f"--resume {path}", "start a new run")
        console = RunConsole(stderr=as_json)
        say(console, f"{path} is finished already")
        return _close(directory, summary, console, as_json)
    for text in change:
        if text.partition("=")[0].strip() in ("run.out", "run.name"):
            raise UserError("a run stays where it is", f"--change {text}", "move its folder instead")
    config = make_config(path / "run.toml", change, {})
    ready = _prepare(config, as_json)
    directory = RunDirectory.open(path, ready.ranks.main)
    with directory.locked():
        changes = changed_keys(to_dict(make_config(path / "run.toml", [], {})), to_dict(ready.config))
        check_changes(changes, f"--resume {path} --change")
        ready.trainer.restore(directory, directory.changes() | {key: new for key, (_, new) in changes.items()})
        progress = ready.trainer.state.progress
        done = f"going on after step {progress.step}" if progress.step else "no checkpoint yet: starting again"
        say(ready.console, done)
        if changes:
            directory.record_changes(progress.step, changes, to_toml(ready.config, command_line()))
        return _run(ready, directory, as_json, stop)


def _replay(path: Path, as_json: bool) -> int:
    """Run the step again at which a run broke down, and say what is not finite."""
    from pdvit.engine.replay import replay
    from pdvit.tracking import RunDirectory

    config = make_config(RunDirectory.open(path).path / "run.toml", [], {})
    config = replace(config, run=replace(config.run, distribute="ddp", track=None))  # in this process alone
    ready = _prepare(config, as_json)
    found = replay(path, ready.trainer.state, ready.trainer.updater)
    metrics = {name: value if abs(value) < float("inf") else None for name, value in found.metrics.items()}
    if as_json:
        print(json.dumps({"step": found.step, "metrics": metrics, "broken": found.broken}, indent=2))
        return 0
    say(ready.console, f"step {found.step} again:")
    for name, value in metrics.items():
        say(ready.console, f"  {name:12} {'not finite' if value is None else f'{value:.6g}'}")
    shown = ", ".join(found.broken[:5]) + (f" and {len(found.broken) - 5} more" if len(found.broken) > 5 else "")
    say(ready.console, f"gradients that are not finite: {shown or 'none'}")
    return 0


def _run(ready: _Prepared, directory: "RunDirectory", as_json: bool, stop: "StopRequest") -> int:
    """Train and report."""
    from pdvit.engine.interrupts import EXIT_STOPPED

    say(ready.console, f"run directory: {directory.path}")
    again = f"pdvit train --resume {shlex.quote(str(directory.path))}"
    try:
        summary = ready.trainer.run(directory, ready.console, stop)
    except UserError as error:
        raise UserError(error.what, error.where, f"{error.tip}; go on with: {again}") from error
    if summary is None:
        say(ready.console, f"stopped; go on with: {again}")
        return EXIT_STOPPED
    return _close(directory, summary, ready.console, as_json) if ready.ranks.main else 0


def say(console: "RunConsole", text: str) -> None:
    """Print plain text as it is."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _run_named(name: str) -> Path:
    """Return the run that --resume names; UserError where there is none."""
    from pdvit.tracking import newest

    if name != "auto":
        return Path(os.path.expanduser(name))
    runs = newest("run.toml")
    if not runs:
        raise UserError("there is no run here to go on with", "--resume auto", "name its folder, or start one")
    return runs[0]


def _new_directory(config: Config, device: str) -> "RunDirectory":
    """Make the run directory and write what is known before the first step."""
    from pdvit.config import to_toml
    from pdvit.data.sources import source_label
    from pdvit.engine.ranks import launch
    from pdvit.tracking import RunDirectory, command_line, describe_environment

    name = config.run.name
    if name is None:
        name = f"{source_label(config.data)}-{config.diversity.preset}"
    text = to_toml(config, command_line())
    directory = RunDirectory.create(config.run.out, name)
    directory.write("run.toml", text)
    directory.write_json("environment.json", describe_environment(device) | {"launch": launch()[0]})
    return directory


def _weights(config: Config) -> str:
    diversity, cutmix = config.diversity, config.augment.cutmix
    parts = [
        f"{name} {weight:g}" for name in ("cosine", "contrastive", "mixing") if (weight := getattr(diversity, name))
    ]
    mixes = f"patch CutMix on {config.augment.mixup_prob:.0%} of batches" if cutmix else "no CutMix"
    return f"terms: {', '.join(parts) or 'none'}; {mixes}"


def _finished(directory: "RunDirectory") -> dict[str, Any] | None:
    """Return the summary of a run that is finished."""
    if not all((directory.path / name).is_file() for name in ("status.json", "summary.json")):
        return None
    done = directory.read_json("status.json").get("status") == "finished"
    return directory.read_json("summary.json") if done else None


def _source(run: Path) -> object:
    """Return where a run's images came from: runs on other images are not compared."""
    from pdvit.config import read_toml

    try:
        return read_toml(run / "run.toml").get("data", {}).get("source")
    except UserError:
        return None


def _close(directory: "RunDirectory", summary: dict[str, Any], console: "RunConsole", as_json: bool) -> int:
    """Say what came out, what was written where, and which command comes next."""
    if as_json:
        print(json.dumps(summary, indent=2))
        return 0
    from pdvit.tracking import newest

    path = directory.path
    others = [
        run for run in newest("summary.json") if run.resolve() != path.resolve() and _source(run) == _source(path)
    ]
    compared = " ".join(str(run) for run in [*others[:1], path])
    say(
        console,
        f"\n{summary['split']} accuracy {summary['accuracy']:.1%}, loss {summary['loss']:.3f}; "
        f"P of the patches: first {summary['similarity_first']:.2f}, last {summary['similarity_last']:.2f} "
        f"(0 all different, 1 all alike)\n"
        f"{summary['epochs']:g} epochs in {summary['seconds']:.0f} s, "
        f"{summary['images_per_second']:,.0f} images per second\n"
        f"weights   {path}/model.safetensors (timm: create_model('local-dir:{path}', pretrained=True))\n"
        f"records   {path}/metrics.jsonl, summary.json; repeat with --config {path}/run.toml\n"
        f"next      pdvit analyze {compared}",
    )
    return 0
