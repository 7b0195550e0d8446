"""Segmentation: image, truth, prediction and errors side by side, and the IoU of every class."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from PIL import Image

from pdvit.files import reading
from pdvit.plots.reading import eval_again, read_text_table
from pdvit.plots.style import DOUBLE, LIGHT, Drawing, Theme, new_figure, shorten

SHOWN = 4  # images
BARS = 40  # of classes; of more classes, the best and the worst
NAMED, ACROSS = 19, 4  # classes in the legend and its columns
COLUMNS = ("image", "truth", "prediction", "errors")
IGNORED = 255
Array = np.ndarray[Any, Any]


class SegmentedImage(NamedTuple):
    """An image `(H, W, 3)`, the classes `(H, W)` of truth and prediction, and the colours `(256, 3)` of classes."""

    image: Array
    truth: Array
    prediction: Array
    palette: Array


def read_segmentation(run: Path) -> tuple[pd.DataFrame, list[SegmentedImage]]:
    """Read iou.csv and the images of predictions/; the IoU of a class that does not occur is NaN. Raises UserError."""
    file, pictures = run / "iou.csv", []
    with reading(file, f"measure it again: {eval_again(run)}"):
        table = read_text_table(file)[["class", "pixels", "iou"]].replace({"iou": {"": "nan"}})
        table = table.astype({"pixels": int, "iou": float})
        for path in sorted((run / "predictions").glob("*-image.png")):
            masks = [path.with_name(path.name.replace("-image.", f"-{name}.")) for name in COLUMNS[1:3]]
            (truth, _), (prediction, palette) = map(_read_mask, masks)
            with Image.open(path, formats=("PNG",)) as image:
                pictures.append(SegmentedImage(np.array(image.convert("RGB")), truth, prediction, palette))
    return table, pictures


def _read_mask(path: Path) -> tuple[Array, Array]:
    """Return the classes `(H, W)` in a mask, and the colours `(256, 3)` of classes."""
    with Image.open(path, formats=("PNG",)) as opened:
        levels = opened.getpalette("RGB")
        if opened.mode != "P" or levels is None:
            raise ValueError(f"{path.name} has no palette")
        palette = np.full((256, 3), 255, np.uint8)
        palette[: len(levels) // 3] = np.array(levels).reshape(-1, 3)
        return np.array(opened), palette


def plot_segmentation(table: pd.DataFrame, pictures: list[SegmentedImage], name: str, theme: Theme = LIGHT) -> Drawing:
    """Draw the first images, a row each, beside them the IoU of the classes, and below a legend of colours."""
    shown, classes = pictures[:SHOWN], table[table["iou"].notna()].sort_values("iou", ascending=False, kind="stable")
    if len(classes) > BARS:
        classes = pd.concat([classes.head(BARS // 2), classes.tail(BARS // 2)])
    keys = _legend(shown, table["class"].tolist(), theme)
    height = max(2.0, 1.15 * len(shown), 0.13 * len(classes) + 0.6) + 0.14 * -(-len(keys) // ACROSS)
    with new_figure(table.assign(run=name)[["run", *table.columns]], DOUBLE, height, theme) as figure:
        grid = figure.add_gridspec(max(len(shown), 1), 5, width_ratios=(1, 1, 1, 1, 1.6))
        for row, picture in enumerate(shown):
            panels = [figure.add_subplot(grid[row, column]) for column in range(4)]
            _draw_row(panels, picture, theme)
            for axes, title in zip(panels, COLUMNS if row == 0 else (), strict=False):
                axes.set_title(title)
        axes = figure.add_subplot(grid[:, 4:] if shown else grid[:, :])
        _draw_bars(axes, classes, len(table), theme)
        mean = float(table["iou"].mean())
        axes.axvline(mean, color=theme.colours[1], linewidth=1.2)
        axes.set_title(f"{shorten(name, 18)}: mIoU {mean:.3f}", loc="right")
        if keys:
            figure.legend(handles=keys, loc="outside lower left", ncols=ACROSS, fontsize=6.5, handlelength=1.2)
        return figure


def _draw_row(row: list[Axes], picture: SegmentedImage, theme: Theme) -> None:
    masks = (picture.palette[picture.truth], picture.palette[picture.prediction])
    for axes, pixels in zip(row, (picture.image, *masks), strict=False):
        axes.imshow(pixels)
    errors = np.where(picture.truth == IGNORED, 2, picture.truth != picture.prediction)
    colours = ListedColormap([theme.muted, theme.colours[1], theme.paper])  # of correct, wrong and ignored pixels
    row[3].imshow(errors, cmap=colours, vmin=0, vmax=2)
    wrong = float((errors == 1).sum() / max((errors < 2).sum(), 1))
    row[3].set_xlabel(f"{wrong:.1%} wrong".replace("%", " %"), fontsize=7, color=theme.colours[1])
    for axes in row:
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)


def _legend(pictures: list[SegmentedImage], names: list[str], theme: Theme) -> list[Patch]:
    """Return a patch for each of the most frequent classes, and one for pixels without a class."""
    counts = np.zeros(256, int)
    for picture in pictures:
        counts += np.bincount(np.append(picture.truth, picture.prediction), minlength=256)
    frequent = [at for at in np.argsort(-counts, kind="stable") if counts[at] and at < len(names)][:NAMED]
    labels = {int(at): shorten(names[at], 24) for at in sorted(frequent)}
    labels |= {IGNORED: "no class"} if counts[IGNORED] else {}
    return [
        Patch(facecolor=pictures[0].palette[at] / 255, edgecolor=theme.muted, linewidth=0.5, label=label)
        for at, label in labels.items()
    ]


def _draw_bars(axes: Axes, classes: pd.DataFrame, count: int, theme: Theme) -> None:
    names = [shorten(label, 24) for label in classes["class"]]
    bars = axes.barh(range(len(names)), classes["iou"].tolist(), color=theme.colours[0], height=0.7)
    axes.set_yticks(range(len(names)), names, fontsize=7 if len(names) <= 20 else 5)
    paper = {"facecolor": theme.paper, "edgecolor": "none", "pad": 0.3}  # the line of the mean may pass there
    axes.bar_label(bars, fmt="{:.2f}", padding=3, fontsize=6, bbox=paper)
    of = f", {len(classes)} of {count} classes" if len(classes) < count else ""
    axes.set(xlim=(0, 1.08), ylim=(max(len(classes), 1) - 0.5, -0.5))
    axes.set_xlabel(f"IoU (line: mean){of}", loc="right")
    axes.grid(visible=False)
    if len(classes) == BARS < count:  # between the best and the worst
        axes.axhline(BARS / 2 - 0.5, color=theme.muted, linewidth=0.6, linestyle=":")
