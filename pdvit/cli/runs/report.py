"""What the user hears of a run, and the training itself between the first word and the last."""

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdvit.cli.runs.command import Kind
from pdvit.errors import UserError

if TYPE_CHECKING:
    from pdvit.cli.runs.prepare import Prepared
    from pdvit.engine.display import RunConsole
    from pdvit.engine.interrupts import StopRequest
    from pdvit.tracking import RunDirectory


def make_console(as_json: bool) -> "RunConsole":
    """Return where to talk: stdout, or stderr where JSON goes to stdout; only torchrun's first process speaks."""
    from pdvit.engine.display import RunConsole

    return RunConsole(stderr=as_json, quiet=os.environ.get("RANK", "0") != "0")


def say(console: "RunConsole", text: str) -> None:
    """Print plain text as it is."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def train_and_report(ready: "Prepared", directory: "RunDirectory", stop: "StopRequest") -> int:
    """Train, say what came out, and return the exit status; raises UserError and RunFailed."""
    from pdvit.engine.interrupts import EXIT_STOPPED

    say(ready.console, f"run directory: {directory.path}")
    again = ready.command("--resume", shlex.quote(str(directory.path)))
    try:
        summary = ready.trainer.run(directory, ready.console, stop)
    except UserError as error:
        raise UserError(error.what, error.where, f"{error.tip}; go on with: {again}") from error
    if summary is None:
        say(ready.console, f"stopped; go on with: {again}")
        return EXIT_STOPPED
    if ready.ranks.main:
        close(ready.kind, directory.path, summary, ready.console, ready.as_json)
    return 0


def close(kind: Kind, run: Path, summary: Mapping[str, Any], console: "RunConsole", as_json: bool) -> None:
    """Say what came out, what was written where, and which command comes next."""
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    from pdvit.tracking import newest

    others = [
        path for path in newest("summary.json") if path.resolve() != run.resolve() and _source(path) == _source(run)
    ]
    compared = " ".join(str(path) for path in [*others[:1], run])
    say(
        console,
        f"\n{kind.conclude(summary)}\n"
        f"{summary['epochs']:g} epochs in {summary['seconds']:.0f} s, "
        f"{summary['images_per_second']:,.0f} images per second\n"
        f"weights   {run}/model.safetensors ({kind.use(run)})\n"
        f"records   {run}/metrics.jsonl, summary.json; repeat with --config {run}/run.toml\n"
        f"next      pdvit analyze {compared}",
    )


def _source(run: Path) -> object:
    """Return where a run's images came from: runs on other images are not compared."""
    from pdvit.config import read_toml

    try:
        return read_toml(run / "run.toml").get("data", {}).get("source")
    except UserError:
        return None
