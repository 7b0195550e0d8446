"""What `pdvit eval` and `pdvit predict` do with a checkpoint that labels pixels."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pdvit.cli.checkpoint import Opened, cell, with_progress
from pdvit.cli.console import log
from pdvit.cli.results import WORST, Evaluation, facts_of, first_of, share, split_named
from pdvit.errors import UserError

if TYPE_CHECKING:
    from pdvit.config.schema import SegmentConfig
    from pdvit.data.bad_images import BadImages
    from pdvit.data.sources import FileSplit
    from pdvit.engine.distributed import Ranks
    from pdvit.engine.terminal import RunConsole
    from pdvit.models.segmentation.files import LoadedSegmenter
    from pdvit.tasks.windows import SlidingWindowConfig


@dataclass(frozen=True)
class Asked:
    """What the flags of `pdvit eval` ask for."""

    split: str | None
    limit: int | None
    scales: bool
    flip: bool
    mode: str | None
    stride: int | None
    classes: str | None
    data: str | None


def measure_pixels(opened: Opened, path: Path, asked: Asked, console: "RunConsole", ranks: "Ranks") -> Evaluation:
    """Measure a split and return what came out, in numbers, by class, and in pictures."""
    from pdvit.data.masks.batches import eval_batches
    from pdvit.data.masks.folders import open_masks
    from pdvit.data.masks.split import MaskSplit
    from pdvit.tasks.labels import match_classes
    from pdvit.tasks.metrics import SegmentationMetric, class_table, csv_bytes, evaluate_segmentation, unique_names
    from pdvit.tasks.pictures import prediction_pngs
    from pdvit.tasks.segmentation import pixel_network

    loaded, config = _segmenter(opened), opened.config
    segment = _segment(opened, asked)
    source = open_masks(config.data, segment)
    order, matched = match_classes(loaded, source.classes, source.name)
    name, how = split_named(source, asked.split), _looking(opened, segment, asked.scales, asked.flip)
    if asked.stride is not None and how.mode == "whole":
        log(console, "note: --stride has no effect: images are evaluated whole")
    images, network = first_of(source.splits[name], asked.limit), pixel_network(loaded.model)
    assert isinstance(images, MaskSplit)
    ordered = network if order is None else lambda seen: network(seen)[:, order]
    scores = evaluate_segmentation(
        ordered,
        with_progress(eval_batches(images, opened.loading, segment), len(images) // ranks.world_size, console, name),
        SegmentationMetric(len(source.classes), opened.device),
        how,
        config.run.precision,
        ranks,
    )
    table = class_table(scores.confusion, unique_names(source.classes), scores.iou)
    by_class = table["class"], table["iou"]
    facts = {
        "task": "segmentation",
        **facts_of(opened, path, source, name, images, matched, scores),
        **scores.record(),
        "iou": {label: value if value == value else None for label, value in zip(*by_class, strict=True)},
        "mode": how.mode,
        "window": how.window,
        "stride": how.stride,
        "scales": list(how.scales),
        "flip": how.flip,
    }
    config = replace(config, segment=segment)
    files = prediction_pngs(ordered, images, source, opened.loading, config, how) if ranks.main else {}
    return Evaluation(facts, table, {"iou.csv": csv_bytes(table)} | files)


def report_pixels(found: Evaluation, file: Path, console: "RunConsole") -> None:
    """Print the numbers, and the classes that are told worst."""
    from rich.table import Table

    from pdvit.data.sources.split import printable

    facts, table = found.facts, found.table
    worst = table.sort_values("iou", kind="stable").head(WORST)
    of = f"the {WORST} worst of {len(table)} classes" if len(table) > WORST else "by class"
    view = Table(title=of, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in ("class", "pixels", "IoU", "accuracy", "precision", "most taken for"):
        view.add_column(name, justify="left" if name in ("class", "most taken for") else "right")
    for _, row in worst.iterrows():
        wrong = cell(str(row["confused_with"]) if row["confused"] else "-")
        shares = (share(row[name]) for name in ("iou", "accuracy", "precision"))
        view.add_row(cell(row["class"]), f"{row['pixels']:,}", *shares, wrong)
    console.print()
    console.print(view)
    views = f"{len(facts['scales'])} scales" if len(facts["scales"]) > 1 else "one scale"
    how = f"windows of {facts['window']}, {facts['stride']} apart" if facts["mode"] == "slide" else "whole images"
    large = f" ({facts['in_windows']} too large, in windows)" if "in_windows" in facts else ""
    log(
        console,
        f"\n{facts['split']} mIoU {facts['miou']:.1%}, accuracy {facts['accuracy']:.1%} of pixels and "
        f"{facts['accuracy_mean']:.1%} by class, loss {facts['loss']:.3f} "
        f"({facts['images']:,} images of {printable(facts['data'])})\n"
        f"views    {how}{large}, {views}{' and mirror images' if facts['flip'] else ''}\n"
        f"weights  {facts['weights']}; {facts['precision']} on {facts['device']}; classes matched {facts['matched']}\n"
        f"written  {file}, iou.csv, predictions/",
    )


def _segmenter(opened: Opened) -> "LoadedSegmenter":
    from pdvit.models.segmentation.files import LoadedSegmenter

    assert isinstance(opened.loaded, LoadedSegmenter)
    return opened.loaded


def _segment(opened: Opened, asked: Asked) -> "SegmentConfig":
    """Return how the checkpoint evaluates, or as is asked, with the table of classes: its run's, on its run's data.

    Raises UserError for a mode or stride that can't be.
    """
    from pdvit.config import build

    given = {name: value for name in ("mode", "stride") if (value := getattr(asked, name)) is not None}
    build(("the command line", {"segment": given}))
    own = opened.config.segment.classes if asked.data is None else None
    return replace(_segmenter(opened).segment, classes=asked.classes or own, **given)


def _looking(opened: Opened, segment: "SegmentConfig", scales: bool, flip: bool) -> "SlidingWindowConfig":
    from pdvit.tasks.segmentation import sliding_windows
    from pdvit.tasks.windows import SCALES

    how = sliding_windows(_segmenter(opened).model, segment, opened.loading.per_pass)
    return replace(how, scales=SCALES if scales else (1.0,), flip=flip)


def predict_pixels(
    opened: Opened, files: "FileSplit", folder: Path, views: tuple[bool, bool], bad: "BadImages"
) -> Iterator[list[Path]]:
    """Write the mask of every image, its classes in their colours (palette PNG), and the same over the image.

    Both have the image's size and name, in `folder`/masks and `folder`/overlays. Yields one thing per image; those
    that do not decode are collected in `bad`.
    """
    from pdvit.data.bad_images import BadImage
    from pdvit.data.images import try_read
    from pdvit.data.masks.table import default_palette
    from pdvit.data.masks.transforms import EvaluationTransform
    from pdvit.engine.device import autocast
    from pdvit.tasks.pictures import overlay, palette_image, png, predict_mask
    from pdvit.tasks.segmentation import pixel_network
    from pdvit.tracking import write_file

    loaded, loading = _segmenter(opened), opened.loading
    how = _looking(opened, loaded.segment, *views)
    palette = loaded.palette or default_palette(len(loaded.classes))
    transform = EvaluationTransform(loaded.segment.short_side, loading.preprocessing.interpolation)
    network = pixel_network(loaded.model)
    for index, name in enumerate(_names(files)):
        image = try_read(files, index)
        if isinstance(image, BadImage):
            bad.add([image])
            yield [folder]
            continue
        seen = loading.preprocessing.normalise(transform(image)[None].to(opened.device))
        with autocast(opened.device, opened.config.run.precision):
            mask = predict_mask(network, seen, (image.height, image.width), len(loaded.classes), how)
        for kind, picture in (("masks", palette_image(mask, palette)), ("overlays", overlay(image, mask, palette))):
            target = folder / kind / name
            target.parent.mkdir(parents=True, exist_ok=True)
            write_file(target, png(picture))
        yield [folder / "masks" / name]


def _names(files: "FileSplit") -> list[Path]:
    """Return the name of each image as a PNG; where two have the same, with the folders in which they differ.

    Raises UserError where they differ in the ending only.
    """
    paths = [Path(os.path.abspath(path)) for path in files.paths]
    names = [Path(path.stem + ".png") for path in paths]
    if len(set(names)) < len(names):
        common = os.path.commonpath([path.parent for path in paths])
        names = [path.relative_to(common).with_suffix(".png") for path in paths]
    first = {name: at for at, name in reversed(list(enumerate(names)))}
    if twice := next((path for at, path in enumerate(paths) if first[names[at]] < at), None):
        what = f"two images would have the mask {twice.with_suffix('.png').name}"
        raise UserError(what, str(twice), "label them one after another, each with its own --out")
    return names
