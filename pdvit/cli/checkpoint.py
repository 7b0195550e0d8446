"""Options and helpers shared by the commands that use a trained checkpoint."""

import os
from pathlib import Path
from typing import Annotated

import typer

from pdvit.cli.options import timm_models
from pdvit.errors import UserError

Model = Annotated[str | None, typer.Option(autocompletion=timm_models, help="timm model name, if the file has none.")]
Weights = Annotated[str | None, typer.Option(help="raw or ema, if a file holds both; unset: ema.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
OnBadImage = Annotated[str | None, typer.Option(metavar="error|skip", help="Policy for images that do not decode.")]


def results_folder(path: Path, out: Path | None, prefix: str) -> Path:
    """Return the folder for results: `out`, the checkpoint's own, or runs/PREFIX-NAME; UserError if not writable."""
    from pdvit.models.checkpoints import name_of

    folder = out or (path if path.is_dir() else Path("runs") / f"{prefix}-{name_of(path)}")
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not (os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)):
        what = f"the results can't be written: {there} is not a folder, or not writable"
        raise UserError(what, str(folder), "choose another --out")
    return folder
