"""The three trackers, each as what `sinks.py` calls a Sink: made of (run directory, configuration, step), log, close.

Their packages are optional and imported on use. Each may raise anything.
"""

import json
import os
import secrets
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

PROJECT = "pdvit"
# How long W&B may go on sending when a run is over; what is left stays on the disk, for `wandb sync`.
FINISH_SECONDS = 60.0


class TensorBoard:
    """Event files in RUN/tensorboard; what an earlier attempt wrote after `step` is purged by the reader."""

    def __init__(self, run: Path, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write the numbers to the event file."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a killed run is resumed from its checkpoint: nothing before that may be missing

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


class _Remembering:
    """A tracker that can't take a step back: what it was sent stays, and is not sent twice.

    A resumed run computes the steps after its checkpoint once more. The tracker's id for this run and the last step
    sent are kept in a file of the run directory.
    """

    run: Any  # what the tracker's own init returned

    def __init__(self, file: Path) -> None:
        self.file, self.id, self.sent = file, secrets.token_hex(8), -1
        with suppress(OSError, ValueError, LookupError, TypeError):  # none yet, or damaged: a new run over there
            known = json.loads(file.read_text(encoding="utf-8"))
            self.id, self.sent = str(known["id"]), int(known["step"])
        self._remember(self.sent)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers, unless an earlier attempt at this step has done so."""
        if step > self.sent:
            self.run.log(dict(numbers), step=step)
            self._remember(step)

    def _remember(self, step: int) -> None:
        """Replace the file: whole or absent, but not synced, as this happens at every record."""
        beside = self.file.with_name(f".{self.file.name}")
        beside.write_text(json.dumps({"id": self.id, "step": step}), encoding="utf-8")
        beside.replace(self.file)


class WandB(_Remembering):
    """One W&B run for one run directory: its files in RUN/wandb, its id in RUN/wandb.json."""

    def __init__(self, run: Path, config: Mapping[str, Any], step: int) -> None:
        import wandb

        super().__init__(run / "wandb.json")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.resolve().name,
            id=self.id,
            resume="allow",
            reinit="finish_previous",
            dir=str(run),
            config=dict(config),
            # The console stays what it is: captured, it would no longer look like a terminal to the display.
            settings=wandb.Settings(console="off", finish_timeout=FINISH_SECONDS),
        )

    def close(self) -> None:
        """Send what is still waiting, for at most FINISH_SECONDS."""
        self.run.finish()


class Trackio(_Remembering):
    """One trackio run for one run directory: in trackio's own store (TRACKIO_DIR), its id in RUN/trackio.json."""

    def __init__(self, run: Path, config: Mapping[str, Any], step: int) -> None:
        import trackio

        super().__init__(run / "trackio.json")
        with redirect_stdout(sys.stderr):  # standard output is for the summary
            self.run = trackio.init(
                PROJECT,
                name=run.resolve().name,
                config=dict(config),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        # trackio resumes by name, which other run directories may share; nothing has been sent under its new id yet.
        self.run.id = self.id

    def close(self) -> None:
        """Store what is still waiting."""
        import trackio

        with redirect_stdout(sys.stderr):
            trackio.finish()  # `run.finish()` alone would be called, and print, once more at exit
