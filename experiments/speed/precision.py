"""What bf16 gains on a CPU, and what it changes: `python precision.py`.

A step of `train` with all terms and a pass of `analyze` with its default metrics take turns in fp32 and in bf16, in one
process on the same noise. Every number is a ratio to fp32 in its own round, in CPU time. Then the digits are trained in
both, and each run is analyzed in both: accuracy on the test images, and the largest difference in P between the two
analyses of one run, over its layers. One row per round or run is appended to precision.csv.
"""

import argparse
import copy
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import timm
import torch
from rounds import append
from terms import seconds
from utilisation import make_step

from pdvit import analyze
from pdvit.tracking.environment import describe_environment

PRECISIONS = ("fp32", "bf16")
PDVIT = [sys.executable, "-m", "pdvit"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--model-kwargs", nargs="*", default=[], metavar="K=V", help="such as depth=8 embed_dim=48")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", default="12", help="of the digits (default 12)")
    parser.add_argument("--seeds", type=int, default=3, help="of the digits; 0: leave them out")
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"))
    return parser.parse_args()


def make_sides(args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Return a step and a pass in each precision."""
    sides: dict[str, Callable[[], Any]] = {}
    torch.manual_seed(0)
    sizes = {key: int(value) for key, value in (pair.split("=") for pair in args.model_kwargs)}
    model = timm.create_model(args.model, img_size=args.img_size, num_classes=args.classes, **sizes).eval()
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size)
    for precision in PRECISIONS:
        own = argparse.Namespace(**vars(args), device="cpu", precision=precision, compile=False)
        sides[f"train_{precision}"] = make_step(own, "paper")
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32  # as `--precision` has it
        network, batch = copy.deepcopy(model).to(dtype), images.to(dtype)
        sides[f"analyze_{precision}"] = lambda network=network, batch=batch: analyze(network, [batch])
    return sides


def times(args: argparse.Namespace) -> list[dict[str, float]]:
    """Return the milliseconds of every side in each round; the order rotates."""
    sides, device = make_sides(args), torch.device("cpu")
    for run in sides.values():
        seconds(run, device, 1)
    rows = []
    for number in range(args.rounds):
        order = [*sides, *sides][number % len(sides) :][: len(sides)]
        spent = {side: 1000 * seconds(sides[side], device, 1) for side in order}
        rows.append({"round": number + 1, **{side: float(f"{spent[side]:.5g}") for side in sides}})
    return rows


def pdvit(folder: Path, *words: str) -> None:
    done = subprocess.run([*PDVIT, *words], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pdvit {' '.join(words)}\nended:\n{done.stderr[-3000:]}")


def similarity(file: Path) -> list[float]:
    with file.open(newline="") as table:
        return [float(row["mean"]) for row in csv.DictReader(table) if row["metric"] == "similarity"]


def digits(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return the accuracy of each run, and the largest difference in P between its analyses."""
    rows = []
    for seed in range(args.seeds):
        for precision in PRECISIONS:
            run = f"{precision}-{seed}"
            pdvit(folder, "train", "--epochs", args.epochs, "--seed", f"{seed}", "--precision", precision, "--out", run)
            for other in PRECISIONS:
                pdvit(folder, "analyze", run, "--precision", other, "--out", f"{run}-in-{other}")
            one, two = (similarity(folder / f"{run}-in-{other}" / "analysis.csv") for other in PRECISIONS)
            difference = max(abs(a - b) for a, b in zip(one, two, strict=True))
            accuracy = json.loads((folder / run / "summary.json").read_text())["accuracy"]
            rows.append({"seed": seed, "trained_in": precision, "accuracy": accuracy, "difference": difference})
    return rows


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the commands
    rows: list[dict[str, Any]] = [*times(args)]
    print("| one | ms in fp32 | ms in bf16 | ratio, median (minimum to maximum) |\n|" + " --- |" * 4)
    for what in ("train", "analyze"):
        fp32, bf16 = ([row[f"{what}_{precision}"] for row in rows] for precision in PRECISIONS)
        ratios = [b / a for a, b in zip(fp32, bf16, strict=True)]
        spread = f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"| {what} | {median(fp32):.4g} | {median(bf16):.4g} | {spread} |", flush=True)
    with tempfile.TemporaryDirectory() as made:
        runs = digits(args, Path(made))
    if runs:
        print("\n| digits trained in | accuracy, % (minimum to maximum) | largest difference in P |\n|" + " --- |" * 3)
    for precision in PRECISIONS if runs else ():
        mine = [row for row in runs if row["trained_in"] == precision]
        found = [100 * row["accuracy"] for row in mine]
        difference = max(row["difference"] for row in mine)
        print(f"| {precision} | {mean(found):.2f} ({min(found):.2f} to {max(found):.2f}) | {difference:.2g} |")
    machine = describe_environment("cpu")
    facts: dict[str, Any] = {name: value for name, value in vars(args).items() if name not in ("rounds", "csv")}
    facts |= {"model_kwargs": " ".join(args.model_kwargs), "hardware": machine["processor"]}
    facts |= {"torch": machine["packages"]["torch"], "timm": machine["packages"]["timm"], "commit": machine["commit"]}
    print("\n" + ", ".join(f"{name} {value}" for name, value in facts.items() if value != ""))
    columns = [*facts, *rows[0], "seed", "trained_in", "accuracy", "difference"]
    append(args.csv, columns, (facts | row for row in [*rows, *runs]))


if __name__ == "__main__":
    main()
