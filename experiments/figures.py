"""Draw P and effective rank by depth: `python experiments/figures.py ablation/layers.csv [VARIANT ...]`.

The figure lies beside the table, as layers.png. Lines are means over seeds, bands 95 % intervals (Student's t); solid
after training, dashed before, one black line where all begin alike. Where learning rates were crossed, each variant
has the one with the best mean on validation (of results.csv beside the table). What else was crossed beside variant and
seed has a panel for each of its values.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from effects import at_best_rates
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from tables import NUMBERS, SEED

from pdvit.plots.style import DOUBLE, LIGHT, Drawing, legend, line_styles, new_figure, render
from pdvit.plots.sweep import estimate

HERE = Path(__file__).parent
DASHED = (0, (3, 2))
HEIGHT = 2.1  # of a row of panels, in inches
LABELS = {"similarity": "P, patch similarity", "effective_rank": "effective rank"}


def draw_layers(layers: pd.DataFrame) -> Drawing:
    """Draw a row of panels for P and one for effective rank, over depth relative to the last layer.

    The `data` of the figure is mean, low and high of each line at each layer.
    """
    data = summarise(layers)
    panels = list(data.groupby("panel", sort=False))
    names = [str(name) for name in data["variant"].unique()]
    styles = [look | {"linestyle": "-"} for look in line_styles(len(names), LIGHT)]
    with new_figure(data, DOUBLE, HEIGHT * len(NUMBERS), LIGHT) as figure:
        figure.subplots(len(NUMBERS), len(panels), squeeze=False, sharex=True, sharey="row")
        for number, axes in enumerate(figure.axes):
            row, column = divmod(number, len(panels))
            panel, part = panels[column]
            draw_lines(axes, part[part["metric"] == NUMBERS[row]], dict(zip(names, styles, strict=True)), LIGHT.ink)
            axes.set_title(panel if row == 0 else "")
            axes.set_ylabel(LABELS[NUMBERS[row]] if column == 0 else "")
            axes.set_xlabel("relative depth" if row else "")
        before = Line2D([], [], color=LIGHT.ink, linestyle=DASHED, label="before training")
        legend(figure, dict(zip(names, styles, strict=True)), [before])
        return figure


def draw_lines(axes: Axes, rows: pd.DataFrame, styles: dict[str, dict[str, object]], ink: str) -> None:
    before = rows[rows["when"] == "before"]
    alike = before.groupby("layer")["mean"].nunique().max() == 1  # begun from the same weights
    drawn = before[before["variant"] == before["variant"].iloc[0]] if alike else before
    for variant, line in drawn.groupby("variant", sort=False):
        shade = {"color": ink} if alike else {}
        axes.plot(line["depth"], line["mean"], **styles[variant] | {"linestyle": DASHED, "marker": ""} | shade)
    draw_means(axes, rows[rows["when"] == "after"], "depth", styles)


def draw_means(axes: Axes, rows: pd.DataFrame, along: str, styles: Mapping[str, Mapping[str, object]]) -> None:
    """Draw for each variant a line of means with the band of their intervals, along a column."""
    for variant, line in rows.groupby("variant", sort=False):
        axes.plot(line[along], line["mean"], **styles[variant])
        band = {"color": styles[variant]["color"], "alpha": 0.15, "linewidth": 0}
        axes.fill_between(line[along], line["low"], line["high"], **band)


def summarise(layers: pd.DataFrame) -> pd.DataFrame:
    """Return mean, low and high over seeds, by panel, variant, when, metric and relative depth."""
    crossed = [name for name in layers if "." in name and name != SEED and layers[name].nunique() > 1]
    rows = []
    for key, line in layers.groupby([*crossed, "variant", "when"], sort=False):
        values = dict(zip(crossed, key, strict=False))
        panel = ", ".join(f"{name.partition('.')[2]} {value}" for name, value in values.items())
        place = {"panel": panel, "variant": key[-2], "when": key[-1]}
        for (depth, layer), seeds in line.groupby(["depth", "layer"]):
            for metric in NUMBERS:
                over = estimate(seeds[metric].tolist())
                at = {"metric": metric, "layer": layer, "depth": depth / line["depth"].max(), "n": over.n}
                rows.append(place | at | {"mean": over.mean, "low": over.low, "high": over.high})
    return pd.DataFrame(rows)


def main() -> int:
    words = sys.argv[1:]
    if not words or not (HERE / words[0]).is_file() or not Path(words[0]).name.startswith("layers"):
        print(__doc__)
        return 2
    file, *variants = words
    layers = pd.read_csv(HERE / file, keep_default_na=False)
    if unknown := {*variants} - {*layers["variant"]}:
        print(f"no variant {', '.join(sorted(unknown))} in {file}: it has {', '.join(layers['variant'].unique())}")
        return 2
    results = (HERE / file).with_name(Path(file).name.replace("layers", "results"))
    layers = at_best_rates(layers, pd.read_csv(results))
    figure = draw_layers(layers[layers["variant"].isin(variants)] if variants else layers)
    out = (HERE / file).with_suffix(".png")
    out.write_bytes(render(figure, ".png"))
    print(f"written  {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
