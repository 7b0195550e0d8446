"""`pdvit segment`: `pdvit train` with a head that labels every pixel, and defaults of its own."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pdvit.cli.runs.command import Command
from pdvit.cli.runs.kinds import kind_of
from pdvit.cli.runs.options import AsJson, Assign, Cells, Change, File, Replay, Resume, begin, initial_weights
from pdvit.cli.settings import Layer, make_layers, with_settings
from pdvit.config.load import SWEEP_SECTION, build

# Why these stands in docs/segment.md.
DEFAULTS: Layer = {
    "data": {"source": "scenes"},
    "diversity": {"preset": "none"},
    "segment": {"head": "upernet"},
}
# More of them on scenes, which are small and never two alike; with the head that has a width; and with a model of ours.
SCENES: Layer = {
    "data": {"batch_size": 8},
    "segment": {"jitter": (1.0, 1.0), "photometric": False},
    "optim": {"epochs": "1.25"},
}
UPERNET: Layer = {"segment": {"width": 32, "aux": 0.0}}
SMALL: Layer = {"model": {"depth": 4, "width": 96, "heads": 3, "patch_size": 8}, "optim": {"lr": 2e-3}}


@partial(with_settings, defaults=DEFAULTS)
def segment(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="CKPT", help="Backbone: a run, timm folder, file of weights, or model of timm's hub."),
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
    """Train a vision transformer to label every pixel.

    Without arguments: a small one on scenes of handwritten digits, in a few minutes.
    """
    initial_weights(checkpoint, settings)
    defaults = DEFAULTS if resume or replay else _defaults(config, assign or [], settings)
    return begin(SEGMENT, config, assign, cells, resume, change, replay, as_json, settings, defaults)


def _defaults(file: Path | None, assign: list[str], settings: Mapping[str, Any]) -> Layer:
    """Return the defaults for what is asked for."""
    given = make_layers(file, assign, settings, defaults=DEFAULTS)
    asked = build(*((name, {key: layer[key] for key in layer if key != SWEEP_SECTION}) for name, layer in given))
    layers = [DEFAULTS]
    if asked.data.source == "scenes":
        layers += [SCENES] + [UPERNET] * (asked.segment.head == "upernet")
        layers += [] if asked.model.init or asked.model.name else [SMALL]
    merged: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for section, values in layer.items():
            merged[section] = merged.get(section, {}) | dict(values)
    return merged


SEGMENT = Command("segment", kind_of)
