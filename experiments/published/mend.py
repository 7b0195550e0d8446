"""The tables and the figure of mend-*.toml: `python experiments/published/mend.py`.

Seed 0 has every rate and chooses those that the other seeds have; of several, the best mean on validation counts. It
writes mend-rates.csv (all finished cells), results-mend-TASK.csv (the other seeds at the chosen rates, as `run.py`
writes results), layers-mend.csv (P of each layer at the end of a run, on 64 validation images) and mend.png. The dashed
lines are the published model as it is, from metrics.csv.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from figures import DASHED, draw_means  # noqa: E402
from tables import RATE, SEED, Row, best_rates, cells_of, write_table  # noqa: E402

from pdvit.plots.style import DOUBLE, LIGHT, Drawing, legend, line_styles, new_figure, render  # noqa: E402
from pdvit.plots.sweep import estimate  # noqa: E402

# The sweep of each task, its name, and its images in metrics.csv.
TASKS = {
    "pets": ("pets", "pets"),
    "linear": ("CamVid, linear head", "CamVid"),
    "upernet": ("CamVid, UPerNet", "CamVid"),
}
TUNING = "0"  # the seed that has every rate
HEIGHT = 2.6  # of the figure, in inches


def layers_of(run: Path) -> Iterator[Row]:
    """Yield P of each layer at the last evaluation of a run."""
    records = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    *_, last = (record for record in records if record["kind"] == "similarity")
    for depth, (layer, similarity) in enumerate(zip(last["layers"], last["similarity"], strict=True)):
        yield {"layer": layer, "depth": depth, "similarity": similarity}


def draw(layers: pd.DataFrame, published: pd.DataFrame) -> Drawing:
    """Draw a panel for each task: P by layer, mean and 95 % interval over seeds."""
    names = list(layers["variant"].unique())
    styles = dict(zip(names, [look | {"marker": ""} for look in line_styles(len(names))], strict=True))
    tasks = list(layers["task"].unique())
    keys = ["task", "variant", "layer", "depth"]
    table = pd.DataFrame(
        dict(zip(keys, key, strict=True)) | estimate(seeds.tolist())._asdict()
        for key, seeds in layers.groupby(keys, sort=False)["similarity"]
    )
    with new_figure(table, DOUBLE, HEIGHT, LIGHT) as figure:
        figure.subplots(1, len(tasks), sharey=True)
        for axes, task in zip(figure.axes, tasks, strict=True):
            name, images = TASKS[task]
            before = published[(published["run"] == images) & (published["metric"] == "similarity")]
            axes.plot(before["depth"], before["mean"], color=LIGHT.ink, linestyle=DASHED, label="published")
            draw_means(axes, table[table["task"] == task], "depth", styles)
            axes.set(
                title=name, xlabel="block (13 is the norm)", xticks=range(0, 14, 2), ylim=(0, 1)
            )  # an interval can leave the range of P
        figure.axes[0].set_ylabel("P, patch similarity")
        legend(figure, styles, [line for line in figure.axes[0].lines if line.get_label() == "published"])
        return figure


def main() -> None:
    """Write the tables and the figure of the tasks that were run."""
    every, layers = [], []
    for task in TASKS:
        sweep = Path("runs") / f"mend-{task}"
        cells = [cell for cell in cells_of(sweep) if cell["status"] == "finished"] if sweep.is_dir() else []
        every += [{"task": task} | cell for cell in cells]
        print(task, best_rates([cell for cell in cells if cell[SEED] == TUNING]))
        others = [cell for cell in cells if cell[SEED] != TUNING]
        rates = {name: rate for name, (rate, *_) in best_rates(others).items()}
        chosen = [cell for cell in others if float(cell[RATE]) == rates[cell["variant"]]]
        if chosen:
            write_table(HERE / f"results-mend-{task}.csv", chosen)
        for cell in chosen:
            of_cell = {"task": task, "variant": cell["variant"], SEED: cell[SEED], RATE: cell[RATE]}
            layers += [of_cell | row for row in layers_of(sweep / cell["name"])]
    write_table(HERE / "mend-rates.csv", every)
    write_table(HERE / "layers-mend.csv", layers)
    drawn = draw(pd.read_csv(HERE / "layers-mend.csv"), pd.read_csv(HERE / "metrics.csv"))
    (HERE / "mend.png").write_bytes(render(drawn, ".png"))


if __name__ == "__main__":
    main()
