"""`pdvit finetune`: `pdvit train` with initial weights and defaults of its own."""

from functools import partial
from typing import Annotated, Any

import typer

from pdvit.cli.runs.command import Command
from pdvit.cli.runs.kinds import kind_of
from pdvit.cli.runs.options import AsJson, Assign, Cells, Change, File, Replay, Resume, begin, initial_weights
from pdvit.cli.settings import with_settings
from pdvit.config.schema import Config
from pdvit.errors import UserError

# Why these stands in docs/finetune.md.
DEFAULTS = {
    "data": {"source": "digits:5-9"},
    "diversity": {"preset": "none"},
    "optim": {"epochs": "12"},
}


@partial(with_settings, defaults=DEFAULTS)
def finetune(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="CKPT", help="Run directory, timm folder, file of weights, or a model of timm's hub."),
    ] = None,
    config: File = None,
    assign: Assign = None,
    cells: Cells = None,
    resume: Resume = None,
    change: Change = None,
    replay: Replay = None,
    as_json: AsJson = False,
    **settings: Any,
) -> int:
    """Train on from a checkpoint: other classes, images, resolution.

    Without --data: on the digits 5 to 9, for a model that learned 0 to 4 (pdvit train --data digits:0-4).
    """
    initial_weights(checkpoint, settings)
    return begin(FINETUNE, config, assign, cells, resume, change, replay, as_json, settings, DEFAULTS)


def _check_given(config: Config) -> None:
    if config.model.init is None:
        from pdvit.tracking import newest

        runs = newest("model.safetensors")
        tip = "name a run, a file of weights or a model of timm, for example pdvit finetune "
        raise UserError("there is no checkpoint to begin with", "CKPT", tip + str(runs[0] if runs else "runs/NAME"))


FINETUNE = Command("finetune", kind_of, _check_given)
