"""`pdvit eval`."""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pdvit.cli.checkpoint import (
    BatchSize,
    Device,
    Model,
    OnBadImage,
    Opened,
    Precision,
    Weights,
    Workers,
    cell,
    config_of,
    open_checkpoint,
    results_folder,
    with_progress,
)
from pdvit.cli.console import log, make_console
from pdvit.cli.pixels import Asked, measure_pixels, report_pixels
from pdvit.cli.results import WORST, Evaluation, facts_of, first_of, share, split_named
from pdvit.cli.runs import process_group
from pdvit.errors import UserError

if TYPE_CHECKING:
    from pdvit.engine.distributed import Ranks
    from pdvit.engine.terminal import RunConsole

# The pictures that a segmentation leaves, see `tasks.pictures.prediction_pngs`.
PICTURE = re.compile(r"\d{2,}-(image|truth|prediction)\.png")


def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(help="A run directory, timm folder, file of weights, or name of a model.")
    ],
    data: Annotated[str | None, typer.Option("--data", help="A source; unset: that of the run.")] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="train, val or test; unset: that of the run's closing numbers.")
    ] = None,
    model: Model = None,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the results.")] = None,
    device: Device = "auto",
    precision: Precision = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    on_bad_image: OnBadImage = None,
    scales: Annotated[bool, typer.Option("--ms", help="Segmentation: average over scales from 0.5 to 1.75.")] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Segmentation: average over mirror images too.")] = False,
    mode: Annotated[
        str | None,
        typer.Option(
            "--eval-mode", metavar="whole|slide", help="Segmentation: whole images, or windows; unset: as its run."
        ),
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", help="Segmentation: pixels from window to window; unset: as its run.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option("--classes", help="Segmentation: table of the classes of --data, as pdvit segment.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Measure the first so many images.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> int:
    """Measure a checkpoint: accuracy, calibration and what is taken for what, or mIoU where it labels pixels."""
    with process_group():
        console, path = make_console(as_json), Path(os.path.expanduser(checkpoint))
        log(console, f"opening {checkpoint} ...")
        from pdvit.engine.distributed import init_process_group
        from pdvit.models.checkpoints import name_of

        ranks = init_process_group()
        folder = results_folder(path, out, "eval", name_of(path))
        opened = open_checkpoint(
            path,
            model,
            ranks,
            weights=weights,
            device=device,
            precision=precision,
            batch_size=batch_size,
            workers=workers,
            source=data,
            on_bad_image=on_bad_image,
        )
        if data is None and config_of(path) is None:
            made = "scenes" if opened.labels_pixels else "digits"
            tip = f"name a source: --data {made}, --data FOLDER"
            raise UserError("nothing says on which images", checkpoint, tip)
        if opened.labels_pixels:
            asked = Asked(split, limit, scales, flip, mode, stride, classes, data)
            found = measure_pixels(opened, path, asked, console, ranks)
        elif scales or flip or any(option is not None for option in (mode, stride, classes)):
            what = "the checkpoint labels images, not pixels"
            tip = "leave them out: they are for segmentation"
            raise UserError(what, "--ms, --flip, --eval-mode, --stride, --classes", tip)
        else:
            found = _measure(opened, path, split, limit, console, ranks)
        if ranks.main:
            file = _write(folder, found)
            (report_pixels if opened.labels_pixels else _report)(found, file, console)
            if as_json:
                print(json.dumps(found.facts | {"file": str(file)}, indent=2))
            else:
                log(console, f"next     pdvit plot {'segmentation' if opened.labels_pixels else 'confusion'} {folder}")
        return 0


def _measure(
    opened: Opened, path: Path, split: str | None, limit: int | None, console: "RunConsole", ranks: "Ranks"
) -> Evaluation:
    """Measure a split and return what came out, in numbers and by class."""
    from pdvit.data.loader import eval_batches
    from pdvit.data.sources import open_source
    from pdvit.models.loading import LoadedModel
    from pdvit.tasks.labels import match_classes
    from pdvit.tasks.metrics import (
        ClassificationMetric,
        class_table,
        confusion_table,
        csv_bytes,
        evaluate_classification,
        unique_names,
    )

    assert isinstance(opened.loaded, LoadedModel)
    loaded = opened.loaded
    source = open_source(opened.config.data)
    order, matched = match_classes(loaded, source.classes, source.name)
    name = split_named(source, split)
    images = first_of(source.splits[name], limit)
    batches = eval_batches(images, opened.loading)
    net = loaded.model
    scores = evaluate_classification(
        net if order is None else lambda images: net(images)[:, order],
        with_progress(batches, len(images) // ranks.world_size, console, name),
        ClassificationMetric(len(source.classes), opened.device, confusion=True),
        opened.config.run.precision,
        ranks,
    )
    facts = {
        **facts_of(opened, path, source, name, images, matched, scores),
        "accuracy": scores.accuracy,
        "accuracy_top5": scores.accuracy_top5,
        "loss": scores.loss,
        "calibration_error": scores.calibration_error,
        "batch_size": opened.loading.batch_size,
    }
    assert scores.confusion is not None
    classes = unique_names(source.classes)
    table = class_table(scores.confusion, classes)
    tables = {"eval.csv": table, "confusion.csv": confusion_table(scores.confusion, classes)}
    return Evaluation(facts, table, {name: csv_bytes(table) for name, table in tables.items()})


def _write(folder: Path, found: Evaluation) -> Path:
    """Write the files, and eval.json last; UserError where the place can't be written."""
    from pdvit.tracking import to_json, write_file, writing

    with writing("the results", folder):
        folder.mkdir(parents=True, exist_ok=True)
        for picture in (folder / "predictions").glob("*.png"):  # those of another evaluation are not this one's
            if PICTURE.fullmatch(picture.name) and f"predictions/{picture.name}" not in found.files:
                picture.unlink()
        for name, content in (found.files | {"eval.json": f"{to_json(found.facts)}\n".encode()}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_file(folder / name, content)
    return folder / "eval.json"


def _report(found: Evaluation, file: Path, console: "RunConsole") -> None:
    """Print the numbers, and the classes that are told worst."""
    from rich.table import Table

    from pdvit.data.sources.split import printable

    facts, table = found.facts, found.table
    top5 = "" if facts["accuracy_top5"] is None else f", among the five most probable {facts['accuracy_top5']:.1%}"
    images = f"{facts['images']:,} images of {printable(facts['data'])}"
    worst = table.sort_values("accuracy", kind="stable").head(WORST)
    of = f"the {WORST} worst of {len(table)} classes" if len(table) > WORST else "by class"
    view = Table(title=of, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in ("class", "images", "accuracy", "precision", "most taken for"):
        view.add_column(name, justify="left" if name in ("class", "most taken for") else "right")
    for _, row in worst.iterrows():
        wrong = cell(f"{row['confused_with']} ({row['confused']})" if row["confused"] else "-")
        view.add_row(cell(row["class"]), str(row["images"]), share(row["accuracy"]), share(row["precision"]), wrong)
    console.print()
    console.print(view)
    log(
        console,
        f"\n{facts['split']} accuracy {facts['accuracy']:.1%}{top5}, loss {facts['loss']:.3f}, "
        f"calibration error {facts['calibration_error']:.3f} ({images})\n"
        f"weights  {facts['weights']}; {facts['precision']} on {facts['device']}; classes matched {facts['matched']}\n"
        f"written  {file}, eval.csv, confusion.csv",
    )
