"""Segmentation: image, truth, prediction and errors side by side, and the IoU of every class."""

import csv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from PIL import Image

from pdvit.errors import UserError
from pdvit.plots.style import DOUBLE, LIGHT, Drawing, Theme, new_figure, shorten

# Images that are drawn, and classes whose bars are: of more the best and the worst.
SHOWN, BARS = 4, 40
# Classes in the legend, the most frequent of the images that are drawn, and its columns.
NAMED, ACROSS = 19, 4
COLUMNS = ("image", "truth", "prediction", "errors")
IGNORED = 255
Array = np.ndarray[Any, Any]


class SegmentedImage(NamedTuple):
    """One image `(H, W, 3)`, the classes `(H, W)` of truth and prediction, and the colours `(256, 3)` of classes."""

    image: Array
    truth: Array
    prediction: Array
    palette: Array

    @property
    def errors(self) -> Array:
        """0 where the prediction is right, 1 where it is wrong, 2 where no class is known."""
        found: Array = np.where(self.truth == IGNORED, 2, self.truth != self.prediction)
        return found


def read_segmentation(run: Path) -> tuple[pd.DataFrame, list[SegmentedImage]]:
    """Read iou.csv and the pictures of predictions; UserError where they are damaged or missing."""
    file = run / "iou.csv"
    try:
        with file.open(encoding="utf-8", errors="replace", newline="") as opened:
            rows = list(csv.DictReader(opened, strict=True))
        table = pd.DataFrame({"class": [row["class"] for row in rows]}, dtype=object)
        table["pixels"] = [int(row["pixels"]) for row in rows]
        table["iou"] = [float(row["iou"]) if row["iou"] else np.nan for row in rows]
        if table.empty:
            raise ValueError("it has no class")
        pictures = [_picture(image) for image in sorted((run / "predictions").glob("*-image.png"))]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        what = f"the table of classes or a picture is damaged, or not one of a segmentation: {error}"
        raise UserError(what, str(file), f"measure it again: pdvit eval {run}") from error
    return table, pictures


def _picture(image: Path) -> SegmentedImage:
    masks = [image.with_name(image.name.replace("-image.", f"-{name}.")) for name in COLUMNS[1:3]]
    (truth, _), (prediction, palette) = map(_mask, masks)
    with Image.open(image) as opened:
        return SegmentedImage(np.array(opened.convert("RGB")), truth, prediction, palette)


def _mask(path: Path) -> tuple[Array, Array]:
    """Return the classes `(H, W)` in a mask, and the colours `(256, 3)` of classes."""
    with Image.open(path) as opened:
        levels = opened.getpalette("RGB")
        if opened.mode != "P" or levels is None:
            raise ValueError(f"{path.name} has no palette")
        palette = np.full((256, 3), 255, np.uint8)
        palette[: len(levels) // 3] = np.array(levels).reshape(-1, 3)
        return np.array(opened), palette


def plot_segmentation(table: pd.DataFrame, pictures: list[SegmentedImage], name: str, theme: Theme = LIGHT) -> Drawing:
    """Draw the first pictures, a row each, beside them the IoU of the classes, and below what the colours mean.

    Args:
        table: as `read_segmentation` returns it, the IoU missing where a class is nowhere.
        pictures: the same.
        name: of the run, for the title.
        theme: colours.
    """
    shown, classes = pictures[:SHOWN], _chosen(table)
    keys = _legend(shown, table["class"].tolist(), theme)
    rows, height = max(len(shown), 1), max(2.0, 1.15 * len(shown), 0.13 * len(classes) + 0.6)
    height += 0.14 * -(-len(keys) // ACROSS)
    with new_figure(DOUBLE, height, theme, rows, 5, width_ratios=(1, 1, 1, 1, 1.6)) as figure:
        figure.data = table.assign(run=name)[["run", *table.columns]]
        axes = np.array(figure.axes).reshape(rows, 5)
        for row, picture in zip(axes, shown, strict=False):
            _draw_row(row[:4], picture, theme)
        for place in axes[len(shown) :, :4].flat:
            place.set_axis_off()
        for title, place in zip(COLUMNS, axes[0], strict=False):
            place.set_title(title)
        grid = axes[0, 4].get_gridspec()
        for place in axes[:, 4]:
            place.remove()
        place = figure.add_subplot(grid[:, 4])
        _draw_bars(place, classes, len(table), theme)
        mean = float(table["iou"].mean())
        place.axvline(mean, color=theme.colours[1], linewidth=1.2)
        place.set_title(f"{shorten(name, 18)}: mIoU {mean:.3f}", loc="right")
        if keys:
            figure.legend(handles=keys, loc="outside lower left", ncols=ACROSS, fontsize=6.5, handlelength=1.2)
        return figure


def _draw_row(places: Any, picture: SegmentedImage, theme: Theme) -> None:
    masks = (picture.palette[picture.truth], picture.palette[picture.prediction])
    for place, drawn in zip(places, (picture.image, *masks), strict=False):
        place.imshow(drawn, interpolation="nearest")
    colours = ListedColormap([theme.muted, theme.colours[1], theme.paper])
    places[3].imshow(picture.errors, cmap=colours, vmin=0, vmax=2, interpolation="nearest")
    labelled = picture.truth != IGNORED
    wrong = float((picture.errors == 1).sum() / max(labelled.sum(), 1))
    places[3].set_xlabel(f"{wrong:.1%} wrong".replace("%", " %"), fontsize=7, color=theme.colours[1])
    for place in places:
        place.set(xticks=[], yticks=[])
        place.grid(visible=False)
        for side in place.spines.values():
            side.set_visible(False)


def _legend(pictures: list[SegmentedImage], names: list[str], theme: Theme) -> list[Patch]:
    """Return a patch of colour with its name for the most frequent classes of some pictures, and for no class."""
    counts = np.zeros(256, int)
    for picture in pictures:
        for mask in (picture.truth, picture.prediction):
            counts += np.bincount(mask.ravel(), minlength=256)
    places = [at for at in np.argsort(-counts, kind="stable") if counts[at] and at < len(names)][:NAMED]
    labels = [
        *((at, shorten(names[at], 24)) for at in sorted(places)),
        *[(IGNORED, "no class")] * bool(counts[IGNORED]),
    ]
    palette = pictures[0].palette / 255 if pictures else np.zeros((256, 3))
    return [Patch(facecolor=palette[at], edgecolor=theme.muted, linewidth=0.5, label=label) for at, label in labels]


def _chosen(table: pd.DataFrame) -> pd.DataFrame:
    """Return the classes that are drawn, best first: all that have an IoU, or of many the best and the worst."""
    ordered = table[table["iou"].notna()].sort_values("iou", ascending=False, kind="stable")
    if len(ordered) <= BARS:
        return ordered
    return pd.concat([ordered.head(BARS // 2), ordered.tail(BARS // 2)])


def _draw_bars(place: Any, classes: pd.DataFrame, count: int, theme: Theme) -> None:
    """Draw a bar for each class, the best on top."""
    at, values = range(len(classes)), classes["iou"].tolist()
    place.barh(at, values, color=theme.colours[0], height=0.7)
    place.set_yticks(at, [shorten(label, 24) for label in classes["class"]], fontsize=7 if len(classes) <= 20 else 5)
    paper = {"facecolor": theme.paper, "edgecolor": "none", "pad": 0.3}  # the line of the mean may pass there
    for height, value in zip(at, values, strict=True):
        number = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 6, "bbox": paper}
        place.annotate(f"{value:.2f}", (value, height), **number)
    of = f", {len(classes)} of {count} classes" if len(classes) < count else ""
    place.set(xlim=(0, 1.08), ylim=(max(len(classes), 1) - 0.5, -0.5))
    place.set_xlabel(f"IoU (line: mean){of}", loc="right")
    place.grid(visible=False)
    if len(classes) == BARS < count:  # between the best and the worst
        place.axhline(BARS / 2 - 0.5, color=theme.muted, linewidth=0.6, linestyle=":")
