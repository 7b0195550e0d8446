"""Trackers beside metrics.jsonl: TensorBoard, Weights & Biases, trackio. All are optional, and none may cost a run.

Like every file of a run they are for one process: the one that writes metrics.jsonl.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pdvit.errors import UserError, closest
from pdvit.tracking.trackers import TensorBoard, Trackio, WandB

WHERE = "run.track (--track)"


class Sink(Protocol):
    """Something that takes numbers by step. Both methods may raise anything; `Sinks` catches it."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of one record."""

    def close(self) -> None:
        """Send what is still waiting."""


# By the name of the tracker, which is also that of its package and of our extra.
TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def numbers_of(kind: str, record: Mapping[str, Any], clock: Mapping[str, float] | None = None) -> dict[str, float]:
    """Flatten a record of metrics.jsonl to `kind/name`, one with layers to `kind/layer`, its clock to `time/name`.

    What is no finite number is left out, as is the step; the epoch stays with `train` only, as an axis to plot over.
    """
    position = {"step"} if kind == "train" else {"step", "epoch"}
    by_layer = "layers" in record
    values = zip(record["layers"], record[kind], strict=True) if by_layer else record.items()
    flat = {f"{kind}/{name}": value for name, value in values if by_layer or name not in position}
    flat |= {f"time/{name}": value for name, value in (clock or {}).items()}
    return {name: float(value) for name, value in flat.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def tracker_names(text: str | None) -> list[str]:
    """Read the trackers that `run.track` names, with commas between them."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def check_sinks(names: Iterable[str]) -> None:
    """Raise UserError for a tracker that is unknown, not installed, or asks for a login that nobody can type."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"there is no tracker '{name}'", WHERE, closest(name, TRACKERS))
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # no origin: just a folder of that name, such as W&B leaves behind
            raise UserError(f"{name} is not installed", WHERE, f"pip install 'pdvit[{name}]'")
        if name == "wandb":
            _check_login()


def _check_login() -> None:
    """Let W&B find its key, or ask for it where there is a terminal; the network is not used."""
    try:
        import wandb

        if wandb.setup().settings.mode not in ("offline", "dryrun", "disabled"):
            wandb.login(verify=False)
    except Exception as error:
        tip = "run `wandb login` once, set WANDB_API_KEY, or set WANDB_MODE=offline and send it later with `wandb sync`"
        raise UserError(f"W&B can't log in: {error}", WHERE, tip) from error


def open_sinks(
    names: Sequence[str],
    run: Path,
    config: Mapping[str, Any],
    step: int,
    warn: Callable[[str], None] | None = None,
) -> list[Sink]:
    """Open the trackers for a run directory that goes on from `step` (0: from its start).

    Raises UserError as `check_sinks` does. A tracker that does not start (network, disk) raises one too, or, where
    `warn` is given, is reported to it and left out: a run that is resumed should not wait for its tracker.
    """
    check_sinks(names)
    opened: list[Sink] = []
    for name in dict.fromkeys(names):
        try:
            opened.append(TRACKERS[name](run, config, step))
        except Exception as error:
            what = f"{name} does not start: {_one_line(error)}"
            if warn is None:
                Sinks(opened, warn=lambda _: None).close()
                raise UserError(what, WHERE, "leave it out: metrics.jsonl has every number") from error
            warn(f"{what}; the run goes on without it")
    return opened


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


class Sinks:
    """The trackers of one run. One that breaks is reported once to `warn` and left out; the run goes on."""

    def __init__(self, sinks: Iterable[Sink], warn: Callable[[str], None]) -> None:
        self.sinks, self.warn = list(sinks), warn

    def log(self, kind: str, step: int, record: Mapping[str, Any], clock: Mapping[str, float] | None = None) -> None:
        """Hand on a record of metrics.jsonl, as it is given to `RunDirectory.append`."""
        self._each(lambda sink: sink.log(step, numbers_of(kind, record, clock)))

    def close(self) -> None:
        """Close all; a second call does nothing."""
        self._each(lambda sink: sink.close())
        self.sinks = []

    def _each(self, action: Callable[[Sink], None]) -> None:
        for sink in list(self.sinks):
            try:
                action(sink)
            except Exception as error:
                self.sinks.remove(sink)
                what = f"{type(sink).__name__} broke ({_one_line(error)})"
                self.warn(f"{what}; the run goes on without it, metrics.jsonl has every number")
