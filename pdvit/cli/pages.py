"""The pages of `pdvit analyze`: the patch explorer (--explore) and the report (--report)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdvit.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.console import Console

    from pdvit.data.pictures import Pictures

    # Of each checkpoint the table, and what was measured.
    Analyses = Sequence[tuple[pd.DataFrame, dict[str, Any]]]


def check_side_by_side(checkpoints: Sequence[object]) -> None:
    """Raise UserError where one explorer can't show so many."""
    from pdvit.analysis.pages import room

    room(len(checkpoints) or 1)


def explore(
    checkpoints: Sequence[str | Path],
    folders: Sequence[str],
    pictures: "Pictures",
    which: tuple[str | None, str | None],
    device: str,
    console: "Console",
) -> None:
    """Write explorer.html into the first checkpoint's folder, and analysis/maps.npz into each; say what they hold.

    Checkpoints are opened once more, one at a time, so that all of them are shown the same `pictures`. `which` is the
    name of the model and the choice of the weights, where the user gave them. Raises UserError.
    """
    from rich.markup import escape

    from pdvit.analysis.maps import MOST_IMAGES, read_maps, write_maps
    from pdvit.analysis.pages import explorer_page, room
    from pdvit.data.bad_images import BadImages
    from pdvit.data.images import Preprocessing
    from pdvit.engine.device import choose_device
    from pdvit.models.weights import load
    from pdvit.tracking import write_file

    space, shown, bad, models = room(len(checkpoints)), pictures.first(MOST_IMAGES), BadImages(skip=True), []
    for path in checkpoints:
        loaded = load(str(path), *which)
        how = Preprocessing.for_model(loaded.model)
        model = loaded.model.to(choose_device(device))
        models.append(read_maps(model, shown.pixels(how, bad), how.normalise, loaded.name, space))
    notes = [_of_images(pictures, shown, min(len(maps.names) for maps in models), len(bad.found))]
    page = Path(folders[0]) / "explorer.html"
    try:
        for folder, maps in zip(folders, models, strict=True):
            write_maps(Path(folder) / "analysis" / "maps.npz", maps)
        write_file(page, explorer_page(models, notes))
    except OSError as error:
        raise _not_written(page, error) from error
    for note in [*notes, *(f"{maps.model}: {note}" for maps in models for note in maps.notes)]:
        console.print(f"[dim]explorer[/dim] {escape(note)}", highlight=False, soft_wrap=True)
    console.print(f"[dim]written[/dim]  {escape(str(page))}", highlight=False, soft_wrap=True)


def report(analyses: "Analyses", runs: Sequence[Path], folder: Path, console: "Console") -> None:
    """Write report.html into a folder: verdicts, tables, figures, definitions and environment of these analyses.

    `runs` are the checkpoints, for figures of what else lies in their folders. Raises UserError.
    """
    from rich.markup import escape

    from pdvit.analysis.pages import Picture, report_page
    from pdvit.plots.style import to_svg
    from pdvit.tracking import describe_environment, write_file

    drawn = {title: draw(analyses, runs) for title, draw in FIGURES.items()}
    pictures = [Picture(title, to_svg(figure)) for title, figure in drawn.items() if figure is not None]
    file, device = folder / "report.html", str(analyses[0][1]["device"])
    try:
        write_file(file, report_page(analyses, pictures, describe_environment(device)))
    except OSError as error:
        raise _not_written(file, error) from error
    console.print(f"[dim]written[/dim]  {escape(str(file))}", highlight=False, soft_wrap=True)


def _similarity(analyses: "Analyses", runs: Sequence[Path]) -> "Figure | None":
    from pdvit.plots.similarity import plot_similarity

    measured = [(table, facts) for table, facts in analyses if (table["metric"] == "similarity").any()]
    if not measured:
        return None
    return plot_similarity([table for table, _ in measured], [facts["model"] for _, facts in measured])


def _training(analyses: "Analyses", runs: Sequence[Path]) -> "Figure | None":
    from pdvit.plots.training import plot_training, read_records

    trained = [run for run in runs if (run / "metrics.jsonl").is_file()]
    return (
        plot_training([read_records(run) for run in trained], [run.resolve().name for run in trained])
        if trained
        else None
    )


# The figures of a report, in order: what each shows, and how it is drawn; None where there is nothing to draw.
FIGURES: dict[str, Callable[..., "Figure | None"]] = {
    "P by layer: mean over images, and one standard deviation": _similarity,
    "Training: loss by term, validation accuracy, and P by layer over the epochs": _training,
}


def _of_images(pictures: "Pictures", shown: "Pictures", count: int, bad: int) -> str:
    """Say which images the page shows, and which not."""
    total = len(pictures.split)
    which = f"{count} of {total:,}, spread evenly" if count < total else f"all {total}"
    fewer = "; more would make the page larger than 10 MB" if count < len(shown.split) - bad else ""
    broken = f"; {bad} left out that do not decode" if bad else ""
    return f"images: {which} ({pictures.description}){fewer}{broken}"


def _not_written(file: Path, error: OSError) -> UserError:
    return UserError(f"the page can't be written: {error.strerror}", str(file), "choose another --out")
