"""Trackers beside metrics.jsonl: TensorBoard, Weights & Biases, and trackio, which has the interface of W&B."""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from secrets import token_hex
from typing import Any

from pdvit.errors import UserError, closest
from pdvit.tracking.run_directory import write_file

WHERE = "run.track (--track)"
# The display needs a console that W&B does not capture. What is not sent in a minute stays there, for `wandb sync`.
WANDB_SETTINGS = {"console": "off", "finish_timeout": 60.0}


class TensorBoard:
    """Event files in RUN/tensorboard. Readers drop what an earlier attempt wrote after `step`."""

    def __init__(self, _: str, run: Path, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self.finish = self.writer.close

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one record."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a killed run resumes from its checkpoint, so nothing before that may be missing


class WandB:
    """A W&B or trackio run. RUN/PACKAGE.json has its id and the last step sent: a resumed run sends no step twice."""

    def __init__(self, package: str, run: Path, config: Mapping[str, Any], _: int) -> None:
        self.file, self.id, self.sent = run / f"{package}.json", token_hex(8), -1
        if self.file.is_file():
            self.id, self.sent = json.loads(self.file.read_text()).values()
        self._save(self.sent)  # now: a run that is killed before its first record goes on under the same id
        module, project = importlib.import_module(package), os.environ.get(f"{package.upper()}_PROJECT", "pdvit")
        options: dict[str, Any] = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        if package == "wandb":
            options = {"id": self.id, "resume": "allow", "dir": str(run), "settings": WANDB_SETTINGS}
        self.run = module.init(project, name=run.resolve().name, config=dict(config), **options)
        self.finish = module.finish
        if package == "trackio":  # it resumes by name, which other run directories may have too
            self.run.id = self.id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one record, unless an earlier attempt at this step did."""
        if step > self.sent:
            self.run.log(dict(metrics), step=step)
            self._save(step)

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
        if getattr(find_spec(name), "origin", None) is None:  # W&B leaves a folder of that name, which has no origin
            raise UserError(f"{name} is not installed", WHERE, f"pip install 'pdvit[{name}]'")
    if "wandb" in names:
        try:
            importlib.import_module("wandb").login(verify=False)  # finds its key, or asks for it on a terminal
        except Exception as error:
            raise UserError(
                f"W&B can't log in: {error}", WHERE, "run `wandb login`, or set WANDB_MODE=offline"
            ) from error
    return names


class Trackers:
    """The trackers of a run. One that fails is reported to `warn` once and left out; the run continues."""

    def __init__(self, run: Path, config: Mapping[str, Any], step: int, warn: Callable[[str], None]) -> None:
        self.warn, self.running = warn, dict[str, TensorBoard | WandB]()
        for name in tracker_names(config["run"]["track"]):
            with self._report_failure(name):
                self.running[name] = TRACKERS[name](name, run, config, step)

    def log(self, record_type: str, record: Mapping[str, Any], timing: Mapping[str, float] | None = None) -> None:
        """Send the finite numbers of a record of metrics.jsonl as `type/name`, `type/layer` or `time/name`."""
        pairs = zip(record["layers"], record[record_type], strict=True) if "layers" in record else record.items()
        named = {f"{record_type}/{name}": value for name, value in pairs if name != "step"}
        named |= {f"time/{name}": value for name, value in (timing or {}).items()}
        numbers = {name: float(value) for name, value in named.items() if isinstance(value, int | float)}
        for name, tracker in list(self.running.items()):
            with self._report_failure(name):
                tracker.log(record["step"], {key: value for key, value in numbers.items() if isfinite(value)})

    def close(self) -> None:
        """Finish all; a second call does nothing."""
        while self.running:
            name, tracker = self.running.popitem()
            with self._report_failure(name):
                tracker.finish()

    @contextmanager
    def _report_failure(self, name: str) -> Iterator[None]:
        try:
            with redirect_stdout(sys.stderr):  # standard output is for the summary
                yield
        except Exception as error:
            self.running.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.warn(f"{name} failed ({reason}); the run continues without it, see metrics.jsonl")
