"""Trackers beside metrics.jsonl: TensorBoard, Weights & Biases, and trackio, which has the interface of W&B."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress
from math import isfinite
from pathlib import Path
from typing import Any

from pdvit.errors import UserError, closest
from pdvit.files import reading
from pdvit.tracking.run_directory import write_file

Tracker = tuple[Callable[[dict[str, float], int], None], Callable[[], None]]  # log metrics of a step; finish


def start_tensorboard(_: str, run: Path, config: Mapping[str, Any], step: int) -> Tracker:
    """Write event files to RUN/tensorboard. Readers drop what an earlier attempt wrote after `step`."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # a killed run resumes from its checkpoint, so nothing before that may be missing

    return log, writer.close


def start_wandb(package: str, run: Path, config: Mapping[str, Any], _: int) -> Tracker:
    """Start a W&B or trackio run. RUN/PACKAGE.json has its id and last step: a resumed run sends no step twice."""
    file, sent = run / f"{package}.json", dict[str, Any](id=os.urandom(8).hex(), step=-1)
    with suppress(OSError, ValueError, TypeError):  # if it is damaged, a new run is better than none
        sent |= json.loads(file.read_text())
    write_file(file, json.dumps(sent))  # now: a run that is killed before its first record keeps its id
    options: dict[str, Any] = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
    if package == "wandb":  # The display needs the console. What is not sent in a minute stays, for `wandb sync`.
        options = {"id": sent["id"], "resume": "allow", "dir": run}
        options["settings"] = {"console": "off", "finish_timeout": 60.0}
    module, project = importlib.import_module(package), os.environ.get(f"{package.upper()}_PROJECT", "pdvit")
    tracked = module.init(project, name=run.resolve().name, config=dict(config), **options)
    if package == "trackio":  # it resumes by name, which other run directories may have too
        tracked.id = sent["id"]

    def log(metrics: dict[str, float], step: int) -> None:
        if step > sent["step"]:
            tracked.log(metrics, step=step)
            write_file(file, json.dumps(sent | {"step": step}))

    return log, module.finish


TRACKERS = {"tensorboard": start_tensorboard, "wandb": start_wandb, "trackio": start_wandb}  # by package and extra


def check_trackers(track: str) -> None:
    """Raise UserError for a tracker in `run.track` that is unknown, not installed or not logged in."""
    where = "run.track (--track)"
    for name in track.replace(" ", "").split(","):
        if name not in TRACKERS:
            raise UserError(f"there is no tracker '{name}'", where, closest(name, TRACKERS))
        if getattr(importlib.util.find_spec(name), "origin", None) is None:  # None: a folder that W&B left behind
            raise UserError(f"{name} is not installed", where, f"pip install 'pdvit[{name}]'")
        if name == "wandb":
            with reading(where, "`wandb login`, or WANDB_MODE=offline", "W&B can't log in"):
                importlib.import_module(name).login(verify=False)  # finds its key, or asks for it on a terminal


class Trackers:
    """The trackers of a run. One that fails is reported to `warn` once and left out; the run continues."""

    def __init__(self, run: Path, config: Mapping[str, Any], step: int, warn: Callable[[str], None]) -> None:
        self.warn, self.running = warn, dict[str, Tracker]()
        for name in dict.fromkeys(config["run"]["track"].replace(" ", "").split(",")):
            if tracker := self._call(name, TRACKERS[name], name, run, config, step):
                self.running[name] = tracker

    def log(self, record: Mapping[str, Any]) -> None:
        """Send the finite numbers of a record of metrics.jsonl as `type/name`, `type/layer` or `time/name`."""
        pairs = zip(record["layers"], record[record["kind"]], strict=True) if "layers" in record else record.items()
        named = {f"{record['kind']}/{name}": value for name, value in pairs if name != "step"}
        named |= {f"time/{name}": value for name, value in record.get("time", {}).items()}
        metrics = {key: float(x) for key, x in named.items() if isinstance(x, int | float) and isfinite(x)}
        for name, (log, _) in list(self.running.items()):
            self._call(name, log, metrics, record["step"])

    def close(self) -> None:
        """Close the run in every tracker."""
        for name, (_, finish) in list(self.running.items()):
            self._call(name, finish)

    def _call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            with redirect_stdout(sys.stderr):  # standard output is for the summary
                return function(*arguments)
        except Exception as error:
            self.running.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.warn(f"{name} failed ({reason}); the run continues without it, see metrics.jsonl")
