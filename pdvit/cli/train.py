"""`pdvit train`."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pdvit.cli.settings import given_flags, make_config, with_settings
from pdvit.config.schema import Config
from pdvit.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from pdvit.engine.interrupts import StopRequest
    from pdvit.tracking import RunDirectory


@with_settings
def train(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A TOML file with any keys.")] = None,
    assign: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value; wins over everything; repeatable.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with this run directory, as it was configured.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON and nothing else.")] = False,
    **settings: Any,
) -> int:
    """Train a vision transformer with the diversity terms.

    Without arguments: a small one on scikit-learn's handwritten digits, with all three terms, in under two minutes.
    """
    from pdvit.engine.interrupts import stop_on_signals

    with stop_on_signals() as stop:  # before anything slow is imported
        if resume is not None:
            return _train(_as_configured(resume, settings, assign, config), resume, as_json, stop)
        return _train(make_config(config, assign or [], settings), None, as_json, stop)


def _as_configured(resume: Path, settings: dict[str, Any], assign: list[str] | None, config: Path | None) -> Config:
    """Read the configuration of a run that is taken up again; UserError where other settings are given too."""
    from pdvit.tracking import RunDirectory

    given = given_flags(settings) + (["--set"] if assign else []) + (["--config"] if config else [])
    if given:
        raise UserError(
            f"a resumed run keeps its configuration, so {given[0]} can't be given",
            f"--resume {resume}",
            "leave it out, or start a new run without --resume",
        )
    return make_config(RunDirectory.open(resume).path / "run.toml", [], {})


def _train(config: Config, resume: Path | None, as_json: bool, stop: "StopRequest") -> int:
    """Build, train and report; raises UserError before there is a run directory wherever that is possible."""
    from pdvit.config import resolve
    from pdvit.data.sources import open_source
    from pdvit.engine.device import choose_device, device_name
    from pdvit.engine.display import RunConsole
    from pdvit.engine.interrupts import EXIT_STOPPED
    from pdvit.engine.loop import Trainer
    from pdvit.tasks import ClassificationTask
    from pdvit.tracking import RunDirectory

    console = RunConsole(stderr=as_json)
    config = resolve(config)
    if resume is not None and (summary := _finished(RunDirectory.open(resume))):
        console.print(f"{resume} is finished already", highlight=False, markup=False, soft_wrap=True)
        return _close(RunDirectory.open(resume), summary, console, as_json)
    device = choose_device(config.run.device)
    source = open_source(config.data)
    if os.path.isdir(config.data.source):  # so that the run can be resumed and analyzed from anywhere
        config = replace(config, data=replace(config.data, source=os.path.abspath(config.data.source)))
    task = ClassificationTask(config, source, device)
    trainer = Trainer(task, config, device)
    if stop and resume is None:
        console.print("stopped before the first step; nothing was written", highlight=False)
        return EXIT_STOPPED
    if resume is not None:
        directory = RunDirectory.open(resume)
        trainer.restore(directory)
    else:
        directory = _new_directory(config, device_name(device))
    parameters = sum(weight.numel() for weight in task.module.model.parameters())
    console.print(
        f"{source.describe()}\n{config.model.name}: {parameters:,} parameters, "
        f"{task.preprocessing.size}x{task.preprocessing.size} pixels, patches of {task.mixing.patch_size}\n"
        f"{_weights(config)}; {trainer.plan.steps} steps of {task.batch_size} images on {device_name(device)}\n"
        f"run directory: {directory.path}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    again = f"pdvit train --resume {directory.path}"
    try:
        summary = trainer.run(directory, console, stop)
    except UserError as error:
        raise UserError(error.what, error.where, f"{error.tip}; go on with: {again}") from error
    if summary is None:
        console.print(f"stopped; go on with: {again}", highlight=False, markup=False, soft_wrap=True)
        return EXIT_STOPPED
    return _close(directory, summary, console, as_json)


def _new_directory(config: Config, device: str) -> "RunDirectory":
    """Make the run directory and write what is known before the first step."""
    from pdvit.config import to_toml
    from pdvit.data.sources import source_label
    from pdvit.tracking import RunDirectory, command_line, describe_environment

    name = config.run.name
    if name is None:
        name = f"{source_label(config.data)}-{config.diversity.preset}"
    text = to_toml(config, command_line())
    directory = RunDirectory.create(config.run.out, name)
    directory.write("run.toml", text)
    directory.write_json("environment.json", describe_environment(device))
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


def _close(directory: "RunDirectory", summary: dict[str, Any], console: "Console", as_json: bool) -> int:
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
    console.print(
        f"\n{summary['split']} accuracy {summary['accuracy']:.1%}, loss {summary['loss']:.3f}; "
        f"P of the patches: first {summary['similarity_first']:.2f}, last {summary['similarity_last']:.2f} "
        f"(0 all different, 1 all alike)\n"
        f"{summary['epochs']:g} epochs in {summary['seconds']:.0f} s, "
        f"{summary['images_per_second']:,.0f} images per second\n"
        f"weights   {path}/model.safetensors (timm: create_model('local-dir:{path}', pretrained=True))\n"
        f"records   {path}/metrics.jsonl, summary.json; repeat with --config {path}/run.toml\n"
        f"next      pdvit analyze {compared}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0
