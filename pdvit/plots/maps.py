"""What single patches resemble: their similarity to all others, as maps, at several depths."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from pdvit.errors import UserError, closest
from pdvit.plots.reading import Arrays, checkpoint_of, read_arrays
from pdvit.plots.style import DOUBLE, LIGHT, Drawing, Theme, new_figure, shorten

# Depths beside one another.
DEPTHS = 6
# Where the patches lie that are shown unless others are named: as shares of height and width.
SPREAD = ((0.5, 0.5), (0.2, 0.25), (0.8, 0.7))
# Cosines are stored as whole numbers, 127 times their value.
SCALE = 127
# The frame of the marked patch: seen on light and on dark.
FRAME = "#ff3b30"


def read_maps(run: Path) -> Arrays:
    """Read analysis/maps.npz of `pdvit analyze --explore`; UserError where it is missing or damaged."""
    file = run / "analysis" / "maps.npz"
    tip = f"make them: pdvit analyze {checkpoint_of(run)} --explore"
    arrays = read_arrays(run, "maps", UserError("there are no maps of single patches", str(file), tip))
    needed = {"names", "layers"}
    if needed <= set(arrays):
        layers = [str(layer) for layer in arrays["layers"]]
        needed |= {f"grid/{layer}" for layer in layers}
        needed |= {f"image/{k}" for k in range(len(arrays["names"]))}
        needed |= {f"cos/{k}/{layer}" for k in range(len(arrays["names"])) for layer in layers}
    if not needed <= set(arrays) or not len(arrays["names"]) or not len(arrays["layers"]):
        raise UserError("the file is damaged, or not one of pdvit analyze", str(file), tip)
    return arrays


def plot_maps(
    arrays: Arrays,
    name: str,
    image: int = 0,
    patches: Sequence[tuple[int, int]] | None = None,
    theme: Theme = LIGHT,
) -> Drawing:
    """Draw the image with a patch marked, and beside it cos of that patch with all others, a map for each depth.

    Args:
        arrays: as `read_maps` returns them.
        name: of the checkpoint.
        image: number of the image, from 0.
        patches: row and column in the grid of the first layer, from 0 at the top left; unset: three spread over the
            picture. In a layer with a coarser grid, the patch that covers the same place.
        theme: colours.

    Raises:
        UserError: there is no such image or patch.
    """
    names, layers = ([str(text) for text in arrays[key]] for key in ("names", "layers"))
    if not 0 <= image < len(names):
        raise UserError(f"there is no image {image}", "--image", closest(str(image), map(str, range(len(names)))))
    rows, columns = (int(size) for size in arrays[f"grid/{layers[0]}"])
    chosen = patches or list(dict.fromkeys((int(y * rows), int(x * columns)) for y, x in SPREAD))
    for row, column in chosen:
        if not (0 <= row < rows and 0 <= column < columns):
            tip = f"rows are 0 to {rows - 1}, columns 0 to {columns - 1}"
            raise UserError(f"there is no patch {row},{column}", "--patch", tip)
    pixels = arrays[f"image/{image}"]
    shown = [layers[at] for at in _spread(len(layers))]
    data = pd.concat([_table(arrays, image, patch, layer) for patch in chosen for layer in shown], ignore_index=True)
    data.insert(0, "run", name)
    side = DOUBLE / (len(shown) + 1.5)
    height = side * pixels.shape[0] / pixels.shape[1] * len(chosen) + 0.45
    with new_figure(DOUBLE, height, theme, len(chosen), len(shown) + 1) as figure:
        figure.data = data
        low = min(0.0, np.floor(5 * data["cos"].min()) / 5)
        for number, patch in enumerate(chosen):
            panels = figure.axes[number * (len(shown) + 1) : (number + 1) * (len(shown) + 1)]
            _draw_image(panels[0], pixels, patch, (rows, columns))
            for axes, layer in zip(panels[1:], shown, strict=True):
                cells = data[(data["patch"] == _spelled(patch)) & (data["layer"] == layer)]
                grid = cells.pivot(index="row", columns="column", values="cos").to_numpy()
                mesh = _draw_map(axes, grid, pixels.shape, low)
                _frame(axes, _same_place(patch, (rows, columns), grid.shape), grid.shape, pixels.shape)
                if number == 0:
                    axes.set_title(layer, fontsize=7.5, loc="center")
        figure.axes[0].set_title(shorten(names[image], 14), fontsize=7.5, loc="center")
        figure.suptitle(shorten(name), x=0.005, ha="left", fontsize=8.5)
        figure.colorbar(mesh, ax=figure.axes, label="cos with the framed patch", aspect=25, shrink=0.9, pad=0.01)
        return figure


def _spread(count: int) -> list[int]:
    """Return which of `count` layers are shown: the first, the last, and evenly between."""
    return sorted({round(at) for at in np.linspace(0, count - 1, min(count, DEPTHS))})


def _spelled(patch: tuple[int, int]) -> str:
    return f"{patch[0]},{patch[1]}"


def _same_place(patch: tuple[int, int], grid: Sequence[int], other: Sequence[int]) -> tuple[int, int]:
    """Return the patch of another grid that covers the middle of this one."""
    row, column = (int((at + 0.5) * size / own) for at, own, size in zip(patch, grid, other, strict=True))
    return row, column


def _table(arrays: Arrays, image: int, patch: tuple[int, int], layer: str) -> pd.DataFrame:
    """Return one row for each patch of the layer: its place, and its cos with the chosen one."""
    first = [int(size) for size in arrays[f"grid/{arrays['layers'][0]}"]]
    rows, columns = (int(size) for size in arrays[f"grid/{layer}"])
    row, column = _same_place(patch, first, (rows, columns))
    cosines = arrays[f"cos/{image}/{layer}"][row * columns + column].astype(float) / SCALE
    places = {"row": np.repeat(np.arange(rows), columns), "column": np.tile(np.arange(columns), rows)}
    return pd.DataFrame({"image": image, "patch": _spelled(patch), "layer": layer, **places, "cos": cosines})


def _draw_image(axes: Axes, pixels: np.ndarray, patch: tuple[int, int], grid: tuple[int, int]) -> None:
    height, width = pixels.shape[:2]
    axes.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest")
    _frame(axes, patch, grid, pixels.shape)
    axes.set_axis_off()


def _draw_map(axes: Axes, grid: np.ndarray, shape: Sequence[int], low: float) -> AxesImage:
    axes.set_axis_off()
    extent = (0, shape[1], shape[0], 0)
    return axes.imshow(grid, extent=extent, vmin=low, vmax=1, cmap="viridis", interpolation="nearest")


def _frame(axes: Axes, patch: tuple[int, int], grid: Sequence[int], shape: Sequence[int]) -> None:
    height, width = shape[0] / grid[0], shape[1] / grid[1]
    corner = (patch[1] * width, patch[0] * height)
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=FRAME, linewidth=1.1, clip_on=False))
