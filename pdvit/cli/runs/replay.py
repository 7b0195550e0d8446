"""Running the step again at which a run broke down."""

import json
from dataclasses import replace
from pathlib import Path

from pdvit.cli.runs.command import Command
from pdvit.cli.runs.prepare import prepare
from pdvit.cli.runs.recipe import recipe_of
from pdvit.cli.runs.report import say

SHOWN = 5


def replay(command: Command, path: Path, as_json: bool) -> int:
    """Run the step again, and say what is not finite; raises UserError where the run has none to replay."""
    from pdvit.tracking import RunDirectory

    config = recipe_of(RunDirectory.open(path).path, [])
    config = replace(config, run=replace(config.run, distribute="ddp", track=None))  # in this process alone
    ready = prepare(command, config, as_json, begun=True)
    from pdvit.engine.replay import replay as run_again

    found = run_again(path, ready.trainer.state, ready.trainer.updater)
    metrics = {name: value if abs(value) < float("inf") else None for name, value in found.metrics.items()}
    if as_json:
        print(json.dumps({"step": found.step, "metrics": metrics, "broken": found.broken}, indent=2))
        return 0
    say(ready.console, f"step {found.step} again:")
    for name, value in metrics.items():
        say(ready.console, f"  {name:12} {'not finite' if value is None else f'{value:.6g}'}")
    more = f" and {len(found.broken) - SHOWN} more" if len(found.broken) > SHOWN else ""
    say(ready.console, f"gradients that are not finite: {', '.join(found.broken[:SHOWN]) or 'none'}{more}")
    return 0
