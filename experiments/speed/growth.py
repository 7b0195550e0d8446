"""How time and memory grow: `python growth.py`.

Three questions, each at four sizes: a pass of `analyze` with its default metrics over tokens, beside the bare pass; a
step of `train` with all terms over the depth; and `train --resume` over the steps that the run has done and recorded,
from the command to its first new record. Every size of the first two has a process of its own, for its memory: the most
it held beyond what it held before the model was built. A run of the third makes all its steps, with a record of each,
and is copied when it has done the number of a size; the resumed copies take turns. Seconds are those of the CPU. The
exponent is the slope of a line through the logarithms, over all sizes and between the last two. One row per size is
appended to growth.csv. Linux only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import timm
import torch
from rounds import append
from terms import held_mb
from utilisation import make_step

from pdvit import analyze
from pdvit.models.layers import evaluating
from pdvit.tracking.environment import describe_environment

SIZES = {"tokens": (196, 1024, 4096, 16384), "depth": (6, 12, 24, 48), "resume": (10, 100, 1000, 10000)}
MODEL, WIDTH, PATCH = "vit_tiny_patch16_224", {"embed_dim": 48, "num_heads": 3}, 4
# A run whose steps take a few milliseconds.
TINY = [
    *("--depth", "1", "--width", "16", "--heads", "1", "--patch-size", "16", "--diversity", "none"),
    *("--batch-size", "8", "--log-interval", "1st", "--val-interval", "1000000st", "--save-every", "1000000st"),
]
TRAIN = [sys.executable, "-m", "pdvit", "train"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--sizes", type=int, default=4, help="the first so many of each question (default 4)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def passes(tokens: int) -> dict[str, Callable[[], Any]]:
    """Return the bare pass of a narrow model of two blocks over one image, and that of `analyze`."""
    side = PATCH * round(tokens**0.5)
    model = timm.create_model(MODEL, img_size=side, patch_size=PATCH, depth=2, **WIDTH).eval()
    images = torch.randn(1, 3, side, side)

    def bare() -> None:
        with torch.no_grad(), evaluating(model):
            model(images)

    return {"bare_s": bare, "seconds": lambda: analyze(model, [images])}


def training(depth: int) -> dict[str, Callable[[], Any]]:
    """Return a step with all terms of 32 images of 32 pixels."""
    sizes = [f"{name}={value}" for name, value in {**WIDTH, "depth": depth, "patch_size": PATCH}.items()]
    args = SimpleNamespace(model=MODEL, model_kwargs=sizes, img_size=32, batch_size=32, classes=10)
    return {"seconds": make_step(SimpleNamespace(**vars(args), device="cpu", precision="fp32", compile=False), "paper")}


def one_size(question: str, size: int, rounds: int) -> dict[str, float]:
    """Return the median seconds of CPU of each pass, and the peak of this process in MB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = held_mb()
    sides = passes(size) if question == "tokens" else training(size)
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            begun = time.process_time()
            run()
            if number:  # the first warms up
                spent[name].append(time.process_time() - begun)
    return {name: median(values) for name, values in spent.items()} | {"mb": held_mb() - before}


def in_a_process(question: str, size: int, rounds: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", question, str(size), "--rounds", str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    settings: dict[str, Any] = {"cwd": folder, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings)


def ended(process: subprocess.Popen[str]) -> None:
    """Wait for a run that stops after the step that it was asked for."""
    output, _ = process.communicate()
    if "resume with" not in output:
        raise SystemExit(f"{process.args}\nended:\n{output[-3000:]}")


def resumed(folder: Path, name: str, size: int) -> float:
    """Return seconds of CPU from the command that resumes a copy to its first new record."""
    shutil.copytree(folder / name, folder / "copy")
    records = folder / "copy" / "metrics.jsonl"
    before, ticks = records.stat().st_size, os.sysconf("SC_CLK_TCK")
    process = start([*TRAIN, "--resume", "copy", "--change", f"run.stop_after={size + 1}st"], folder)
    while process.poll() is None and records.stat().st_size == before:
        time.sleep(0.002)
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    ended(process)
    shutil.rmtree(folder / "copy")
    return (int(fields[11]) + int(fields[12])) / ticks


def resume(sizes: tuple[int, ...], rounds: int) -> dict[int, dict[str, float]]:
    """Return the median seconds of each number of steps done."""
    with tempfile.TemporaryDirectory() as made:
        folder, spent = Path(made), {size: list[float]() for size in sizes}
        for size in sizes:
            begin = [*TINY, "--epochs", f"{sizes[-1] + 1}st", "--out", "run", "--stop-after", f"{size}st"]
            more = ["--resume", "run", "--change", f"run.stop_after={size}st"]
            ended(start([*TRAIN, *(begin if size == sizes[0] else more)], folder))
            shutil.copytree(folder / "run", folder / f"{size}")
        for number in range(rounds):
            for size in sizes[:: 1 if number % 2 else -1]:
                spent[size].append(resumed(folder, f"{size}", size))
        return {size: {"seconds": median(values)} for size, values in spent.items()}


def slope(found: dict[int, dict[str, float]], name: str) -> str:
    """Return the exponent of all sizes, and that of the last two."""
    points = np.log([(size, row[name]) for size, row in found.items()])
    return " and ".join(f"{np.polyfit(*part.T, 1)[0]:.2f}" for part in (points, points[-2:]))


def main() -> None:
    args = arguments()
    if args.one:
        print(json.dumps(one_size(args.one[0], int(args.one[1]), args.rounds)))
        return
    machine = describe_environment("cpu")
    facts = {"rounds": args.rounds, "hardware": machine["processor"], "torch": machine["packages"]["torch"]}
    facts |= {"commit": machine["commit"]}
    columns = ["question", "size", "seconds", "bare_s", "mb"]
    print("| over | size | seconds | of the bare pass | MB |\n|" + " --- |" * 5)
    for question in args.questions:
        sizes = SIZES[question][: args.sizes]
        measured = partial(in_a_process, question, rounds=args.rounds)
        found = resume(sizes, args.rounds) if question == "resume" else {size: measured(size) for size in sizes}
        names = [name for name in columns if name in found[sizes[0]]]
        for size, row in found.items():
            print(
                f"| {question} | {size:,} | {' | '.join(f'{row[n]:.3g}' if n in row else '-' for n in columns[2:])} |"
            )
        if len(sizes) > 1:
            slopes = (slope(found, name) if name in names else "-" for name in columns[2:])
            print(f"| {question} | exponent, of the last two | {' | '.join(slopes)} |", flush=True)
        rows = [{"question": question, "size": size, **row} for size, row in found.items()]
        append(args.csv, [*facts, *columns], (facts | row for row in rows))
    print("\n" + ", ".join(f"{name} {value}" for name, value in facts.items()))


if __name__ == "__main__":
    main()
