"""`pdvit eval`: the metrics of a checkpoint, for images or for pixels."""

import json
import math
import os
import re
from functools import partial
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
from pdvit.cli.runs import process_group
from pdvit.errors import UserError, closest

if TYPE_CHECKING:
    import pandas as pd

    from pdvit.engine.distributed import Ranks
    from pdvit.engine.terminal import RunConsole
    from pdvit.tasks.windows import Network, SlidingWindowConfig

# The pictures of a segmentation, see `tasks.pictures.prediction_pngs`, and the classes that the terminal shows.
PICTURE, WORST = re.compile(r"\d{2,}-(image|truth|prediction)\.png"), 10


def evaluate(
    checkpoint: Checkpoint,
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
    multi_scale: MultiScale = False,
    flip: Flip = False,
    mode: Annotated[
        str | None, typer.Option("--eval-mode", metavar="whole|slide", help="Segmentation; unset: the run's.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", help="Segmentation: pixels from window to window; unset: the run's.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option("--classes", help="Segmentation: table of the classes of --data, as in pdvit segment.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Evaluate the first N images.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> int:
    """Evaluate a checkpoint: accuracy, calibration and the confusion matrix, or the mIoU of a segmentation model."""
    with process_group():
        console, path = make_console(as_json), Path(os.path.expanduser(checkpoint))
        log(console, f"opening {checkpoint} ...")
        from pdvit.engine.distributed import init_process_group

        ranks = init_process_group()
        folder = results_folder(path, out, "eval")
        loading = {"source": data, "batch_size": batch_size, "workers": workers, "on_bad_image": on_bad_image}
        run, segment = {"device": device, "precision": precision}, {"mode": mode, "stride": stride, "classes": classes}
        opened = open_checkpoint(path, ranks, model, weights, data=loading, run=run, segment=segment)
        if data is None and not opened.is_run:
            tip = f"name a source: --data {'scenes' if opened.segmenter else 'digits'}, --data FOLDER"
            raise UserError("no images to evaluate on: the checkpoint is no run", checkpoint, tip)
        flags = {"--ms": multi_scale, "--flip": flip, "--eval-mode": mode, "--stride": stride, "--classes": classes}
        opened.refuse_segmentation_flags(flags)
        windows = opened.windows(multi_scale, flip)
        if windows and windows.mode == "whole" and stride is not None:
            log(console, "note: --stride has no effect: images are evaluated whole")
        numbers, table, files = _evaluate(opened, windows, split, limit, console, ranks)
        if ranks.main:
            file = _write(folder, numbers, files)
            _print(numbers, table, console)
            names = ", ".join(dict.fromkeys(name.split("/")[0] for name in files))
            log(console, f"written  {file}, {names}")
            log(console, f"next     pdvit plot {'segmentation' if windows else 'confusion'} {folder}")
            if as_json:
                print(json.dumps(numbers | {"file": str(file)}, indent=2))
        return 0


def _evaluate(
    opened: OpenedCheckpoint,
    windows: "SlidingWindowConfig | None",
    split: str | None,
    limit: int | None,
    console: "RunConsole",
    ranks: "Ranks",
) -> "tuple[dict[str, Any], pd.DataFrame, dict[str, bytes]]":
    """Return the numbers of a split, its table by class, and the files to write; `windows` belong to segmentation."""
    import torch

    from pdvit.data.loader import eval_batches
    from pdvit.data.masks.batches import eval_batches as mask_batches
    from pdvit.data.masks.folders import open_masks
    from pdvit.data.masks.split import MaskSplit
    from pdvit.data.sources.opening import open_source
    from pdvit.engine.device import device_name
    from pdvit.tasks import metrics
    from pdvit.tasks.labels import match_classes
    from pdvit.tasks.pictures import prediction_pngs
    from pdvit.tasks.segmentation import pixel_network

    config, loader, precision, model = opened.config, opened.loader, opened.config.run.precision, opened.loaded.model
    source = open_masks(config.data, config.segment) if windows else open_source(config.data)
    order, matched = match_classes(opened.loaded, source.classes, source.name)
    split = split or source.final_split
    if split not in source.splits:
        raise UserError(f"{source.name} has no split '{split}'", "--split", closest(split, source.splits))
    images, classes = source.splits[split], metrics.unique_names(source.classes)
    if limit is not None and limit < len(images):
        images = images.take(torch.arange(limit))
    network: Network = pixel_network(model) if windows else model
    ordered: Network = network if order is None else lambda seen: network(seen)[:, order]
    progress = partial(with_progress, total=len(images) // ranks.world_size, console=console, what=split)
    scores: metrics.ClassificationScores | metrics.SegmentationScores
    pictures: dict[str, bytes] = {}
    if windows is None:
        metric = metrics.ClassificationMetric(len(classes), loader.device, confusion=True)
        batches = progress(eval_batches(images, loader))
        scores = metrics.evaluate_classification(ordered, batches, metric, precision, ranks)
        names = ("accuracy", "accuracy_top5", "loss", "calibration_error")
        numbers = {name: getattr(scores, name) for name in names} | {"batch_size": loader.batch_size}
        assert scores.confusion is not None
        table = metrics.class_table(scores.confusion, classes)
        files = {"eval.csv": table, "confusion.csv": metrics.confusion_table(scores.confusion, classes)}
    else:
        assert isinstance(images, MaskSplit)
        pixels = metrics.SegmentationMetric(len(classes), loader.device)
        batches = progress(mask_batches(images, loader, config.segment))
        scores = metrics.evaluate_segmentation(ordered, batches, pixels, windows, precision, ranks)
        table = metrics.class_table(scores.confusion, classes, scores.iou)
        iou = dict(zip(classes, (None if value != value else value for value in scores.iou.tolist()), strict=True))
        settings = {name: getattr(windows, name) for name in ("mode", "window", "stride", "scales", "flip")}
        numbers = scores.record() | {"iou": iou} | settings
        files = {"iou.csv": table}
        if ranks.main and not scores.broken:
            pictures = prediction_pngs(ordered, images, source, loader, config, windows)
    if scores.broken:
        raise opened.not_finite(f"{scores.broken} of {scores.images} images")
    metadata = ({"task": "segmentation"} if windows else {}) | {
        "checkpoint": str(opened.path),
        "model": opened.loaded.name,
        "weights": opened.loaded.weights,
        "data": source.name,
        "split": split,
        "images": scores.images,
        "bad_images": len(images) - scores.images,
        "classes": len(classes),
        "matched": matched,
        "precision": precision,
        "device": device_name(loader.device),
        "processes": ranks.world_size,
    }
    return metadata | numbers, table, {name: metrics.csv_bytes(it) for name, it in files.items()} | pictures


def _write(folder: Path, numbers: dict[str, Any], files: dict[str, bytes]) -> Path:
    """Write the files, eval.json last, and remove the pictures of an earlier evaluation."""
    from pdvit.tracking import to_json, write_file, writing

    with writing("the results", folder):
        folder.mkdir(parents=True, exist_ok=True)
        for picture in (folder / "predictions").glob("*.png"):
            if PICTURE.fullmatch(picture.name) and f"predictions/{picture.name}" not in files:
                picture.unlink()
        for name, content in (files | {"eval.json": f"{to_json(numbers)}\n".encode()}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_file(folder / name, content)
    return folder / "eval.json"


def _print(numbers: dict[str, Any], table: "pd.DataFrame", console: "RunConsole") -> None:
    """Print the classes of lowest accuracy or IoU, and the metrics."""
    from rich.table import Table

    from pdvit.data.sources import printable

    by, (count, *fractions) = "iou" if "iou" in table else "accuracy", table.columns[1:-2]
    title = f"the {WORST} of {len(table)} classes with the lowest {by}" if len(table) > WORST else "by class"
    view = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in ("class", count, *fractions, "most confused with"):
        view.add_column(name, justify="left" if name in ("class", "most confused with") else "right")
    for _, row in table.sort_values(by, kind="stable").head(WORST).iterrows():
        wrong = f"{row['confused_with']} ({row['confused']:,})" if row["confused"] else "-"
        shown = (percent(row[name]) for name in fractions)
        view.add_row(cell(row["class"]), f"{row[count]:,}", *shown, cell(wrong))
    console.print()
    console.print(view)
    names = {"miou": "mIoU", "accuracy": "accuracy", "accuracy_mean": "accuracy by class", "accuracy_top5": "top 5"}
    scores = [f"{text} {percent(numbers[name])}" for name, text in names.items() if numbers.get(name) is not None]
    names = {"loss": "loss", "calibration_error": "calibration error"}
    scores += [f"{text} {numbers[name]:.3f}" for name, text in names.items() if name in numbers]
    images = f"{numbers['images']:,} images of {printable(numbers['data'])}"
    log(console, f"\n{numbers['split']} {', '.join(scores)} ({images})")
    if by == "iou":
        windows = f"windows of {numbers['window']}, {numbers['stride']} apart"
        large = f", {numbers['in_windows']} large ones in windows" if "in_windows" in numbers else ""
        mode = windows if numbers["mode"] == "slide" else f"whole images{large}"
        log(console, f"views    {mode}; scales {numbers['scales']}{', mirrored too' if numbers['flip'] else ''}")
    log(console, "weights  {weights}; {precision} on {device}; classes matched {matched}".format(**numbers))


def percent(fraction: float | None) -> str:
    """Return a fraction as a percentage, a dash if it is missing."""
    return "-" if fraction is None or math.isnan(fraction) else f"{fraction:.1%}"
