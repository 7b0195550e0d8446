"""`pdvit eval`: the metrics of a checkpoint. `pdvit predict`: labels of images as CSV, or masks of pixels as PNG."""

import csv
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pdvit.cli.options import checkpoint_command, opening_arguments, results_folder
from pdvit.config.schema import KEYS
from pdvit.errors import UserError, command, printable
from pdvit.tasks import describe_metrics
from pdvit.tracking.run_directory import check_path, to_json, write_file, writing
from pdvit.workflows.console import count, log, make_console, process_group, with_progress

if TYPE_CHECKING:
    import pandas as pd

    from pdvit.data.sources.split import FileSplit
    from pdvit.engine.distributed import Ranks
    from pdvit.engine.terminal import RunConsole
    from pdvit.tasks.windows import Network, SlidingWindowConfig
    from pdvit.workflows.checkpoint import OpenedCheckpoint

Checkpoint = Annotated[
    str, typer.Argument(metavar="CKPT", help="A run directory, timm folder, file of weights, or name of a model.")
]
MultiScale = Annotated[bool, typer.Option("--ms", help="Segmentation: average over scales from 0.5 to 1.75.")]
Flip = Annotated[bool, typer.Option("--flip", help="Segmentation: average over mirror images too.")]
OF_PIXELS = ("segment.mode", "segment.stride", "segment.classes")  # settings of an evaluation
MAX_CLASSES, MAX_IMAGES = 10, 20  # in the terminal

Row = tuple[str, int, str, float]  # image, rank, label, probability


@partial(checkpoint_command, more=OF_PIXELS)
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[str | None, typer.Option(help="A source; unset: that of the run.")] = None,
    split: Annotated[str | None, typer.Option(help="train, val, test or all; unset: as at the run's end.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
    multi_scale: MultiScale = False,
    flip: Flip = False,
    limit: Annotated[int | None, typer.Option(min=1, metavar="<int>", help="Evaluate N images, spread evenly.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
    **opening: Any,
) -> int:
    """Measure accuracy and calibration, or the mIoU, of a checkpoint."""
    with process_group():
        console, path = make_console(as_json), Path(os.path.expanduser(checkpoint))
        check_path(checkpoint)
        log(console, f"opening {checkpoint} ...")
        from pdvit.engine.distributed import init_process_group
        from pdvit.workflows.checkpoint import open_checkpoint

        ranks = init_process_group()
        of_pixels = {KEYS[name].flags[0]: opening[name.replace(".", "_")] for name in OF_PIXELS}
        with ranks.raise_on_all_ranks():
            folder = results_folder(path, out, "eval")
            opened = open_checkpoint(path, ranks, **opening_arguments(opening | {"data_source": data}))
            windows = opened.windows({"--ms": multi_scale, "--flip": flip} | of_pixels)
            if data is None and not opened.is_run:
                tip = f"name a source: --data {'scenes' if windows else 'digits'}, --data FOLDER"
                raise UserError("no images to evaluate on: the checkpoint is no run", checkpoint, tip)
        if windows and windows.mode == "whole" and opening["segment_stride"] is not None:
            log(console, "note: --stride has no effect: images are evaluated whole")
        numbers, table, files = _evaluate(opened, windows, data is None, split, limit, console, ranks)
        if ranks.main:
            if out is None and numbers["part"]:  # the run's own files stay
                folder /= f"eval-{numbers['part']}"
            file = _write(folder, numbers, files)
            _print_scores(numbers, table, console)
            names = ", ".join(dict.fromkeys(name.split("/")[0] for name in files))
            log(console, f"written  {file}, {names}")
            figure = "segmentation" if windows else "confusion"
            log(console, f"next     {command('plot', figure, folder)}", "accent", words=True)
            if as_json:
                print(json.dumps(numbers | {"file": str(file)}, indent=2))
        return 0


def _evaluate(
    opened: "OpenedCheckpoint",
    windows: "SlidingWindowConfig | None",
    own: bool,
    split: str | None,
    limit: int | None,
    console: "RunConsole",
    ranks: "Ranks",
) -> "tuple[dict[str, Any], pd.DataFrame, dict[str, bytes]]":
    """Return numbers of a split (`own`: of the run's data), the table by class, and files; masks have `windows`."""
    from pdvit.data.loader import eval_batches
    from pdvit.data.masks.batches import eval_batches as mask_batches
    from pdvit.data.masks.folders import open_masks
    from pdvit.data.opening import open_source
    from pdvit.data.sources import run_name
    from pdvit.data.sources.split import subsample
    from pdvit.engine.device import device_name
    from pdvit.tasks import metrics
    from pdvit.tasks.segmentation import pixel_network, prediction_pngs
    from pdvit.workflows.checkpoint import match_classes

    config, loader, precision, model = opened.config, opened.loader, opened.config.run.precision, opened.loaded.model
    data = config.data if own else replace(config.data, train_split=None, val_split=None)
    with ranks.raise_on_all_ranks():
        source = open_masks(data, config.segment, training=own) if windows else open_source(data, training=own)
        order, matched = match_classes(opened.loaded, source.classes, source.name)
        split = split or source.final_split
        whole: Any = source.select(split)
    images: Any = whole if limit is None else subsample(whole, limit)
    part = f"{split}-{len(images)}" if len(images) < len(whole) else split
    partial = part != source.final_split or (opened.is_run and not own)
    name = f"all of {source.name}" if split == "all" else f"the {split} split of {source.name}"
    spread = "" if images is whole else f" of {len(whole):,}, spread evenly"
    for line in (f"evaluating {name}: {count(len(images), 'image')}{spread}", *source.notes, *opened.loaded.notes):
        log(console, printable(line), words=True)
    classes = metrics.unique_names(source.classes)
    network: Network = pixel_network(model) if windows else model
    ordered: Network = network if order is None else lambda seen: network(seen)[:, order]
    batches = mask_batches(images, loader, config.segment) if windows else eval_batches(images, loader)
    batches = with_progress(batches, len(images) // ranks.world_size, console, split)
    metric: metrics.ClassificationMetric | metrics.SegmentationMetric
    if windows:
        metric = metrics.SegmentationMetric(len(classes), windows, loader.device)
    else:
        metric = metrics.ClassificationMetric(len(classes), loader.device, confusion=True)
    scores = metrics.evaluate(ordered, batches, metric, precision, ranks)
    if scores.broken:
        raise opened.not_finite(f"{scores.broken} of {count(scores.images, 'image')}")
    numbers = {
        "checkpoint": str(opened.path),
        "model": opened.loaded.name,
        "weights": opened.loaded.selected.weights,
        "data": source.name,
        "split": split,
        "part": run_name(source.name, part) if partial else None,
        "images": scores.images,
        "bad_images": len(images) - scores.images,
        "classes": len(classes),
        "matched": matched,
        "precision": precision,
        "device": device_name(loader.device),
        "processes": ranks.world_size,
        **scores.numbers,
    }
    assert scores.confusion is not None
    table, files = metrics.class_table(scores.confusion, classes, pixels=windows is not None), dict[str, bytes]()
    if windows:
        iou = {name: None if math.isnan(value) else value for name, value in zip(classes, table["iou"], strict=True)}
        settings = {name: getattr(windows, name) for name in ("mode", "window", "stride", "scales", "flip")}
        numbers |= {"task": "segmentation", "iou": iou, **settings}
        files["iou.csv"] = metrics.csv_bytes(table)
        files |= prediction_pngs(ordered, images, source, loader, config, windows) if ranks.main else {}
    else:
        numbers["batch_size"] = loader.batch_size
        files["eval.csv"] = metrics.csv_bytes(table)
        files["confusion.csv"] = metrics.csv_bytes(metrics.confusion_table(scores.confusion, classes))
    return numbers, table, files


def _write(folder: Path, numbers: dict[str, Any], files: dict[str, bytes]) -> Path:
    """Write the files, eval.json last, and remove the pictures of an earlier evaluation."""
    with writing("the results", folder):
        folder.mkdir(parents=True, exist_ok=True)
        for part in ("image", "truth", "prediction"):
            for picture in (folder / "predictions").glob(f"[0-9][0-9]-{part}.png"):
                picture.unlink()
        for name, content in (files | {"eval.json": f"{to_json(numbers)}\n".encode()}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_file(folder / name, content)
    return folder / "eval.json"


def _print_scores(numbers: dict[str, Any], table: "pd.DataFrame", console: "RunConsole") -> None:
    from rich.table import Table
    from rich.text import Text

    by, (total, *fractions) = "iou" if "iou" in table else "accuracy", table.columns[1:-2]
    shown = [name.replace("iou", "IoU") for name in fractions]
    title = f"the {MAX_CLASSES} of {len(table)} classes with the lowest {by.replace('iou', 'IoU')}"
    title = title if len(table) > MAX_CLASSES else "by class"
    view = Table(title=title, title_justify="left", title_style="none", box=None, pad_edge=False, header_style="bold")
    for name in ("class", total, *shown, "most confused with"):
        view.add_column(name, justify="left" if name in ("class", "most confused with") else "right")
    for _, row in table.sort_values(by, kind="stable").head(MAX_CLASSES).iterrows():
        wrong = f"{row['confused_with']} ({row['confused']:,})" if row["confused"] else "-"
        percentages = (f"{row[name]:.1%}".replace("nan%", "-") for name in fractions)
        view.add_row(Text(printable(row["class"])), f"{row[total]:,}", *percentages, Text(printable(wrong)))
    console.print()
    console.print(view)
    images = f"{count(numbers['images'], 'image')} of {printable(numbers['data'])}"
    log(console, f"\n{numbers['split']} {describe_metrics(numbers)} ({images})", "bold", words=True)
    if by == "iou":
        large = f", {numbers['in_windows']} large ones in windows" if "in_windows" in numbers else ""
        views = f"whole images{large}" if numbers["mode"] == "whole" else "windows of {window}, {stride} apart"
        views = views.format(**numbers) + ("; mirrored too" if numbers["flip"] else "")
        scales = "" if tuple(numbers["scales"]) == (1.0,) else f"; scales {', '.join(map(str, numbers['scales']))}"
        log(console, f"views    {views}{scales}", words=True)
    log(console, "weights  {weights}; {precision} on {device}; classes matched {matched}".format(**numbers), words=True)


@partial(checkpoint_command, data_on_bad_image="error")
def predict(
    checkpoint: Checkpoint,
    images: Annotated[list[str], typer.Argument(metavar="IMAGES", help="Image files and folders.")],
    top: Annotated[int, typer.Option(min=1, metavar="<int>", help="Labels per image, the most probable first.")] = 1,
    out: Annotated[str | None, typer.Option(help="CSV file, - for standard output; folder of masks.")] = None,
    multi_scale: MultiScale = False,
    flip: Flip = False,
    **opening: Any,
) -> int:
    """Label images, as CSV, or every pixel, as PNG masks."""
    console, path = make_console(out == "-"), Path(os.path.expanduser(checkpoint))
    check_path(checkpoint)
    log(console, f"opening {checkpoint} ...")
    from pdvit.data.opening import image_files
    from pdvit.engine.distributed import SINGLE_PROCESS
    from pdvit.engine.terminal import EXIT_STOPPED, stop_on_signals
    from pdvit.workflows.checkpoint import open_checkpoint

    files = image_files(images)
    opened = open_checkpoint(path, SINGLE_PROCESS, **opening_arguments(opening))
    for note in opened.loaded.notes:
        log(console, printable(note), words=True)
    windows = opened.windows({"--ms": multi_scale, "--flip": flip})
    target = _target(path, out, top, masks=windows is not None)
    predictions = _masks(opened, files, target, windows) if windows and target else _labels(opened, files, top, console)
    table, shown = StringIO(newline=""), list[Row]()
    writer = csv.writer(table, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(("image", "rank", "label", "probability"))
    with stop_on_signals() as stop:
        for rows in stop.until(predictions):
            writer.writerows(rows)
            shown += rows if len(files) <= MAX_IMAGES and target else []
        if stop:
            kept = f"the masks until then are in {target / 'masks'}" if windows and target else "no file was written"
            log(console, f"stopped; {kept}")
            return EXIT_STOPPED
    content = table.getvalue().encode(errors="surrogateescape")  # names can be of any bytes
    if target is None:
        sys.stdout.buffer.write(content)
    elif windows is None:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, content)
    _print_labels(shown, len(files), opened.loader.bad.found, console)
    if target:
        log(console, f"written  {target / 'masks' if windows else target}")
    return 0


def _target(path: Path, out: str | None, top: int, masks: bool) -> Path | None:
    """Return the folder of the masks or the CSV file to write, None for standard output; raises UserError."""
    place = None if out is None else Path(os.path.expanduser(out))
    if masks:
        if top > 1 or out == "-":
            flag = "--out -" if out == "-" else f"--top {top}"
            raise UserError("the checkpoint labels pixels, with one class each, in files", flag, "leave it out")
        return results_folder(path, place, "eval") / ("" if place else "predicted")
    if out == "-":
        return None
    if place and os.path.isdir(place):
        raise UserError("this is a folder", f"--out {out}", "name a file, for example predictions.csv")
    folder = results_folder(path, place.parent if place else None, "eval")
    return place or folder / "predictions.csv"


def _labels(opened: "OpenedCheckpoint", files: "FileSplit", top: int, console: "RunConsole") -> Iterator[list[Row]]:
    """Yield the most probable classes of each image with their probabilities."""
    import torch

    from pdvit.data.loader import eval_batches
    from pdvit.engine.device import autocast
    from pdvit.workflows.checkpoint import label_names

    model: Any = opened.loaded.model
    labels = label_names(opened.loaded) or [str(number) for number in range(model.num_classes)]
    if top > len(labels):
        raise UserError(f"the checkpoint has {len(labels)} classes", f"--top {top}", "ask for fewer labels")
    for batch in with_progress(eval_batches(files, opened.loader), len(files), console, "predict"):
        with torch.no_grad(), autocast(opened.loader.device, opened.config.run.precision):
            logits = model(batch.images).float()
        best = logits.softmax(1).topk(top)
        columns = (batch.index, best.indices, best.values, logits.isfinite().all(1))
        for index, classes, probabilities, finite in zip(*(column.tolist() for column in columns), strict=True):
            image = str(files.paths[index])
            if not finite:
                raise opened.not_finite(image)
            ranked = enumerate(zip(classes, probabilities, strict=True), 1)
            yield [(image, rank, labels[label], probability) for rank, (label, probability) in ranked]


def _masks(
    opened: "OpenedCheckpoint", files: "FileSplit", folder: Path, windows: "SlidingWindowConfig"
) -> Iterator[list[Row]]:
    """Write the mask of each image, a palette PNG of its size, and the mask over the image; yield no rows for each."""
    from pdvit.data.masks.table import default_palette
    from pdvit.tasks.segmentation import overlay, palette_image, pixel_network, png, predict_masks

    model: Any = opened.loaded.model
    names, network, count = _mask_names(files), pixel_network(model), len(opened.loaded.classes or ())
    palette = opened.loaded.palette or default_palette(count)
    for index, image, mask in predict_masks(network, files, count, opened.loader, opened.config, windows):
        for part, picture in (("masks", palette_image(mask, palette)), ("overlays", overlay(image, mask, palette))):
            file = folder / part / names[index]
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, png(picture))
        yield []


def _mask_names(files: "FileSplit") -> list[Path]:
    """Return each image's name as a PNG, with the folders in which images of one name differ; raises UserError."""
    paths = [Path(os.path.abspath(path)) for path in files.paths]
    names = [Path(path.stem + ".png") for path in paths]
    if len(set(names)) < len(names):
        common = os.path.commonpath([path.parent for path in paths])
        names = [path.relative_to(common).with_suffix(".png") for path in paths]
    counts = Counter(names)
    if twice := next((path for path, name in zip(paths, names, strict=True) if counts[name] > 1), None):
        what = f"two images would have the mask {twice.with_suffix('.png').name}"
        raise UserError(what, str(twice), "label them one after another, each with its own --out")
    return names


def _print_labels(rows: list[Row], images: int, bad: dict[str, str], console: "RunConsole") -> None:
    for image, rank, label, probability in rows:  # on lines of their own, names stay whole in a narrow terminal
        if rank == 1:
            log(console, printable(image))
        log(console, printable(f"{probability:8.1%}  {label}"), words=True)
    for name, reason in list(bad.items())[:MAX_IMAGES]:
        log(console, printable(f"skipped  {name} ({reason})"))
    skipped = f", {len(bad):,} skipped that do not decode" if bad else ""
    log(console, f"{count(images - len(bad), 'image')} labelled{skipped}")
