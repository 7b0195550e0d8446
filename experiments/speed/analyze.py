"""What `pdvit analyze` adds to a bare forward pass: `python analyze.py`.

The bare pass of a model over one batch, and the same pass with metrics measured at every layer, take turns in one
process on the same images; every number is the ratio to the bare pass of its own round (median and middle half), or of
the least times. Time is that of the CPU's clock for the process, or of the GPU between synchronisations. One row per
round is appended to analyze.csv.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from rounds import append

from pdvit import analyze
from pdvit.analysis import METRICS
from pdvit.definitions import DEFAULT
from pdvit.engine.device import device_name
from pdvit.models.layers import evaluating, exact_float32
from pdvit.tracking.environment import describe_environment

SIDES = ("bare", "default", *METRICS)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_base_patch16_224")
    parser.add_argument("--model-kwargs", nargs="*", default=[], metavar="K=V", help="such as depth=2 embed_dim=48")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=["bare", "default"])
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"))
    return parser.parse_args()


def make_passes(args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Return what each side runs, on one model and one batch."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    sizes = {key: int(value) for key, value in (pair.split("=") for pair in args.model_kwargs)}
    model = timm.create_model(args.model, img_size=args.img_size, **sizes).to(device).eval()
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)

    def bare() -> None:
        with torch.no_grad(), exact_float32(device), evaluating(model):
            model(images)

    def measured(names: tuple[str, ...]) -> Callable[[], Any]:
        return lambda: analyze(model, [images], names)

    return {
        side: bare if side == "bare" else measured(DEFAULT if side == "default" else (side,)) for side in args.sides
    }


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the time of a pass: of the process's CPU, or of the GPU until it is done."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - begun


def measure(args: argparse.Namespace) -> list[dict[str, float]]:
    """Return, for each round, the milliseconds of every side; the order rotates."""
    device = torch.device(args.device)
    passes = make_passes(args)
    for run in passes.values():
        seconds(run, device)
    rows = []
    for number in range(args.rounds):
        order = [*args.sides, *args.sides][number % len(args.sides) :][: len(args.sides)]
        spent = {side: seconds(passes[side], device) for side in order}
        rows.append({"round": number + 1, **{side: float(f"{1000 * spent[side]:.5g}") for side in args.sides}})
    return rows


def report(args: argparse.Namespace, rows: list[dict[str, float]]) -> None:
    """Print the table, and append the rows to the CSV file."""
    print("| side | ms per batch | ratio to bare, median (middle half) | of the least times |\n|" + " --- |" * 4)
    for side in args.sides:
        ratios = sorted(row[side] / row["bare"] for row in rows)
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        least = min(row[side] for row in rows) / min(row["bare"] for row in rows)
        spent = median(row[side] for row in rows)
        print(f"| {side} | {spent:.4g} | {median(ratios):.3f} ({low:.3f} to {high:.3f}) | {least:.3f} |")
    machine = describe_environment(device_name(torch.device(args.device)))
    facts: dict[str, Any] = {key: value for key, value in vars(args).items() if key not in ("sides", "csv")}
    facts |= {"model_kwargs": " ".join(args.model_kwargs)}
    facts |= {"hardware": machine["processor"] if args.device == "cpu" else machine["device"]}
    facts |= {"torch": machine["packages"]["torch"], "timm": machine["packages"]["timm"], "commit": machine["commit"]}
    print("\n" + ", ".join(f"{name} {value}" for name, value in facts.items() if value != ""))
    append(args.csv, [*facts, "round", *SIDES], (facts | row for row in rows))


def main() -> None:
    args = arguments()
    args.sides = list(dict.fromkeys(["bare", *args.sides]))
    torch.set_num_threads(args.threads)
    report(args, measure(args))


if __name__ == "__main__":
    main()
