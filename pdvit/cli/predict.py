"""`pdvit predict`: labels of images as CSV, or masks and overlays as PNG."""

import csv
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pdvit.cli.checkpoint import (
    BatchSize,
    Checkpoint,
    Device,
    Flip,
    Model,
    MultiScale,
    OnBadImage,
    OpenedCheckpoint,
    Precision,
    Weights,
    Workers,
    open_checkpoint,
    results_folder,
)
from pdvit.cli.console import cell, log, make_console, with_progress
from pdvit.errors import UserError

if TYPE_CHECKING:
    from _csv import Writer

    from pdvit.data.sources.split import FileSplit
    from pdvit.engine.terminal import RunConsole
    from pdvit.tasks.windows import SlidingWindowConfig

# Number of images up to which the terminal shows the labels, and of skipped images that it names.
FEW = 20
TIP = "replace it, or leave such images out: --on-bad-image skip"

Row = tuple[str, int, str, float]  # image, rank, label, probability


def predict(
    checkpoint: Checkpoint,
    images: Annotated[list[str], typer.Argument(help="Image files and folders.")],
    top: Annotated[int, typer.Option("--top", min=1, help="Labels per image, the most probable first.")] = 1,
    on_bad_image: OnBadImage = "error",
    model: Model = None,
    weights: Weights = None,
    out: Annotated[
        str | None, typer.Option("--out", help="The CSV file, - for standard output; the folder of masks.")
    ] = None,
    device: Device = "auto",
    precision: Precision = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    multi_scale: MultiScale = False,
    flip: Flip = False,
) -> int:
    """Label images with their most probable classes, as CSV; or every pixel, as PNG masks."""
    console, path = make_console(out == "-"), Path(os.path.expanduser(checkpoint))
    log(console, f"opening {checkpoint} ...")
    from pdvit.data.image_sets import image_files
    from pdvit.data.images import NAMED, BadImages, refuse_bad
    from pdvit.engine.distributed import SINGLE_PROCESS
    from pdvit.engine.terminal import stop_on_signals

    files = image_files(images)
    loading = {"batch_size": batch_size, "workers": workers, "on_bad_image": on_bad_image}
    run = {"device": device, "precision": precision}
    opened = open_checkpoint(path, SINGLE_PROCESS, model, weights, data=loading, run=run)
    opened.refuse_segmentation_flags({"--ms": multi_scale, "--flip": flip})
    windows, target = opened.windows(multi_scale, flip), _target(opened, out, top)
    skip, bad = on_bad_image == "skip", BadImages(skip=True)  # so that those of several batches are named together
    opened = replace(opened, loader=replace(opened.loader, bad=bad))
    predictions = _masks(opened, files, target, windows) if windows else _labels(opened, files, top, console)
    shown: list[Row] = []
    # SIGTERM too must not leave a partial file.
    with stop_on_signals() as stop, nullcontext() if windows else _csv_writer(target) as writer:
        for rows in predictions:
            if stop:
                raise KeyboardInterrupt
            if not skip and len(bad.found) >= NAMED:
                break
            if writer:
                writer.writerows(rows)
            shown += rows if len(files) <= FEW and target else []
        if not skip:
            refuse_bad(bad.found, TIP)
    _print(shown, len(files), bad.found, console)
    if target:
        log(console, f"written  {target / 'masks' if windows else target}")
    return 0


def _target(opened: OpenedCheckpoint, out: str | None, top: int) -> Path | None:
    """Return the CSV file to write, None for standard output; of a segmentation model the folder."""
    path = None if out in (None, "-") else Path(os.path.expanduser(str(out)))
    if opened.segmenter:
        if top > 1 or out == "-":
            flag = "--out -" if out == "-" else f"--top {top}"
            raise UserError("the checkpoint labels pixels, with one class each, in files", flag, "leave it out")
        folder = results_folder(opened.path, path, "eval")
        return folder if path else folder / "predicted"
    if out == "-":
        return None
    if path and os.path.isdir(path):
        raise UserError("this is a folder", f"--out {out}", "name a file, for example predictions.csv")
    folder = results_folder(opened.path, path.parent if path else None, "eval")
    return path or folder / "predictions.csv"


def _labels(opened: OpenedCheckpoint, files: "FileSplit", top: int, console: "RunConsole") -> Iterator[list[Row]]:
    """Yield the most probable classes of each image with their probabilities."""
    from pdvit.data.loader import eval_batches
    from pdvit.models.loading import LoadedModel
    from pdvit.tasks import classification
    from pdvit.tasks.labels import label_names

    assert isinstance(opened.loaded, LoadedModel)
    model: Any = opened.loaded.model
    labels = label_names(opened.loaded) or [str(number) for number in range(model.num_classes)]
    if top > len(labels):
        raise UserError(f"the checkpoint has {len(labels)} classes", f"--top {top}", "ask for fewer labels")
    batches = with_progress(eval_batches(files, opened.loader), len(files), console, "images")
    for found in classification.predict(model, batches, top, opened.config.run.precision):
        image = str(files.paths[found.image])
        if not found.finite:
            raise opened.not_finite(image)
        best = zip(found.classes, found.probabilities, strict=True)
        yield [(image, rank, labels[label], probability) for rank, (label, probability) in enumerate(best, 1)]


def _masks(
    opened: OpenedCheckpoint, files: "FileSplit", folder: Path | None, windows: "SlidingWindowConfig"
) -> Iterator[list[Row]]:
    """Write the mask of each image, a palette PNG of its size, and the mask over the image; yield no rows for each."""
    from pdvit.data.images import BadImage, try_read
    from pdvit.data.masks.batches import evaluation_pixels
    from pdvit.data.masks.table import default_palette
    from pdvit.engine.device import autocast
    from pdvit.tasks.pictures import overlay, palette_image, png, predict_mask
    from pdvit.tasks.segmentation import pixel_network
    from pdvit.tracking import write_file

    loaded, loader = opened.segmenter, opened.loader
    assert loaded is not None
    assert folder is not None
    palette, classes = loaded.palette or default_palette(len(loaded.classes)), len(loaded.classes)
    side, interpolation = loaded.segment.short_side, loader.preprocessing.interpolation
    for index, name in enumerate(_mask_names(files)):
        image = try_read(files, index)
        if isinstance(image, BadImage):
            loader.bad.add([image])
        else:
            pixels = evaluation_pixels(image, side, interpolation)[None].to(loader.device)
            pixels, size = loader.preprocessing.normalise(pixels), image.size[::-1]
            with autocast(loader.device, opened.config.run.precision):
                mask = predict_mask(pixel_network(loaded.model), pixels, size, classes, windows)
            pictures = {"masks": palette_image(mask, palette), "overlays": overlay(image, mask, palette)}
            for part, picture in pictures.items():
                file = folder / part / name
                file.parent.mkdir(parents=True, exist_ok=True)
                write_file(file, png(picture))
        yield []


def _mask_names(files: "FileSplit") -> list[Path]:
    """Return the name of each image as a PNG, with the folders in which images of the same name differ.

    Raises UserError if two differ in the ending only.
    """
    paths = [Path(os.path.abspath(path)) for path in files.paths]
    names = [Path(path.stem + ".png") for path in paths]
    if len(set(names)) < len(names):
        common = os.path.commonpath([path.parent for path in paths])
        names = [path.relative_to(common).with_suffix(".png") for path in paths]
    first = {name: index for index, name in reversed(list(enumerate(names)))}
    if twice := next((path for index, path in enumerate(paths) if first[names[index]] < index), None):
        what = f"two images would have the mask {twice.with_suffix('.png').name}"
        raise UserError(what, str(twice), "label them one after another, each with its own --out")
    return names


@contextmanager
def _csv_writer(file: Path | None) -> "Iterator[Writer]":
    """Open a CSV file, which appears when it is complete, or standard output; names of any bytes are kept."""
    from pdvit.tracking import new_file

    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext(sys.stdout.buffer) if file is None else new_file(file) as stream:
        text = TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
        try:
            writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
            writer.writerow(("image", "rank", "label", "probability"))
            yield writer
        finally:
            text.detach()


def _print(rows: list[Row], images: int, bad: dict[str, str], console: "RunConsole") -> None:
    """Print the labels of a few images, the skipped images, and the number of images."""
    from rich.table import Table

    from pdvit.data.sources import printable

    if rows:
        view = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("image", "label"):
            view.add_column(name, overflow="fold")  # whole names, even in a narrow terminal
        view.add_column("probability", justify="right")
        for image, rank, label, probability in rows:
            view.add_row(cell(image) if rank == 1 else "", cell(label), f"{probability:.1%}")
        console.print(view)
    for name, reason in list(bad.items())[:FEW]:
        log(console, printable(f"skipped  {name} ({reason})"))
    count = images - len(bad)
    skipped = f", {len(bad):,} skipped that do not decode" if bad else ""
    log(console, f"{count:,} image{'s' if count != 1 else ''} labelled{skipped}")
