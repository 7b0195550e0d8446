"""Do patches tell images apart? `python experiments/ablation/regions.py` reads the runs of cpu.toml.

Of each variant it takes the runs at the best learning rate. On 256 of the images that a run ended with, plain and with
the left half of each pasted from another one, it measures P after the final norm over pairs of patches in the same
half and over pairs across the halves, where mixed halves are of different classes. Patches across are farther apart on
the grid, mixed or not: what mixing adds is the difference between the two. It writes regions.csv, a row for each run,
and prints means and standard deviations over seeds in Markdown.
"""

import io
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from pdvit import DiverseModel
from pdvit.config import build, read_toml
from pdvit.data.loader import eval_batches
from pdvit.data.mixing import paste
from pdvit.data.sources.split import subsample
from pdvit.models.loading import load_model
from pdvit.models.resolved_checkpoint import resolve_checkpoint
from pdvit.similarity import unit_tokens
from pdvit.tasks.base import ImageTask
from pdvit.workflows.console import make_console
from pdvit.workflows.runs import build_trainer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from effects import at_best_rates, report  # noqa: E402
from tables import SEED, write_table  # noqa: E402

Measure = Callable[[Path], dict[str, float]]
RUNS = Path("runs/ablation")
IMAGES = 256


def opened(run: Path) -> tuple[DiverseModel, Tensor, Tensor, ImageTask]:
    """Return the model of a finished run, images of the split that it ended with, their classes, and its task."""
    with redirect_stderr(io.StringIO()):  # it would say what it prepares
        task = build_trainer(build(("run.toml", read_toml(run / "run.toml"))), make_console(as_json=True)).task
    chosen = subsample(task.source.splits[task.source.final_split], IMAGES)
    batches = list(eval_batches(chosen, task.loader))
    images, labels = torch.cat([batch.images for batch in batches]), torch.cat([batch.targets for batch in batches])
    model = load_model(resolve_checkpoint(run)).model.to(images.device)
    return DiverseModel(model, patch_head=False).eval(), images, labels, task


def pasted(images: Tensor, labels: Tensor, task: ImageTask) -> tuple[Tensor, Tensor, Tensor]:
    """Return images with another one in their left half, the class of that one, and which patches `(N,)` are there."""
    side = task.config.model.patch_size
    rows, columns = images.shape[-2] // side, images.shape[-1] // side
    left = (torch.arange(columns, device=images.device) < columns // 2).expand(rows, columns)
    others, classes = images.roll(1, 0), labels.roll(1)
    mixed = paste(images, labels, others, classes, left.expand(len(images), -1, -1), len(task.source.classes))
    return mixed.images, classes, left.flatten()


def measure(run: Path) -> dict[str, float]:
    """Return P over pairs in the same half and across the halves, of plain and of mixed images."""
    model, images, labels, task = opened(run)
    mixed, classes, left = pasted(images, labels, task)
    apart, found = labels != classes, {}
    with torch.no_grad():
        for name, pictures in (("plain", images), ("mixed", mixed)):
            same, across = parts(model(pictures).last[apart], left)
            found |= {f"{name}_same_half": same, f"{name}_across": across}
    return found


def parts(tokens: Tensor, side: Tensor) -> tuple[float, float]:
    """Return the mean |cos| over pairs of different patches on one side, and on different ones; `side` is `(N,)`."""
    unit = unit_tokens(tokens)
    cosines = (unit @ unit.transpose(1, 2)).abs().mean(0)
    same = side[:, None] == side
    apart = ~torch.eye(len(side), dtype=torch.bool, device=side.device)
    return float(cosines[same & apart].mean()), float(cosines[~same].mean())


def of_all_runs(take: Measure, name: str, kind: str = "cpu", variants: Sequence[str] = ()) -> None:
    """Measure the runs of a sweep at the best rates, of some variants or all; write and print the table."""
    end = "" if kind == "cpu" else f"-{kind}"
    cells, rows = pd.read_csv(HERE / f"results{end}.csv"), []
    for cell in at_best_rates(cells[cells["status"] == "finished"], cells).to_dict("records"):
        if not variants or cell["variant"] in variants:
            run = RUNS.with_name(RUNS.name + end) / cell["name"]
            if not (run / "summary.json").is_file():
                words = "" if kind == "cpu" else f" {kind}"
                sys.exit(f"no run here at {run}: train them first, `python experiments/run.py ablation{words}`")
            rows.append({"variant": cell["variant"], SEED: cell[SEED], **take(run)})
    write_table(HERE / f"{name}{end}.csv", rows)
    print(report(f"ablation/{name}{end}.csv"), end="")


if __name__ == "__main__":
    of_all_runs(measure, "regions")
