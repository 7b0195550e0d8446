"""`pdvit predict`."""

import csv
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, TextIO

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
    broken_logits,
    cell,
    open_checkpoint,
    results_folder,
    with_progress,
)
from pdvit.cli.console import log, make_console
from pdvit.cli.pixels import predict_pixels
from pdvit.errors import UserError

if TYPE_CHECKING:
    from pdvit.data.bad_images import BadImages
    from pdvit.data.sources import FileSplit
    from pdvit.engine.terminal import RunConsole
    from pdvit.tasks.classification import Prediction

# Images up to which the terminal shows what was found.
FEW = 20
BAD = ("error", "skip")
TIP = "replace it, or leave such images out: --on-bad-image skip"

Row = tuple[str, int, str, float]


def predict(
    checkpoint: Annotated[
        str, typer.Argument(help="A run directory, timm folder, file of weights, or name of a model.")
    ],
    images: Annotated[list[str], typer.Argument(help="Image files and folders.")],
    top: Annotated[int, typer.Option("--top", min=1, help="How many labels per image, the most probable first.")] = 1,
    on_bad_image: OnBadImage = "error",
    model: Model = None,
    weights: Weights = None,
    out: Annotated[
        str | None, typer.Option("--out", help="The CSV file, - is standard output; of masks the folder.")
    ] = None,
    device: Device = "auto",
    precision: Precision = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    scales: Annotated[bool, typer.Option("--ms", help="Segmentation: average over scales from 0.5 to 1.75.")] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Segmentation: average over mirror images too.")] = False,
) -> int:
    """Label images: the most probable classes with their probabilities, as CSV; or every pixel, as PNG masks."""
    if on_bad_image not in BAD:
        raise UserError(f"'{on_bad_image}' is not known here", "--on-bad-image", f"choose from: {', '.join(BAD)}")
    console, path = make_console(out == "-"), Path(os.path.expanduser(checkpoint))
    log(console, f"opening {checkpoint} ...")
    from pdvit.data.bad_images import BadImages
    from pdvit.data.image_sets import image_files
    from pdvit.engine.distributed import SINGLE_PROCESS
    from pdvit.engine.terminal import stop_on_signals
    from pdvit.models.checkpoints import name_of

    files = image_files(images)
    opened = open_checkpoint(
        path,
        model,
        SINGLE_PROCESS,
        weights=weights,
        device=device,
        precision=precision,
        batch_size=batch_size,
        workers=workers,
    )
    bad = BadImages(skip=True)  # so that those of several batches are named together
    if opened.labels_pixels:
        folder = _folder(path, out, top, name_of(path))
        return _masks(opened, files, folder, (scales, flip), bad, on_bad_image, console)
    if scales or flip:
        raise UserError("the checkpoint labels images, not pixels", "--ms, --flip", "leave them out")
    file = None if out == "-" else _target(path, out, name_of(path))
    labels = _labels(opened, top)
    few: list[Row] = []
    with stop_on_signals() as stop, _stream(file) as stream:  # SIGTERM too must not leave a part of a file
        writer = csv.writer(stream, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(("image", "rank", "label", "probability"))
        for found in _predictions(opened, files, top, bad, on_bad_image == "skip", console):
            if stop:
                raise KeyboardInterrupt
            image = str(files.paths[found.image])
            if not found.finite:
                raise broken_logits(image, path, opened.config.run.precision)
            best = zip(found.classes, found.probabilities, strict=True)
            rows = [(image, rank, labels[label], share) for rank, (label, share) in enumerate(best, 1)]
            writer.writerows(rows)
            few += rows if len(files) <= FEW and file is not None else []
    _report(few, len(files), bad.found, file, console)
    return 0


def _masks(
    opened: Opened,
    files: "FileSplit",
    folder: Path,
    views: tuple[bool, bool],
    bad: "BadImages",
    on_bad_image: str,
    console: "RunConsole",
) -> int:
    """Write a mask for every image, and the same over the image; UserError as `_predictions` has it."""
    from pdvit.data.bad_images import refuse_bad
    from pdvit.engine.terminal import stop_on_signals

    with stop_on_signals() as stop:
        for _ in with_progress(predict_pixels(opened, files, folder, views, bad), len(files), console, "images"):
            if stop:
                raise KeyboardInterrupt
    if on_bad_image != "skip":
        refuse_bad(bad.found, TIP)
    _report([], len(files), bad.found, folder / "masks", console)
    return 0


def _folder(path: Path, out: str | None, top: int, name: str) -> Path:
    """Return the folder for masks; UserError where that can't be, or something is asked that masks do not have."""
    if top > 1 or out == "-":
        flag = "--out -" if out == "-" else f"--top {top}"
        raise UserError("the checkpoint labels pixels, with one class each, in files", flag, "leave it out")
    folder = results_folder(path, None if out is None else Path(os.path.expanduser(out)), "eval", name)
    return folder if out is not None else folder / "predicted"


def _target(path: Path, out: str | None, name: str) -> Path:
    """Return the file to write; UserError where that can't be."""
    file = None if out is None else Path(os.path.expanduser(out))
    if file is not None and os.path.isdir(file):
        raise UserError("there is a folder of this name", f"--out {out}", "name a file, for example predictions.csv")
    folder = results_folder(path, None if file is None else file.parent, "eval", name)
    return file or folder / "predictions.csv"


def _labels(opened: Opened, top: int) -> list[str]:
    """Return the names of the checkpoint's classes, or their numbers; UserError where there are fewer than `top`."""
    from pdvit.models.loading import LoadedModel
    from pdvit.tasks.labels import label_names

    assert isinstance(opened.loaded, LoadedModel)
    model: Any = opened.loaded.model
    labels = label_names(opened.loaded) or [str(number) for number in range(model.num_classes)]
    if top > len(labels):
        raise UserError(f"the checkpoint has {len(labels)} classes", f"--top {top}", "ask for fewer labels")
    return labels


def _predictions(
    opened: Opened, files: "FileSplit", top: int, bad: "BadImages", skip: bool, console: "RunConsole"
) -> "Iterator[Prediction]":
    """Yield what the model says of each image, and collect in `bad` what does not decode.

    Raises UserError for those, once there are as many as it names or at the end, unless they are skipped.
    """
    from pdvit.data.bad_images import NAMED, refuse_bad
    from pdvit.data.loader import eval_batches
    from pdvit.tasks.classification import predict as run

    batches = eval_batches(files, replace(opened.loading, bad=bad))
    batches = with_progress(batches, len(files), console, "images")
    for found in run(opened.loaded.model, batches, top, opened.config.run.precision):
        if not skip and len(bad.found) >= NAMED:
            break
        yield found
    if not skip:
        refuse_bad(bad.found, TIP)


@contextmanager
def _stream(file: Path | None) -> Iterator[TextIO]:
    """Open the file, which is there when it is whole, or standard output; names of any bytes stay as they are."""
    from pdvit.tracking import new_file

    with ExitStack() as stack:
        if file is None:
            stream: BinaryIO = sys.stdout.buffer
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(new_file(file))
        text = TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
        try:
            yield text
        finally:
            text.detach()


def _report(rows: list[Row], images: int, bad: dict[str, str], file: Path | None, console: "RunConsole") -> None:
    """Print what was found in a few images, what was left out, and where the rest stands."""
    from rich.table import Table

    from pdvit.data.sources.split import printable

    if rows:
        view = Table(box=None, pad_edge=False, header_style="bold")
        for name, justify in (("image", "left"), ("label", "left"), ("probability", "right")):
            view.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for image, rank, label, probability in rows:
            view.add_row(cell(image) if rank == 1 else "", cell(label), f"{probability:.1%}")
        console.print(view)
    for name, reason in list(bad.items())[:FEW]:
        log(console, printable(f"skipped  {name} ({reason})"))
    left, done = f", {len(bad):,} skipped that do not decode" if bad else "", images - len(bad)
    log(console, f"{done:,} image{'s' if done != 1 else ''} labelled{left}")
    if file is not None:
        log(console, f"written  {file}")
