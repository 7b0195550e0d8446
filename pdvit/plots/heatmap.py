"""Heat maps: CKA between layers, maps of single patches, and the confusion matrix."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from pdvit.errors import UserError, closest
from pdvit.files import reading
from pdvit.plots import style
from pdvit.plots.reading import AnalyzedRun, Arrays, eval_again, read_text_table
from pdvit.plots.style import DOUBLE, LIGHT, Drawing, Theme

MAP_DEPTHS = 6
MAP_PATCHES = ((0.5, 0.5), (0.2, 0.25), (0.8, 0.7))  # default patches, as fractions of height and width
COSINE_SCALE = 127  # maps.npz holds cosines as int8
FRAME = [withStroke(linewidth=2.0, foreground="white")]  # around black: visible on any colour
NUMBERED = 15  # classes up to which cells have numbers
NAMED = 50  # classes that have names at most
DRAWN = 200  # maximum number of classes that are drawn
LISTED = 15  # confusions beside a matrix without numbers


def plot_cka(runs: Sequence[AnalyzedRun], theme: Theme = LIGHT) -> Drawing:
    """Draw linear CKA between layers, one panel per matrix, all on one scale, the first layers at the bottom left.

    Files of `cka_between` are optional: `layers`, and for each other model (columns) `matrix/OTHER` and `layers/OTHER`.
    """
    panels = {run.name: _cka_matrix(run.curves["cka"]) for run in runs}
    for run in (run for run in runs if "cka_between" in run.curves):
        for other in run.curve("cka_between", "matrix"):
            panels[f"{run.name} (up), {other}"] = _cka_matrix(run.curves["cka_between"], f"/{other}")
    cells = [
        matrix.T.melt(var_name="layer", value_name="cka", ignore_index=False).assign(run=name)
        for name, matrix in panels.items()
    ]
    data = pd.concat(cells).reset_index(names="other")[["run", "layer", "other", "cka"]]
    with style.run_panels(data, 3.1 if len(panels) < 3 else 2.5, theme) as (figure, drawn):
        norm = Normalize(min(0.0, np.floor(10 * data["cka"].min()) / 10), 1)
        for (axes, _), matrix in zip(drawn, panels.values(), strict=True):
            image = axes.imshow(matrix.to_numpy(), norm=norm, origin="lower")
            axes.grid(visible=False)
            style.name_layers(axes.yaxis, matrix.index, 8, fontsize=6.5)
            style.name_layers(axes.xaxis, matrix.columns, 8, fontsize=6.5, rotation=90)
            axes.set(xlabel="block", ylabel="block")
        figure.colorbar(image, ax=figure.axes, label="linear CKA", shrink=0.85, aspect=25, pad=0.02)
        return figure


def _cka_matrix(arrays: Arrays, other: str = "") -> pd.DataFrame:
    layers, others = (arrays[key].astype(str) for key in ("layers", f"layers{other}"))
    return pd.DataFrame(arrays[f"matrix{other}"], layers, others)


def plot_maps(
    arrays: Arrays, name: str, image: int = 0, patches: Sequence[tuple[int, int]] | None = None, theme: Theme = LIGHT
) -> Drawing:
    """Draw an image with a patch framed, and cos of that patch with all others at several depths.

    `patches` are (row, column) on the grid of the first layer, from the top left; unset, three. In a layer with a
    coarser grid, the patch that covers the same place is taken. Raises UserError for an unknown image or patch.
    """
    names, layers = ([str(text) for text in arrays[key]] for key in ("names", "layers"))
    if not 0 <= image < len(names):
        raise UserError(f"there is no image {image}", "--image", closest(str(image), map(str, range(len(names)))))
    rows, columns = (int(size) for size in arrays[f"grid/{layers[0]}"])
    patches = patches or list(dict.fromkeys((int(y * rows), int(x * columns)) for y, x in MAP_PATCHES))
    for row, column in patches:
        if not (0 <= row < rows and 0 <= column < columns):
            tip = f"rows go from 0 to {rows - 1}, columns from 0 to {columns - 1}"
            raise UserError(f"there is no patch {row},{column}", "--patch", tip)
    pixels = arrays[f"image/{image}"]
    depths = sorted({round(at) for at in np.linspace(0, len(layers) - 1, min(len(layers), MAP_DEPTHS))})
    maps = {(patch, at): _map(arrays, image, patch, layers[at]) for patch in patches for at in depths}
    parts = []
    for (patch, at), (grid, _) in maps.items():
        down, across = np.indices(grid.shape).reshape(2, -1)
        where = {"run": name, "image": image, "patch": f"{patch[0]},{patch[1]}", "layer": layers[at]}
        parts.append(pd.DataFrame({**where, "row": down, "column": across, "cos": grid.ravel()}))
    data, side = pd.concat(parts, ignore_index=True), DOUBLE / (len(depths) + 1.5)
    height = side * pixels.shape[0] / pixels.shape[1] * len(patches) + 0.45
    with style.new_figure(data, DOUBLE, height, theme) as figure:
        grid_of_axes = figure.subplots(len(patches), len(depths) + 1, squeeze=False)
        low = min(0.0, np.floor(5 * data["cos"].min()) / 5)
        norm, colours = (Normalize(-1, 1), theme.diverging) if low < 0 else (Normalize(0, 1), "viridis")
        extent = (0, pixels.shape[1], pixels.shape[0], 0)
        for panels, patch in zip(grid_of_axes, patches, strict=True):
            panels[0].imshow(pixels, extent=extent)
            _frame_patch(panels[0], patch, (rows, columns), pixels.shape)
            for axes, at in zip(panels[1:], depths, strict=True):
                grid, place = maps[patch, at]
                mesh = axes.imshow(grid, colours, norm, extent=extent)
                _frame_patch(axes, place, grid.shape, pixels.shape)
        titles = [style.shorten(names[image], 14), *(layers[at] for at in depths)]
        for axes, title in zip(grid_of_axes[0], titles, strict=True):
            axes.set_title(title, fontsize=7.5, loc="center")
        figure.suptitle(f"{style.shorten(name)}: cos with the framed patch", x=0.005, ha="left", fontsize=8.5)
        figure.colorbar(mesh, ax=figure.axes, aspect=25, shrink=0.9, pad=0.01).ax.set_ylim(low, 1)
        return figure


def _map(arrays: Arrays, image: int, patch: tuple[int, int], layer: str) -> tuple[np.ndarray, tuple[int, int]]:
    """Return cos of a patch with all patches of a layer, and the place of the patch in that layer's grid."""
    first, own = arrays[f"grid/{arrays['layers'][0]}"], arrays[f"grid/{layer}"]
    row, column = (int((at + 0.5) * int(size) / int(whole)) for at, whole, size in zip(patch, first, own, strict=True))
    cosines = arrays[f"cos/{image}/{layer}"][row * int(own[1]) + column].astype(float) / COSINE_SCALE
    return cosines.reshape(int(own[0]), int(own[1])), (row, column)


def _frame_patch(axes: Axes, patch: tuple[int, int], grid: Sequence[int], shape: Sequence[int]) -> None:
    height, width = shape[0] / grid[0], shape[1] / grid[1]
    corner = (patch[1] * width, patch[0] * height)
    frame: dict[str, Any] = {"fill": False, "linewidth": 0.8, "path_effects": FRAME, "clip_on": False}
    axes.add_patch(Rectangle(corner, width, height, edgecolor="black", **frame))
    axes.set_axis_off()


def read_confusion(run: Path) -> pd.DataFrame:
    """Read confusion.csv: class, predicted and images. Raises UserError."""
    file = run / "confusion.csv"
    with reading(file, f"measure it again: {eval_again(run)}"):
        table = read_text_table(file)[["class", "predicted", "images"]].astype({"images": int})
        unknown = set(table["predicted"]) - set(table["class"])
        if table["images"].min() < 0 or table.duplicated(["class", "predicted"]).any() or unknown:
            raise ValueError("it is not a matrix of images by class")
    return table


def plot_confusion(table: pd.DataFrame, name: str, theme: Theme = LIGHT) -> Drawing:
    """Draw the predictions as shares of each class's images; of many classes, those with most errors."""
    wrong = table[table["class"] != table["predicted"]]
    images, classes = int(table["images"].sum()), list(table["class"].unique())
    errors = wrong.groupby("class")["images"].sum().reindex(classes, fill_value=0)
    drawn = set(errors.sort_values(ascending=False, kind="stable").index[:DRAWN])
    shown = [label for label in classes if label in drawn]
    largest = wrong[wrong["images"] > 0].sort_values("images", ascending=False, kind="stable").head(LISTED)
    listed = len(shown) > NUMBERED
    side = 7.0 if listed else max(3.2, 0.36 * len(shown)) + 0.07 * max(len(style.shorten(label)) for label in shown)
    widths = (side + 1.2, 4.0)[: 1 + listed]
    share = table["images"] / table.groupby("class")["images"].transform("sum").clip(lower=1)
    rows = table.assign(run=name, share=share)[["run", *table.columns, "share"]]
    inside = rows["class"].isin(drawn) & rows["predicted"].isin(drawn)
    data = rows[inside | (rows.index.isin(largest.index) & listed)]
    with style.new_figure(data, sum(widths), side, theme) as figure:
        left, *right = figure.subplots(1, 1 + listed, squeeze=False, width_ratios=widths)[0]
        _draw_matrix(left, rows[inside], shown, theme)
        of = f"\nthe {len(shown)} classes with most errors, of {len(classes):,}" if len(shown) < len(classes) else ""
        correct = f"{1 - wrong['images'].sum() / max(images, 1):.1%}".replace("%", " %")
        left.set_title(f"{style.shorten(name)}\n{correct} of {images:,} images correctly classified{of}")
        names = [" → ".join(pair) for pair in largest[["class", "predicted"]].map(style.shorten).to_numpy()]
        for axes in right:  # the most frequent confusions as bars, the largest on top
            bars = axes.barh(range(len(names)), largest["images"].tolist(), color=theme.colours[0], height=0.7)
            axes.bar_label(bars, padding=3, fontsize=7.5)
            axes.set_yticks(range(len(names)), names, fontsize=7.5)
            axes.invert_yaxis()
            axes.grid(visible=False)
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
            axes.set_title("most frequent confusions, images" if names else "no confusions")
        return figure


def _draw_matrix(axes: Axes, rows: pd.DataFrame, shown: list[str], theme: Theme) -> None:
    counts, shares = (
        rows.pivot(index="class", columns="predicted", values=value).reindex(index=shown, columns=shown).fillna(0)
        for value in ("images", "share")
    )
    norm = PowerNorm(0.5, 0, 1)  # the square root keeps rare confusions visible
    colours = LinearSegmentedColormap.from_list("shares", (theme.paper, theme.colours[0], theme.ink))
    image = axes.imshow(shares.to_numpy(), colours, norm)
    axes.grid(visible=False)
    for row, column in np.argwhere(counts.to_numpy()) if len(shown) <= NUMBERED else ():
        text = f"{counts.iloc[row, column]:.0f}"
        colour = theme.paper if norm(shares.iloc[row, column]) > 0.5 else theme.ink
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    for axis in (axes.yaxis, axes.xaxis):
        style.name_ticks(axis, dict(enumerate(shown)), NAMED, fontsize=9 if len(shown) <= NUMBERED else 6.5)
    axes.tick_params(axis="x", rotation=90 if max(map(len, shown)) > 2 else 0)
    axes.set(xlabel="predicted", ylabel="class")
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.8, label="share of the class's images")
    bar.set_ticks([0, 0.01, 0.05, 0.25, 1], labels=["0", "1 %", "5 %", "25 %", "100 %"])
