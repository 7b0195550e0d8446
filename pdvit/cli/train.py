"""`pdvit train`, `pdvit finetune` and `pdvit segment`: one command with three sets of defaults."""

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Annotated, Any

import typer

from pdvit.cli.options import Layer, RunOptions, make_layers, merge_layers, settings_by_section, training_command
from pdvit.cli.runs import check_initial_weights, process_group, replay, resume, start, train_to_end
from pdvit.cli.sweep import run_sweep
from pdvit.config.load import SWEEP_SECTION, build, sections
from pdvit.config.schema import info_of
from pdvit.errors import UserError

# docs/finetune.md and docs/segment.md give the reasons.
FINETUNE: Layer = {
    "data": {"source": "digits:5-9"},
    "diversity": {"preset": "none"},
    "optim": {"epochs": "12"},
}
SEGMENT: Layer = {
    "data": {"source": "scenes"},
    "diversity": {"preset": "none"},
    "segment": {"head": "upernet"},
}
# Scenes are small and never repeat.
SCENES: Layer = {
    "data": {"batch_size": 8},
    "segment": {"jitter": (1.0, 1.0), "photometric": False},
    "optim": {"epochs": "1.25"},
}
SCENES_UPERNET: Layer = {"segment": {"width": 32, "aux": 0.0}}
SCENES_MODEL: Layer = {"model": {"depth": 4, "width": 96, "heads": 3, "patch_size": 8}, "optim": {"lr": 2e-3}}


@training_command
def train(**values: Any) -> int:
    """Train a vision transformer with the diversity terms.

    Without arguments: a small one on scikit-learn's handwritten digits, with all three terms, in under two minutes.
    """
    return launch("train", None, values)


@partial(training_command, defaults=FINETUNE)
def finetune(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="CKPT", help="Run directory, timm folder, weight file, or model of timm's hub."),
    ] = None,
    **values: Any,
) -> int:
    """Finetune a checkpoint: on other classes, images or resolutions.

    Without --data: on the digits 5 to 9, for a model that learned 0 to 4 (pdvit train --data digits:0-4).
    """
    return launch("finetune", checkpoint, values)


@partial(training_command, defaults=SEGMENT)
def segment(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="CKPT", help="Backbone: a run, timm folder, weight file, or model of timm's hub."),
    ] = None,
    **values: Any,
) -> int:
    """Train a vision transformer to label every pixel.

    Without arguments: a small one on scenes of handwritten digits, in a few minutes.
    """
    return launch("segment", checkpoint, values)


def launch(command: str, checkpoint: str | None, values: dict[str, Any]) -> int:
    """Start, resume or replay a run, or run a sweep; return the exit status. Raises UserError and RunFailed."""
    from pdvit.engine.terminal import stop_on_signals

    options = RunOptions(**{item.name: values.pop(item.name) for item in fields(RunOptions)})
    if checkpoint is not None:
        if values["model_init"] is not None:
            raise UserError("two checkpoints to start from", "CKPT, --init", "give one of them")
        values["model_init"] = checkpoint
    _check_options(options, values)
    with stop_on_signals() as stop, process_group():  # before the slow imports
        if options.replay is not None:
            return replay(options.replay, options.as_json)
        if options.resume is not None:
            run = resume(command, options.resume, options.change or [], options.as_json)
        else:
            layers = _layers(command, options, values)
            if options.config is not None and SWEEP_SECTION in dict(layers)[str(options.config)]:
                return run_sweep(command, options.config, layers, options.cells, options.as_json, stop)
            config = build(*layers)
            if options.cells is not None:
                tip = "name a --config with a [sweep] table: docs/sweep.md"
                raise UserError("only a sweep has cells", "--cells", tip)
            check_initial_weights(command, config)
            run = start(command, config, options.as_json, stop)
        return run if isinstance(run, int) else train_to_end(run, stop)


def _layers(command: str, options: RunOptions, values: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the layers of the configuration; those of `segment` depend on its data, head and model."""
    assign = options.assign or []
    defaults = {"train": {}, "finetune": FINETUNE, "segment": SEGMENT}[command]
    layers = make_layers(options.config, assign, values, defaults=defaults)
    if command != "segment":
        return layers
    config = build(*((name, {key: layer[key] for key in layer if key != SWEEP_SECTION}) for name, layer in layers))
    if config.data.source != "scenes":
        return layers
    of_scenes = [SEGMENT, SCENES]
    if config.segment.head == "upernet":
        of_scenes.append(SCENES_UPERNET)
    if config.model.init is None and config.model.name is None:
        of_scenes.append(SCENES_MODEL)
    return make_layers(options.config, assign, values, defaults=merge_layers(of_scenes))


def _check_options(options: RunOptions, values: Mapping[str, Any]) -> None:
    """Reject options that contradict each other."""
    if options.resume is not None and options.replay is not None:
        raise UserError("a run is either resumed or replayed", "--resume, --replay", "give one of them")
    if options.change and options.resume is None:
        raise UserError("only a resumed run can be changed", "--change", "add --resume RUN")
    if options.resume is None and options.replay is None:
        return
    flags = [
        info_of(item).flags[0]
        for section, keys in settings_by_section(values).items()
        for item in fields(sections()[section])
        if item.name in keys
    ]
    given = {"--set": options.assign, "--config": options.config, "--cells": options.cells}
    flags += [flag for flag, value in given.items() if value]
    if flags:
        where = f"--resume {options.resume}" if options.resume is not None else f"--replay {options.replay}"
        tip = "leave it out, change a setting with --change section.key=value, or start a new run"
        raise UserError(f"a run keeps its saved configuration, so {flags[0]} can't be given", where, tip)
