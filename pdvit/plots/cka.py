"""Which layers tell the images apart alike: linear CKA between all layers, of one model or of two."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from pdvit.errors import UserError
from pdvit.plots.reading import Arrays, checkpoint_of, read_arrays
from pdvit.plots.style import DOUBLE, LIGHT, SINGLE, Drawing, Theme, new_figure, shorten, thin_ticks, unique

NEEDED = ("matrix", "layers")
# Panels beside one another, and height of a row of them in inches.
COLUMNS, HEIGHT = 3, 2.5


def plot_cka(
    runs: Sequence[Arrays],
    names: Sequence[str],
    between: Sequence[tuple[str, Arrays]] = (),
    theme: Theme = LIGHT,
) -> Drawing:
    """Draw linear CKA between layers as heat maps, one panel per matrix, all on one scale.

    Args:
        runs: arrays of analysis/cka.npz: `matrix` and `layers`.
        names: what each run is called.
        between: name of a run (rows), and arrays of its analysis/cka_between.npz: `matrix/OTHER`, `layers/OTHER` (the
            columns) and `layers` (the rows).
        theme: colours.
    """
    panels = [
        (name, _frame(own["matrix"], own["layers"], own["layers"]))
        for own, name in zip(runs, unique(names), strict=True)
    ]
    panels += [pair for name, arrays in between for pair in _pairs(name, arrays)]
    columns = min(COLUMNS, len(panels))
    height = -(-len(panels) // columns)
    width = SINGLE if len(panels) == 1 else DOUBLE
    size = 3.0 if len(panels) == 1 else HEIGHT if columns == COLUMNS else 3.1
    with new_figure(width, size * height, theme, height, columns) as figure:
        figure.data = _table(panels)
        low = min(0.0, np.floor(10 * figure.data["cka"].min()) / 10)
        for axes, (name, matrix) in zip(figure.axes, panels, strict=False):
            image = _heat(axes, matrix, low)
            axes.set_title(shorten(name, 40), fontsize=7.5)
            axes.set(xlabel="block", ylabel="block")
        for axes in figure.axes[len(panels) :]:
            axes.set_axis_off()
        figure.colorbar(image, ax=figure.axes, label="linear CKA", shrink=0.85, aspect=25, pad=0.02)
        return figure


def read_between(run: Path) -> Arrays | None:
    """Read analysis/cka_between.npz, where there is one: `matrix/OTHER`, `layers/OTHER` and `layers`."""
    file = run / "analysis" / "cka_between.npz"
    if not file.is_file():
        return None
    damaged = UserError("the file is damaged", str(file), f"measure it again: pdvit analyze {checkpoint_of(run)}")
    arrays = read_arrays(run, "cka_between", damaged)
    others = [key.partition("/")[2] for key in arrays if key.startswith("matrix/")]
    sides = [(f"matrix/{other}", f"layers/{other}") for other in others]
    if "layers" not in arrays or any(
        side not in arrays or arrays[matrix].shape != (len(arrays["layers"]), len(arrays[side]))
        for matrix, side in sides
    ):
        raise damaged
    return arrays


def _pairs(name: str, arrays: Arrays) -> list[tuple[str, pd.DataFrame]]:
    others = [key.partition("/")[2] for key in arrays if key.startswith("matrix/")]
    return [
        (f"{name} (up), {other}", _frame(arrays[f"matrix/{other}"], arrays["layers"], arrays[f"layers/{other}"]))
        for other in others
    ]


def _frame(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(matrix, index=rows.astype(str), columns=columns.astype(str))


def _heat(axes: Axes, matrix: pd.DataFrame, low: float) -> AxesImage:
    """Draw a matrix with the first layers at the bottom left."""
    image = axes.imshow(matrix, origin="lower", vmin=low, vmax=1, cmap="viridis", interpolation="nearest")
    for axis, layers in ((axes.xaxis, matrix.columns), (axes.yaxis, matrix.index)):
        shown = thin_ticks(len(layers), 8)
        axis.set_ticks(shown, [str(layers[at]).removeprefix("block ") for at in shown], fontsize=6.5)
    axes.set_xticks(axes.get_xticks(), [text.get_text() for text in axes.get_xticklabels()], rotation=90)
    axes.grid(visible=False)
    return image


def _table(panels: Sequence[tuple[str, pd.DataFrame]]) -> pd.DataFrame:
    """Return one row per panel and cell."""
    parts = []
    for name, matrix in panels:
        cells: Mapping[str, object] = {
            "layer": np.repeat(matrix.index, matrix.shape[1]),
            "other": np.tile(matrix.columns, len(matrix)),
            "cka": matrix.to_numpy().ravel(),
        }
        parts.append(pd.DataFrame({"run": name, **cells}))
    return pd.concat(parts, ignore_index=True)
