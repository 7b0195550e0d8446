"""The pages of `pdvit analyze`: the patch explorer (--explore) and the report (--report)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pdvit.analysis.explorer import MAX_IMAGES, bytes_per_model, explorer_page, read_maps, write_maps
from pdvit.analysis.report import ReportFigure, report_page
from pdvit.analysis.tables import MAPS
from pdvit.cli.analyze_run import Analyzer, CheckpointAnalysis
from pdvit.cli.console import log
from pdvit.cli.plot import FIGURES, draw_figure
from pdvit.data.image_sets import ImageSet
from pdvit.data.images import BadImages
from pdvit.engine.distributed import SINGLE_PROCESS
from pdvit.engine.terminal import RunConsole
from pdvit.plots.reading import AnalyzedRun
from pdvit.plots.style import DARK, LIGHT, Drawing, Theme, render, unique
from pdvit.plots.training import plot_training, read_records
from pdvit.tracking.environment import describe_environment
from pdvit.tracking.run_directory import write_file, writing


def write_explorer(folders: Mapping[str, Path], images: ImageSet, analyzer: Analyzer) -> None:
    """Write explorer.html to the first checkpoint's folder, and analysis/maps.npz to each; print what they show.

    Checkpoints are loaded once more, one at a time, so that all get the same images. Raises UserError.
    """
    max_bytes, shown, bad = bytes_per_model(len(folders)), images.subsample(MAX_IMAGES), BadImages(skip=True)
    models = []
    for path in folders:
        opened = analyzer.open(path, SINGLE_PROCESS)
        loaded, preprocessing = opened.loaded, opened.loader.preprocessing
        pixels = shown.pixels(preprocessing, bad)
        models.append(read_maps(loaded.model, pixels, preprocessing.normalise, loaded.name, max_bytes))
    total, images_shown = len(images.split), min(len(maps.names) for maps in models)
    which = f"{images_shown} of {total:,}, spread evenly" if images_shown < total else f"all {total}"
    fewer = "; more would make the page larger than 10 MB" if images_shown < len(shown.split) - len(bad.found) else ""
    broken = f"; {len(bad.found)} left out that do not decode" if bad.found else ""
    notes = [f"images: {which} ({images.description}){fewer}{broken}"]
    page = next(iter(folders.values())) / "explorer.html"
    with writing("the page", page):
        for folder, maps in zip(folders.values(), models, strict=True):
            write_maps(folder / "analysis" / MAPS, maps)
        write_file(page, explorer_page(models, notes))
    for note in [*notes, *(f"{maps.model}: {note}" for maps in models for note in maps.notes)]:
        log(analyzer.console, f"explorer {note}")
    log(analyzer.console, f"written  {page}")


def write_report(results: Sequence[CheckpointAnalysis], folders: Mapping[str, Path], console: RunConsole) -> None:
    """Write report.html to the first checkpoint's folder: verdicts, figures, numbers, definitions, environment.

    Raises UserError.
    """
    light, dark = (report_figures(results, theme) for theme in (LIGHT, DARK))
    figures = [ReportFigure(name, render(light[name], ".svg"), render(dark[name], ".svg")) for name in light]
    file = folders[results[0].path] / "report.html"
    analyses = [(result.analysis.table, result.facts) for result in results]
    with writing("the page", file):
        write_file(file, report_page(analyses, figures, describe_environment(results[0].facts["device"])))
    log(console, f"written  {file}")


def report_figures(results: Sequence[CheckpointAnalysis], theme: Theme) -> dict[str, Drawing]:
    """Return the figures of everything that was measured, by caption."""
    names = unique([result.name for result in results])
    analyses = [result.analysis for result in results]
    runs = [AnalyzedRun(name, analysis.table, analysis.curves) for name, analysis in zip(names, analyses, strict=True)]
    two = sum(FIGURES["similarity"].fits(run) for run in runs) == 2
    drawings: dict[str, Drawing] = {}
    for name, figure in FIGURES.items():
        fitting = [run for run in runs if figure.fits(run)]
        if fitting and name != ("metrics" if two else "compare"):
            drawings[figure.help.removesuffix(".")] = draw_figure(name, fitting, theme)
    if trained := [Path(result.path) for result in results if (Path(result.path) / "metrics.jsonl").is_file()]:
        caption = "Training: loss by term, validation accuracy, and P by layer over the epochs"
        records = zip(unique([run.resolve().name for run in trained]), map(read_records, trained), strict=True)
        drawings[caption] = plot_training(dict(records), theme)
    return drawings
