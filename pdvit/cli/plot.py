"""`pdvit plot KIND`."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pdvit.errors import UserError, closest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

app = typer.Typer(invoke_without_command=True)

SUFFIXES = (".png", ".svg", ".pdf")
NEWEST = 6  # lines of one figure that are still told apart

Runs = Annotated[list[Path] | None, typer.Argument(help="Run directories; unset: the newest.")]
Out = Annotated[Path | None, typer.Option("--out", help="File; .png, .svg or .pdf decides the format.")]


@app.callback()
def plot(context: typer.Context) -> None:
    """Draw figures from run directories."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def similarity(runs: Runs = None, out: Out = None) -> None:
    """Depth against P, one line per analysis: mean and spread over images."""
    target = _target(out)
    from pdvit.plots.similarity import plot_similarity, read_analysis

    folders = _folders(runs, "analysis.csv", "pdvit analyze")
    tables = [read_analysis(folder) for folder in folders]
    _save(plot_similarity(tables, [_name(folder) for folder in folders]), "similarity", folders, target)


@app.command()
def training(runs: Runs = None, out: Out = None) -> None:
    """Loss by term, accuracy, and P over epoch and layer, one row per run."""
    target = _target(out)
    from pdvit.plots.training import plot_training, read_records

    folders = _folders(runs, "metrics.jsonl", "pdvit train")
    if not runs:
        folders = folders[:1]
    records = [read_records(folder) for folder in folders]
    _save(plot_training(records, [_name(folder) for folder in folders]), "training", folders, target)


@app.command()
def confusion(
    run: Annotated[Path | None, typer.Argument(help="Run directory; unset: the newest evaluation.")] = None,
    out: Out = None,
) -> None:
    """What is taken for what: the confusion matrix of an evaluation."""
    target = _target(out)
    from pdvit.plots.confusion import plot_confusion, read_confusion

    folders = _folders([run] if run else None, "confusion.csv", "pdvit eval")[:1]
    _save(plot_confusion(read_confusion(folders[0]), _name(folders[0])), "confusion", folders, target)


@app.command()
def segmentation(
    run: Annotated[Path | None, typer.Argument(help="Run directory; unset: the newest segmentation.")] = None,
    out: Out = None,
) -> None:
    """Image, truth, prediction and errors side by side, and the IoU of every class."""
    target = _target(out)
    from pdvit.plots.segmentation import plot_segmentation, read_segmentation

    folders = _folders([run] if run else None, "iou.csv", "pdvit eval")[:1]
    _save(plot_segmentation(*read_segmentation(folders[0]), _name(folders[0])), "segmentation", folders, target)


def _target(out: Path | None) -> Path | None:
    """Check the suffix before any work is done."""
    if out is not None and out.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"'{out.suffix or out.name}' is not a format of figures",
            f"--out {out}",
            closest(out.suffix, SUFFIXES),
        )
    return out


def _folders(runs: list[Path] | None, marker: str, command: str) -> list[Path]:
    """Return the run directories to draw; UserError naming the command that makes what is missing."""
    from pdvit.tracking.run_directory import newest

    folders = [Path(os.path.expanduser(run)) for run in runs or []] or newest(marker)[:NEWEST]
    if not folders:
        raise UserError(f"no run here has {marker} yet", "runs/", f"run {command} first")
    for folder in folders:
        if not folder.is_dir():
            raise UserError("there is no such run directory", str(folder), "name a folder below runs/")
        if not (folder / marker).is_file():
            name = "" if command == "pdvit train" else f" {folder}"
            raise UserError(f"the run has no {marker}", str(folder), f"run {command}{name} first")
    return folders


def _name(folder: Path) -> str:
    return folder.resolve().name.removeprefix("analysis-").removeprefix("eval-")


def _save(figure: "Figure", kind: str, folders: list[Path], out: Path | None) -> None:
    """Write the figure beside its target, rename it, and say where it is."""
    from pdvit.plots.style import save

    if out is None:
        names = [re.sub(r"[^\w.-]", "-", _name(folder))[:40] for folder in folders[:3]]
        more = [f"{len(folders) - 3}-more"] if len(folders) > 3 else []
        out = Path("figures") / f"{'-'.join([kind, *names, *more])}.png"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = out.with_name(f".{out.name}.part{out.suffix}")
        save(figure, beside)
        beside.replace(out)
    except OSError as error:
        raise UserError(f"the figure can't be written: {error.strerror}", str(out), "choose another --out") from error
    print(out)
