"""`pdvit plot KIND`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pdvit.cli.figures import Dark, Out, Runs, check_suffix, folders_of, name_of, names_of, theme_of, write
from pdvit.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from pdvit.plots.reading import Arrays
    from pdvit.plots.style import Drawing, Theme
    from pdvit.plots.sweep import SweepSummary

app = typer.Typer(invoke_without_command=True)

# Runs of one figure that are drawn when none are named: lines that are told apart, panels that fit beside one another.
LINES, PANELS = 6, 3
TABLE, MEASURE = "analysis.csv", "pdvit analyze {}"


@app.callback()
def plot(context: typer.Context) -> None:
    """Draw figures from run directories, each with its data as CSV beside it."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def similarity(runs: Runs = None, out: Out = None, dark: Dark = False) -> None:
    """Depth against P, one line per analysis: mean and spread, stages, random weights."""
    check_suffix(out)
    from pdvit.plots.depth import P, plot_similarity

    _lines("similarity", plot_similarity, runs, out, dark, (P,))


@app.command()
def metrics(runs: Runs = None, out: Out = None, dark: Dark = False) -> None:
    """Small multiples: every metric that was measured, by layer."""
    check_suffix(out)
    from pdvit.plots.depth import plot_metrics

    _lines("metrics", plot_metrics, runs, out, dark)


@app.command()
def training(runs: Runs = None, out: Out = None, dark: Dark = False) -> None:
    """Loss by term, accuracy or mIoU, and P over epoch and layer, one row per run."""
    check_suffix(out)
    from pdvit.plots.training import plot_training, read_records

    folders = folders_of(runs, "metrics.jsonl", "pdvit train", 1)
    records = [read_records(folder) for folder in folders]
    write(plot_training(records, names_of(folders), theme_of(dark)), "training", folders, out)


@app.command()
def pairs(runs: Runs = None, out: Out = None, dark: Dark = False) -> None:
    """How similarities of pairs of patches are distributed: a histogram per layer."""
    check_suffix(out)
    from pdvit.plots.curves import plot_pairs

    folders, arrays, _ = _curves("pairs", runs, ("histogram", "edges"))
    write(plot_pairs(arrays, names_of(folders), theme_of(dark)), "pairs", folders, out)


@app.command()
def maps(
    run: Annotated[Path | None, typer.Argument(help="Run directory; unset: the newest with maps.")] = None,
    image: Annotated[int, typer.Option("--image", min=0, help="Number of the image, from 0.")] = 0,
    patch: Annotated[
        list[str] | None,
        typer.Option(
            "--patch", metavar="ROW,COL", help="Patch of the first layer, from 0,0; repeatable. Unset: three."
        ),
    ] = None,
    out: Out = None,
    dark: Dark = False,
) -> None:
    """What single patches of an image resemble, at several depths."""
    check_suffix(out)
    chosen = [_place(text) for text in patch or []]
    from pdvit.plots.heatmap import plot_maps, read_maps

    folders = folders_of([run] if run else None, "analysis/maps.npz", f"{MEASURE} --explore", 1)
    figure = plot_maps(read_maps(folders[0]), name_of(folders[0]), image, chosen, theme_of(dark))
    write(figure, "maps", folders, out)


@app.command()
def attention(runs: Runs = None, out: Out = None, dark: Dark = False) -> None:
    """Entropy and distance of attention, head by head."""
    check_suffix(out)
    from pdvit.plots.depth import ATTENTION, plot_attention

    folders, arrays, tables = _curves("attention", runs, tuple(ATTENTION))
    write(plot_attention(arrays, tables, names_of(folders), theme_of(dark)), "attention", folders, out)


@app.command()
def norms(runs: Runs = None, out: Out = None, dark: Dark = False) -> None:
    """How long the tokens are: mean, spread and outliers by layer."""
    check_suffix(out)
    from pdvit.plots.depth import NORM_STD, NORMS, plot_norms

    _lines("norms", plot_norms, runs, out, dark, (*NORMS, NORM_STD), "norms")


@app.command()
def spectrum(runs: Runs = None, out: Out = None, dark: Dark = False) -> None:
    """Amplitude by spatial frequency for every layer, and the share of the mean."""
    check_suffix(out)
    from pdvit.plots.curves import DC_SHARE, plot_spectrum

    folders, arrays, tables = _curves("spectrum", runs, ("by_frequency", "frequency"), (DC_SHARE,))
    write(plot_spectrum(arrays, tables, names_of(folders), theme_of(dark)), "spectrum", folders, out)


@app.command()
def cka(runs: Runs = None, out: Out = None, dark: Dark = False) -> None:
    """Which layers tell images apart alike: linear CKA of one model, and between models."""
    check_suffix(out)
    from pdvit.plots.heatmap import plot_cka, read_between

    folders, arrays, _ = _curves("cka", runs, ("matrix", "layers"))
    names = names_of(folders)
    between = [(name, found) for folder, name in zip(folders, names, strict=True) if (found := read_between(folder))]
    write(plot_cka(arrays, names, between, theme_of(dark)), "cka", folders, out)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Run directory, or folder of an analysis.")],
    second: Annotated[Path, typer.Argument(help="Another; differences are second minus first.")],
    out: Out = None,
    dark: Dark = False,
) -> None:
    """Two checkpoints: P of both, their difference with its interval, all other metrics."""
    check_suffix(out)
    from pdvit.plots.depth import P, plot_compare

    _lines("compare", plot_compare, [first, second], out, dark, (P,))


@app.command()
def sweep(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep, with cells.csv; or such a file.")],
    metric: Annotated[
        str | None, typer.Option("--metric", help="Column of cells.csv. Unset: accuracy, or miou.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline", metavar="KEY=VALUE", help="What differences are taken from. Unset: the first setting."
        ),
    ] = None,
    out: Out = None,
    dark: Dark = False,
) -> None:
    """Ablation: mean and spread over seeds, paired differences; table, figure, CSV, Markdown."""
    check_suffix(out)
    from pdvit.plots.sweep import markdown, plot_sweep, read_cells, summarise

    folder = folder.expanduser()
    if not folder.exists():
        raise UserError("there is no such folder or file", str(folder), "name the folder of a sweep, or its cells.csv")
    summary = summarise(read_cells(folder), metric, baseline)
    _show(summary)
    if folder.is_file():  # experiments/digits/results.csv is digits-results
        folder = folder.with_name(f"{folder.resolve().parent.name}-{folder.stem}")
    write(plot_sweep(summary, name_of(folder), theme_of(dark)), "sweep", [folder], out, markdown(summary))


@app.command()
def confusion(
    run: Annotated[Path | None, typer.Argument(help="Run directory; unset: the newest evaluation.")] = None,
    out: Out = None,
    dark: Dark = False,
) -> None:
    """What is taken for what: the confusion matrix of an evaluation."""
    check_suffix(out)
    from pdvit.plots.heatmap import plot_confusion, read_confusion

    if run and (run / "iou.csv").is_file():
        tip = f"its scores by class, and pictures: pdvit plot segmentation {run}"
        raise UserError("the run labels pixels, whose confusions are in iou.csv alone", str(run), tip)
    folders = folders_of([run] if run else None, "confusion.csv", "pdvit eval {}", 1)
    figure = plot_confusion(read_confusion(folders[0]), name_of(folders[0]), theme_of(dark))
    write(figure, "confusion", folders, out)


@app.command()
def segmentation(
    run: Annotated[Path | None, typer.Argument(help="Run directory; unset: the newest segmentation.")] = None,
    out: Out = None,
    dark: Dark = False,
) -> None:
    """Image, truth, prediction and errors side by side, and the IoU of every class."""
    check_suffix(out)
    from pdvit.plots.segmentation import plot_segmentation, read_segmentation

    folders = folders_of([run] if run else None, "iou.csv", "pdvit eval {}", 1)
    figure = plot_segmentation(*read_segmentation(folders[0]), name_of(folders[0]), theme_of(dark))
    write(figure, "segmentation", folders, out)


def _lines(
    kind: str,
    draw: "Callable[[Sequence[pd.DataFrame], Sequence[str], Theme], Drawing]",
    runs: list[Path] | None,
    out: Path | None,
    dark: bool,
    needs: Sequence[str] = (),
    group: str = "similarity",
) -> None:
    """Draw a figure from analysis.csv of each run, which has to have the metrics `needs` of a group."""
    from pdvit.plots.reading import read_analysis

    folders = folders_of(runs, TABLE, MEASURE, LINES)
    tables = [read_analysis(folder, needs, group) for folder in folders]
    write(draw(tables, names_of(folders), theme_of(dark)), kind, folders, out)


def _curves(
    group: str, runs: list[Path] | None, names: Sequence[str], needs: Sequence[str] = ()
) -> "tuple[list[Path], list[Arrays], list[pd.DataFrame]]":
    """Return run directories with the curves and the table of each."""
    from pdvit.plots.reading import read_analysis, read_curves

    folders = folders_of(runs, f"analysis/{group}.npz", f"{MEASURE} --metrics {group}", PANELS)
    arrays = [read_curves(folder, group, names) for folder in folders]
    return folders, arrays, [read_analysis(folder, needs, group) for folder in folders]


def _place(text: str) -> tuple[int, int]:
    """Read ROW,COL."""
    try:
        row, column = (int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"'{text}' is no patch", "--patch", "write ROW,COL, for example --patch 3,5") from error
    return row, column


def _show(summary: "SweepSummary") -> None:
    """Print the table of a sweep, and what its numbers are."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from pdvit.plots.sweep import notes_of, table_of

    console = Console()
    head, *body = table_of(summary)
    view = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(head):
        view.add_column(escape(name), justify="left" if number < len(head) - 3 else "right")
    for row in body:
        view.add_row(*map(escape, row))
    console.print(view)
    for note in notes_of(summary):
        console.print(f"[dim]{escape(note)}[/dim]", highlight=False, soft_wrap=True)
