"""The pages of `pdvit analyze`: the patch explorer (--explore) and the report (--report)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdvit.cli.console import log

if TYPE_CHECKING:
    from pdvit.cli.measured import Asked, Measured
    from pdvit.data.pictures import Pictures
    from pdvit.engine.display import RunConsole
    from pdvit.plots.style import Drawing, Theme


def check_side_by_side(checkpoints: Sequence[object]) -> None:
    """Raise UserError where one explorer can't show so many."""
    from pdvit.analysis.pages import room

    room(len(checkpoints) or 1)


def explore(folders: Mapping[str, Path], pictures: "Pictures", asked: "Asked", console: "RunConsole") -> None:
    """Write explorer.html into the first checkpoint's folder, and analysis/maps.npz into each; say what they hold.

    `folders` says where the results of each checkpoint go. Checkpoints are opened once more, one at a time, so that all
    of them are shown the same `pictures`. Raises UserError.
    """
    from pdvit.analysis.maps import MOST_IMAGES, read_maps, write_maps
    from pdvit.analysis.pages import explorer_page, room
    from pdvit.analysis.report import MAPS
    from pdvit.cli.measured import placed
    from pdvit.data.bad_images import BadImages
    from pdvit.data.preprocessing import Preprocessing
    from pdvit.engine.device import choose_device
    from pdvit.models.weights import load
    from pdvit.tracking import write_file, writing

    space, shown, bad, models = room(len(folders)), pictures.subsample(MOST_IMAGES), BadImages(skip=True), []
    for path in folders:
        loaded = load(path, asked.model, asked.weights)
        how = Preprocessing.for_model(loaded.model)
        model = placed(loaded.model, choose_device(asked.device), path)
        models.append(read_maps(model, shown.pixels(how, bad), how.normalise, loaded.name, space))
    notes = [_of_images(pictures, shown, min(len(maps.names) for maps in models), len(bad.found))]
    page = next(iter(folders.values())) / "explorer.html"
    with writing("the page", page):
        for folder, maps in zip(folders.values(), models, strict=True):
            write_maps(folder / "analysis" / MAPS, maps)
        write_file(page, explorer_page(models, notes))
    for note in [*notes, *(f"{maps.model}: {note}" for maps in models for note in maps.notes)]:
        log(console, f"explorer {note}")
    log(console, f"written  {page}")


def report(done: "Sequence[Measured]", folders: Mapping[str, Path], console: "RunConsole") -> None:
    """Write report.html beside the first analysis: verdicts, tables, figures, definitions and environment.

    `folders` says where the results of each checkpoint are. Raises UserError.
    """
    from pdvit.analysis.pages import Picture, report_page
    from pdvit.plots.style import DARK, LIGHT, render
    from pdvit.tracking import describe_environment, write_file, writing

    pictures = []
    for title, draw in FIGURES.items():
        light, dark = (draw(done, theme) for theme in (LIGHT, DARK))
        if light and dark:
            pictures.append(Picture(title, render(light, ".svg"), render(dark, ".svg")))
    file = folders[done[0].path] / "report.html"
    analyses = [(measured.analysis.table, measured.facts) for measured in done]
    with writing("the page", file):
        write_file(file, report_page(analyses, pictures, describe_environment(done[0].facts["device"])))
    log(console, f"written  {file}")


def _similarity(done: "Sequence[Measured]", theme: "Theme") -> "Drawing | None":
    from pdvit.plots.similarity import METRIC, plot_similarity

    found = _with(done, METRIC)
    return plot_similarity(_tables(found), _names(found), theme) if found else None


def _compare(done: "Sequence[Measured]", theme: "Theme") -> "Drawing | None":
    from pdvit.plots.compare import plot_compare
    from pdvit.plots.similarity import METRIC

    found = _with(done, METRIC)
    return plot_compare(_tables(found), _names(found), theme) if len(found) == 2 else None


def _metrics(done: "Sequence[Measured]", theme: "Theme") -> "Drawing | None":
    from pdvit.plots.metrics import plot_metrics
    from pdvit.plots.similarity import METRIC

    if len(_with(done, METRIC)) == 2:  # then `_compare` shows them
        return None
    return plot_metrics(_tables(done), _names(done), theme)


def _norms(done: "Sequence[Measured]", theme: "Theme") -> "Drawing | None":
    from pdvit.plots.norms import NEEDED, plot_norms

    found = _with(done, *NEEDED)
    return plot_norms(_tables(found), _names(found), theme) if found else None


def _pairs(done: "Sequence[Measured]", theme: "Theme") -> "Drawing | None":
    from pdvit.plots.pairs import plot_pairs

    found = _with_curves(done, "pairs")
    return plot_pairs([one.analysis.curves["pairs"] for one in found], _names(found), theme) if found else None


def _spectrum(done: "Sequence[Measured]", theme: "Theme") -> "Drawing | None":
    from pdvit.plots.spectrum import plot_spectrum

    found = _with_curves(done, "spectrum")
    arrays = [one.analysis.curves["spectrum"] for one in found]
    return plot_spectrum(arrays, _tables(found), _names(found), theme) if found else None


def _attention(done: "Sequence[Measured]", theme: "Theme") -> "Drawing | None":
    from pdvit.plots.attention import plot_attention

    found = _with_curves(done, "attention")
    arrays = [one.analysis.curves["attention"] for one in found]
    return plot_attention(arrays, _tables(found), _names(found), theme) if found else None


def _cka(done: "Sequence[Measured]", theme: "Theme") -> "Drawing | None":
    from pdvit.plots.cka import plot_cka

    found = _with_curves(done, "cka")
    arrays = [one.analysis.curves["cka"] for one in found]
    return plot_cka(arrays, _names(found), theme=theme) if found else None


def _training(done: "Sequence[Measured]", theme: "Theme") -> "Drawing | None":
    from pdvit.plots.training import plot_training, read_records

    runs = [Path(one.path) for one in done if (Path(one.path) / "metrics.jsonl").is_file()]
    names = [run.resolve().name for run in runs]
    return plot_training([read_records(run) for run in runs], names, theme) if runs else None


# The figures of a report, in order: what each shows, and how it is drawn; None where there is nothing to draw.
FIGURES: "dict[str, Callable[[Sequence[Measured], Theme], Drawing | None]]" = {
    "P by layer: mean over images, and one standard deviation": _similarity,
    "The two checkpoints: P, its difference with a 95 % interval, and all other metrics": _compare,
    "All metrics by layer": _metrics,
    "Lengths of the tokens: mean, spread and outliers": _norms,
    "Cosines of all pairs of patches, by layer": _pairs,
    "Amplitude by spatial frequency, by layer": _spectrum,
    "Attention: entropy and distance by head": _attention,
    "Which layers tell images apart alike: linear CKA": _cka,
    "Training: loss by term, validation accuracy, and P by layer over the epochs": _training,
}


def _with(done: "Sequence[Measured]", *metrics: str) -> "list[Measured]":
    return [one for one in done if set(metrics) <= set(one.analysis.table["metric"])]


def _with_curves(done: "Sequence[Measured]", group: str) -> "list[Measured]":
    return [one for one in done if group in one.analysis.curves]


def _tables(done: "Sequence[Measured]") -> list[Any]:
    return [one.analysis.table for one in done]


def _names(done: "Sequence[Measured]") -> list[str]:
    return [one.name for one in done]


def _of_images(pictures: "Pictures", shown: "Pictures", count: int, bad: int) -> str:
    """Say which images the page shows, and which not."""
    total = len(pictures.split)
    which = f"{count} of {total:,}, spread evenly" if count < total else f"all {total}"
    fewer = "; more would make the page larger than 10 MB" if count < len(shown.split) - bad else ""
    broken = f"; {bad} left out that do not decode" if bad else ""
    return f"images: {which} ({pictures.description}){fewer}{broken}"
