"""`pdvit segment`: `pdvit train` with a head that labels every pixel, and defaults of its own."""

from functools import partial
from typing import Annotated, Any

import typer

from pdvit.cli.runs.kinds import SEGMENT
from pdvit.cli.runs.options import AsJson, Assign, Change, File, Replay, Resume, begin, initial_weights
from pdvit.cli.settings import Layer, with_settings

# Why these stands in docs/segment.md.
DEFAULTS: Layer = {
    "data": {"source": "scenes"},
    "diversity": {"preset": "none"},
    "segment": {"head": "linear"},
    "optim": {"epochs": "12"},
}


@partial(with_settings, defaults=DEFAULTS)
def segment(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="CKPT", help="Backbone: a run, timm folder, file of weights, or model of timm's hub."),
    ] = None,
    config: File = None,
    assign: Assign = None,
    resume: Resume = None,
    change: Change = None,
    replay: Replay = None,
    as_json: AsJson = False,
    **settings: Any,
) -> int:
    """Train a vision transformer to label every pixel.

    Without arguments: a small one on scenes of handwritten digits, in about two minutes.
    """
    initial_weights(checkpoint, settings)
    return begin(SEGMENT, config, assign, resume, change, replay, as_json, settings, DEFAULTS)
