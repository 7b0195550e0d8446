"""`pdvit plot FIGURE`: the figures, the run directories to draw, and the files to write."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pdvit.cli.options import Group, add_command
from pdvit.errors import UserError, closest, command
from pdvit.files import reading

if TYPE_CHECKING:
    from pdvit.plots.reading import AnalyzedRun
    from pdvit.plots.style import Drawing, Theme

app = typer.Typer(cls=Group, help="Draw figures of runs, each with its data as CSV.")

# The number of newest runs that are drawn if no run is named: as lines in one panel, or as panels.
LINES, PANELS = 6, 3
SUFFIXES = (".png", ".svg", ".pdf")
UNFIT = "its files do not fit the figure"  # tables of files can have any shape


@dataclass(frozen=True)
class AnalysisFigure:
    """A figure of pdvit.plots, `plot_NAME`, from `metrics` in analysis.csv and `curves` in analysis/GROUP.npz."""

    help: str  # also the caption in the report
    group: str = "similarity"
    metrics: tuple[str, ...] = ()
    curves: tuple[str, ...] = ()
    module: str = "depth"

    def fits(self, run: "AnalyzedRun") -> bool:
        """Return whether the run has what the figure needs."""
        curves = {key.partition("/")[0] for key in run.curves.get(self.group, ())}
        return set(self.metrics) <= set(run.table["metric"]) and set(self.curves) <= curves


P = ("similarity",)
NORMS = ("norm_mean", "norm_peak", "norm_outliers", "norm_std")
FIGURES = {  # in the order of the report
    "similarity": AnalysisFigure("P by layer, with standard deviation and random weights.", metrics=P),
    "compare": AnalysisFigure("Two checkpoints: P, its difference, all other metrics.", metrics=P),
    "metrics": AnalysisFigure("All metrics by layer."),
    "norms": AnalysisFigure("Lengths of the tokens: mean, spread and outliers.", "norms", NORMS),
    "pairs": AnalysisFigure("Cosines of pairs of patches, by layer.", "pairs", (), ("histogram", "edges")),
    "spectrum": AnalysisFigure("Amplitude by frequency.", "spectrum", (), ("by_frequency", "frequency")),
    "attention": AnalysisFigure("Entropy and distance of attention.", "attention", (), ("entropy", "distance")),
    "cka": AnalysisFigure("Linear CKA between layers.", "cka", (), ("matrix", "layers"), "heatmap"),
}


def draw_figure(name: str, runs: Sequence["AnalyzedRun"], theme: "Theme") -> "Drawing":
    """Draw a figure of analyses."""
    drawing: Drawing = getattr(import_module(f"pdvit.plots.{FIGURES[name].module}"), f"plot_{name}")(runs, theme)
    return drawing


def _check_suffix(out: Path | None) -> Path | None:
    if out is not None and out.suffix.lower() not in SUFFIXES:
        what = f"'{out.suffix or out.name}' is not a format of figures"
        raise UserError(what, f"--out {out}", closest(out.suffix, SUFFIXES))
    return out


Runs = Annotated[
    list[Path] | None,
    typer.Argument(metavar="RUN", help="Run directories, or folders of analyses; unset: the newest."),
]
Run = Annotated[Path | None, typer.Argument(metavar="RUN", help="Run directory; unset: the newest that has the data.")]
OUT = "File; .png, .svg or .pdf decides the format. Its data go beside it, as CSV."
Out = Annotated[Path | None, typer.Option(callback=_check_suffix, help=OUT)]
Dark = Annotated[bool, typer.Option("--dark", help="Light lines on a dark background.")]
Labels = Annotated[str | None, typer.Option(metavar="A,B", help="Names in the figure, for those of the runs.")]
Title = Annotated[bool, typer.Option("--title/--no-title", help="The title of the figure or its only panel.")]


def _add_command(name: str, figure: AnalysisFigure) -> None:
    runs = "runs/digits-none runs/digits-paper" if name == "compare" else "runs/digits-paper"

    @add_command(app, f"pdvit plot {name} {runs}", name=name, help=figure.help)
    def draw(
        runs: Runs = None, labels: Labels = None, title: Title = True, out: Out = None, dark: Dark = False
    ) -> None:
        from pdvit.plots.reading import analyze_again, read_run

        if name == "compare" and len(runs or ()) != 2:
            tip = "name two run directories; differences are second minus first"
            raise UserError("this figure needs two analyses", "pdvit plot compare", tip)
        file, count = (f"analysis/{figure.group}.npz", PANELS) if figure.curves else ("analysis.csv", LINES)
        again = partial(analyze_again, group=figure.group)
        found = _find(runs, file, again, count, labels)
        analyses = [read_run(folder, run, figure.group) for run, folder in found.items()]
        for run in analyses:
            if not figure.fits(run):
                what, folder = "the analysis lacks numbers of this figure", found[run.name]
                raise UserError(what, str(folder), f"run first: {again(folder)}")
        tip = f"measure again: {' or '.join(map(again, found.values()))}"
        checked = reading(", ".join(map(str, found.values())), tip, UNFIT)
        _write(checked(partial(draw_figure, name, analyses)), dark, title, name, found, out)


for _name, _figure in FIGURES.items():
    _add_command(_name, _figure)


@add_command(app, "pdvit plot training runs/digits-none runs/digits-paper --dark")
def training(
    runs: Runs = None, labels: Labels = None, title: Title = True, out: Out = None, dark: Dark = False
) -> None:
    """Loss by term, accuracy or mIoU, and P, over the epochs."""
    from pdvit.plots.training import plot_training, read_records

    again = partial(command, "train", "--resume")
    found = _find(runs, "metrics.jsonl", again, 1, labels)
    records = {name: read_records(folder) for name, folder in found.items()}
    tip = f"go on with the run: {' or '.join(map(again, found.values()))}"
    checked = reading(", ".join(map(str, found.values())), tip, UNFIT)
    _write(checked(partial(plot_training, records)), dark, title, "training", found, out)


@add_command(app, "pdvit plot maps runs/digits-paper --image 3 --patch 3,5")
def maps(
    run: Run = None,
    image: Annotated[int, typer.Option(min=0, metavar="<int>", help="Number of the image, from 0.")] = 0,
    patch: Annotated[list[str] | None, typer.Option(metavar="ROW,COL", help="From 0,0; repeatable.")] = None,
    labels: Labels = None,
    title: Title = True,
    out: Out = None,
    dark: Dark = False,
) -> None:
    """Similarity of single patches to all others, by depth."""
    from pdvit.plots.heatmap import plot_maps
    from pdvit.plots.reading import analyze_again, read_arrays

    patches = []
    for text in patch or []:
        if not (found := re.fullmatch(r"\s*(-?\d+)\s*,\s*(-?\d+)\s*", text)):
            raise UserError(f"'{text}' is no patch", "--patch", "write ROW,COL, for example --patch 3,5")
        patches.append((int(found[1]), int(found[2])))
    again = partial(analyze_again, explore=True)
    folders = _find([run] if run else None, "analysis/maps.npz", again, 1, labels)
    ((name, folder),) = folders.items()
    file, tip = folder / "analysis" / "maps.npz", f"make them again: {again(folder)}"
    arrays = read_arrays(file, tip)
    draw = reading(file, tip, UNFIT)(partial(plot_maps, arrays, name, image, patches))
    _write(draw, dark, title, "maps", folders, out)


@add_command(app, "pdvit plot confusion runs/digits-paper --out confusion.pdf")
def confusion(run: Run = None, labels: Labels = None, title: Title = True, out: Out = None, dark: Dark = False) -> None:
    """Confusion matrix of an evaluation."""
    from pdvit.plots.heatmap import plot_confusion, read_confusion
    from pdvit.plots.reading import eval_again

    if run and (run / "iou.csv").is_file():
        tip = f"draw IoU by class and pictures: {command('plot', 'segmentation', run)}"
        raise UserError("a run of segmentation has no confusion matrix", str(run), tip)
    ((name, folder),) = _find([run] if run else None, "confusion.csv", eval_again, 1, labels).items()
    _write(partial(plot_confusion, read_confusion(folder), name), dark, title, "confusion", [name], out)


@add_command(app, "pdvit plot segmentation runs/scenes-none")
def segmentation(
    run: Run = None, labels: Labels = None, title: Title = True, out: Out = None, dark: Dark = False
) -> None:
    """Image, truth, prediction and errors; IoU of every class."""
    from pdvit.plots.reading import eval_again
    from pdvit.plots.segmentation import plot_segmentation, read_segmentation

    if run and (run / "confusion.csv").is_file():
        raise UserError("the model labels images", str(run), f"draw the matrix: {command('plot', 'confusion', run)}")
    ((name, folder),) = _find([run] if run else None, "iou.csv", eval_again, 1, labels).items()
    _write(partial(plot_segmentation, *read_segmentation(folder), name), dark, title, "segmentation", [name], out)


@add_command(app, "pdvit plot sweep runs/comparison --metric loss")
def sweep(
    folder: Annotated[Path, typer.Argument(metavar="SWEEP", help="Folder of a sweep, with cells.csv; or such a file.")],
    metric: Annotated[str | None, typer.Option(help="Column of cells.csv. Unset: accuracy, or miou.")] = None,
    baseline: Annotated[str | None, typer.Option(metavar="KEY=VALUE", help="Default: the first.")] = None,
    title: Title = True,
    out: Out = None,
    dark: Dark = False,
) -> None:
    """Ablation: mean, spread and paired differences over seeds."""
    from pdvit.plots.sweep import markdown, plot_sweep, read_cells, summarise, text_of

    summary = summarise(read_cells(folder), metric, baseline)
    print(text_of(summary))
    name = _name_of(folder)
    if folder.is_file():  # experiments/digits/results.csv is digits-results
        name = f"{folder.resolve().parent.name}-{folder.stem}"
    _write(partial(plot_sweep, summary, name), dark, title, "sweep", [name], out, markdown(summary))


def _find(
    runs: list[Path] | None, file: str, again: Callable[[Path], str], count: int, labels: str | None
) -> dict[str, Path]:
    """Return the runs to draw by name or label: those given, or the newest with the file.

    `again` returns the command that makes the file in a folder.
    """
    from pdvit.plots.style import unique
    from pdvit.tracking.run_directory import closest_run, newest

    folders = runs or newest(file)[:count]
    if not folders:
        trained = newest("model.safetensors")
        first = again(trained[0]) if trained else command("train")
        raise UserError(f"no run here has {file} yet", "runs/", f"run first: {first}")
    for folder in folders:
        if not folder.is_dir():
            raise UserError("there is no such run directory", str(folder), closest_run(str(folder), file, "run.toml"))
        if not (folder / file).is_file():
            measured = file.startswith("analysis") and (any(folder.glob("*.json")) or (folder / "analysis").exists())
            if not (measured or (folder / "run.toml").is_file()):
                raise UserError(f"the folder has no {file}, and is no run", str(folder), closest_run(str(folder), file))
            raise UserError(f"the run has no {file}", str(folder), f"run first: {again(folder)}")
    if labels is not None:
        names = labels.split(",")
        if len(names) != len(folders):
            what = f"labels and runs differ in number: {len(names)} and {len(folders)}"
            raise UserError(what, f"--labels {labels}", "give one name for each run, with commas between them")
    else:
        short = [_name_of(folder) for folder in folders]
        longer = [f"{_name_of(folder.resolve().parent)}/{name}" for folder, name in zip(folders, short, strict=True)]
        names = [long if short.count(name) > 1 else name for name, long in zip(short, longer, strict=True)]
    return dict(zip(unique(names), folders, strict=True))


def _name_of(folder: Path) -> str:
    name = folder.resolve().name.removeprefix("analysis-").removeprefix("eval-")
    return name.encode(errors="replace").decode()  # pandas on pyarrow has no text for other file names


def _write(
    draw: Callable[["Theme"], "Drawing"],
    dark: bool,
    title: bool,
    name: str,
    runs: Iterable[str],
    out: Path | None,
    page: str = "",
) -> None:
    """Write the figure, its data as CSV, and `page` as Markdown; print the path of the figure."""
    from pdvit.engine.terminal import raise_on_ctrl_c
    from pdvit.plots.style import DARK, LIGHT, remove_title, render
    from pdvit.tracking.run_directory import write_file, writing

    raise_on_ctrl_c()
    figure = draw(DARK if dark else LIGHT)
    if not title:
        remove_title(figure)
    if out is None:
        full = "-".join([name, *runs])
        safe = re.sub(r"[^\w.=-]", "-", full)[:60]  # of at most 240 bytes: a file name has up to 255
        if safe != full:  # names that differ further on must not become one
            safe += f"-{sha256(full.encode(errors='surrogateescape')).hexdigest()[:8]}"
        out = Path("figures") / f"{safe}.png"
    table = figure.data.to_csv(index=False, float_format="%.6g")
    texts = {out.with_suffix(".csv"): table} | ({out.with_suffix(".md"): page} if page else {})
    with writing("the figure", out):
        for file in texts:  # `--out RUN/analysis.png` must not replace RUN/analysis.csv
            if file.exists() and not file.read_bytes().startswith((b"run,", b"setting,", b"|")):
                what = f"{file.name} exists and is not the data of a figure"
                raise UserError(what, str(file), "choose another --out: a figure's data go beside it, under its name")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, render(figure, out.suffix))
        for file, text in texts.items():
            write_file(file, text.encode(errors="replace"))  # what a file system takes as a name need not be text
    print(out)
