"""Trackers beside metrics.jsonl: TensorBoard, Weights & Biases, and trackio, which has the interface of W&B."""

import importlib
import json
import math
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pdvit.errors import UserError, closest
from pdvit.tracking.run_directory import write_file

WHERE = "run.track (--track)"
PROJECT = "pdvit"
FINISH_SECONDS = 60.0  # the rest of W&B's records stays on the disk, for `wandb sync`


class TensorBoard:
    """Event files in RUN/tensorboard. Readers drop what an earlier attempt wrote after `step`."""

    def __init__(self, _: str, run: Path, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one record."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a killed run resumes from its checkpoint, so nothing before that may be missing

    def finish(self) -> None:
        """Close the file."""
        self.writer.close()


class WandB:
    """A W&B or trackio run, with its id and the last step sent in RUN/PACKAGE.json.

    Neither can go back. A resumed run repeats the steps after its checkpoint; those that were sent are not sent again.
    """

    def __init__(self, package: str, run: Path, config: Mapping[str, Any], _: int) -> None:
        self.file, self.id, self.sent = run / f"{package}.json", secrets.token_hex(8), -1
        with suppress(OSError, ValueError, LookupError, TypeError):  # if it is damaged, a new run starts there
            known = json.loads(self.file.read_text(encoding="utf-8"))
            self.id, self.sent = str(known["id"]), int(known["step"])
        self._save(self.sent)
        self.module = importlib.import_module(package)
        project, name = os.environ.get("WANDB_PROJECT", PROJECT), run.resolve().name
        with redirect_stdout(sys.stderr):  # standard output is for the summary
            if package == "wandb":
                # W&B must not capture the console: the display would no longer see a terminal.
                settings = self.module.Settings(console="off", finish_timeout=FINISH_SECONDS)
                options = {"id": self.id, "resume": "allow", "reinit": "finish_previous", "dir": str(run)}
                self.run = self.module.init(project, name=name, config=dict(config), settings=settings, **options)
            else:
                quiet = dict.fromkeys(("embed", "auto_log_gpu", "auto_log_cpu"), False)
                self.run = self.module.init(PROJECT, name=name, config=dict(config), **quiet)
                self.run.id = self.id  # trackio resumes by name, which other run directories may have too

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one record, unless an earlier attempt at this step did."""
        if step > self.sent:
            self.run.log(dict(metrics), step=step)
            self._save(step)

    def finish(self) -> None:
        """Send what is left."""
        with redirect_stdout(sys.stderr):
            self.module.finish()

    def _save(self, step: int) -> None:
        write_file(self.file, json.dumps({"id": self.id, "step": step}))


# By the name of their package, which is also the name of our extra.
TRACKERS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": WandB}


def tracker_names(text: str) -> list[str]:
    """Split the names in `run.track`; raises UserError for one that is unknown, not installed or not logged in."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"there is no tracker '{name}'", WHERE, closest(name, TRACKERS))
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # no origin: just a folder of that name, such as W&B leaves behind
            raise UserError(f"{name} is not installed", WHERE, f"pip install 'pdvit[{name}]'")
        if name == "wandb":
            _check_login()
    return names


def _check_login() -> None:
    """Let W&B find its key, or ask for it on a terminal; it does not use the network."""
    try:
        wandb = importlib.import_module("wandb")
        if wandb.setup().settings.mode not in ("offline", "dryrun", "disabled"):
            wandb.login(verify=False)
    except Exception as error:
        tip = "run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline and send it later with `wandb sync`"
        raise UserError(f"W&B can't log in: {error}", WHERE, tip) from error


class Trackers:
    """The trackers of a run. One that fails is reported to `warn` once and left out; the run continues."""

    def __init__(
        self, names: Iterable[str], run: Path, config: Mapping[str, Any], step: int, warn: Callable[[str], None]
    ) -> None:
        """Start them at `step`; raises UserError if one does not start in a new run."""
        self.warn, self.running = warn, dict[str, Any]()
        for name in names:
            try:
                self.running[name] = TRACKERS[name](name, run, config, step)
            except Exception as error:
                what = f"{name} does not start: {_describe(error)}"
                if not step:
                    self.close()
                    raise UserError(what, WHERE, "leave it out: metrics.jsonl has every number") from error
                self.warn(f"{what}; the run continues without it")

    def log(self, record_type: str, record: Mapping[str, Any], timing: Mapping[str, float] | None = None) -> None:
        """Send a record of metrics.jsonl."""
        self._each(lambda tracker: tracker.log(record["step"], flatten(record_type, record, timing)))

    def close(self) -> None:
        """Finish all; a second call does nothing."""
        self._each(lambda tracker: tracker.finish())
        self.running = {}

    def _each(self, action: Callable[[Any], None]) -> None:
        for name, tracker in list(self.running.items()):
            try:
                action(tracker)
            except Exception as error:
                del self.running[name]
                self.warn(f"{name} failed ({_describe(error)}); the run continues without it, see metrics.jsonl")


def flatten(record_type: str, record: Mapping[str, Any], timing: Mapping[str, float] | None) -> dict[str, float]:
    """Return the finite numbers of a record as `type/name`, `type/layer` or `time/name`, without the step.

    The epoch stays in `train` only, as an axis to plot over.
    """
    if "layers" in record:
        record = dict(zip(record["layers"], record[record_type], strict=True))
    flat = {f"{record_type}/{name}": value for name, value in record.items()}
    flat |= {f"time/{name}": value for name, value in (timing or {}).items()}
    return {
        name: float(value)
        for name, value in flat.items()
        if isinstance(value, int | float) and math.isfinite(value) and not name.endswith("/step")
        if name == "train/epoch" or not name.endswith("/epoch")
    }


def _describe(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
