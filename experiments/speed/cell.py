"""Seconds of a cell of a sweep beside a plain run: `python cell.py`.

A round is one sweep over --cells seeds of the digits, and the same runs by `pdvit train`, one command for each seed;
the order alternates. Seconds are those of the clock for the commands, divided by the number of cells, so the check of
the configurations, which a sweep does once, counts for each cell with its part. One row per round is appended to
cell.csv.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from rounds import append

from pdvit.tracking.environment import describe_environment

PDVIT = [sys.executable, "-m", "pdvit", "train"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", default="4", help="of each run (default 4; 1st is one step)")
    parser.add_argument("--cells", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each run (default 1)")
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"))
    return parser.parse_args()


def seconds(commands: list[list[str]], folder: Path, threads: int) -> float:
    begun, environment = time.perf_counter(), os.environ | {"OMP_NUM_THREADS": str(threads)}
    for command in commands:
        settings: dict[str, Any] = {"cwd": folder, "env": environment, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, stdout=subprocess.PIPE, **settings)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\nended:\n{done.stdout[-3000:]}")
    return time.perf_counter() - begun


def one_round(args: argparse.Namespace, number: int) -> dict[str, float]:
    """Return the seconds of a cell, and of a plain run, in a new folder."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "sweep.toml").write_text(f'[sweep]\n"run.seed" = {[*range(args.cells)]}\n')
        sides = {
            "plain": [
                [*PDVIT, "--epochs", args.epochs, "--seed", str(seed), "--out", f"run{seed}"]
                for seed in range(args.cells)
            ],
            "cell": [[*PDVIT, "--config", "sweep.toml", "--epochs", args.epochs, "--out", "sweep"]],
        }
        spent = {side: seconds(sides[side], folder, args.threads) for side in [*sides][:: 1 if number % 2 else -1]}
    return {"round": number, **{side: float(f"{spent[side] / args.cells:.4g}") for side in sides}}


def main() -> None:
    args = arguments()
    rows = [one_round(args, number + 1) for number in range(args.rounds)]
    print("| epochs | seconds of a plain run | of a cell | ratio, median (minimum to maximum) |\n|" + " --- |" * 4)
    plain, cell = (median(row[side] for row in rows) for side in ("plain", "cell"))
    ratios = [row["cell"] / row["plain"] for row in rows]
    spread = f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    print(f"| {args.epochs} | {plain:.3g} | {cell:.3g} | {spread} |")
    machine = describe_environment("cpu")
    facts: dict[str, Any] = {
        "epochs": args.epochs,
        "cells": args.cells,
        "threads": args.threads,
        "hardware": machine["processor"],
    }
    facts |= {"cores": machine["cores"], "torch": machine["packages"]["torch"], "commit": machine["commit"]}
    print("\n" + ", ".join(f"{name} {value}" for name, value in facts.items()))
    append(args.csv, [*facts, *rows[0]], (facts | row for row in rows))


if __name__ == "__main__":
    main()
