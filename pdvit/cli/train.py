"""`pdvit train`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pdvit.cli.runs.command import Command
from pdvit.cli.runs.replay import replay as run_replay
from pdvit.cli.runs.resume import resume as run_resume
from pdvit.cli.runs.start import start
from pdvit.cli.runs.together import together
from pdvit.cli.settings import given_flags, make_config, with_settings
from pdvit.config.presets import TERMS
from pdvit.config.schema import AugmentConfig, Config
from pdvit.errors import UserError

if TYPE_CHECKING:
    import torch

    from pdvit.data.sources import Source
    from pdvit.engine.ranks import Ranks
    from pdvit.tasks import ClassificationTask


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
    with stop_on_signals() as stop, together():  # before anything slow is imported
        if replay is not None:
            return run_replay(TRAIN, replay, as_json)
        if resume is not None:
            return run_resume(TRAIN, resume, change or [], as_json, stop)
        return start(TRAIN, make_config(config, assign or [], settings), as_json, stop)


def _make_task(config: Config, source: "Source", device: "torch.device", ranks: "Ranks") -> "ClassificationTask":
    from pdvit.tasks import ClassificationTask

    return ClassificationTask(config, source, device, ranks)


def _describe(config: Config, task: "ClassificationTask") -> str:
    """Say what is trained: the model, the size of its images and patches, and what is added to the class loss."""
    diversity, size = config.diversity, task.preprocessing.size
    parameters = sum(weight.numel() for weight in task.module.model.parameters())
    weights = {name: getattr(diversity, name) for name in TERMS}
    terms = ", ".join(f"{name} {weight:g}" for name, weight in weights.items() if weight) or "none"
    terms += f" ({diversity.variant})" if diversity.variant != "paper" and terms != "none" else ""
    courses = {name: getattr(diversity, f"{name}_schedule") for name, weight in weights.items() if weight}
    terms += "".join(f", {name} {course}" for name, course in courses.items() if course != "constant")
    model = f"{config.model.name}: {parameters:,} parameters, {size}x{size} pixels, patches of {task.mixing.patch_size}"
    return f"{model}\nterms: {terms}; {_mixes(config.augment)}; augmentation: {task.augmentation.describe()}"


def _mixes(augment: AugmentConfig) -> str:
    """Say which share of the batches is mixed, and how."""
    switch = augment.mixup_switch_prob if augment.cutmix and augment.mixup else 1.0
    shares = {"patch CutMix": switch if augment.cutmix else 0.0, "Mixup": 1 - switch if augment.cutmix else 1.0}
    shares["Mixup"] *= bool(augment.mixup)
    parts = [f"{name} on {share * augment.mixup_prob:.0%} of batches" for name, share in shares.items() if share]
    return " and ".join(parts) or "no CutMix"


def _conclude(summary: Mapping[str, Any]) -> str:
    """Say how well the images are told apart, and P of first and last."""
    return (
        f"{summary['split']} accuracy {summary['accuracy']:.1%}, loss {summary['loss']:.3f}; "
        f"P of the patches: first {summary['similarity_first']:.2f}, last {summary['similarity_last']:.2f} "
        f"(0 all different, 1 all alike)"
    )


TRAIN = Command("train", _make_task, _describe, _conclude)
