"""What it is worth on a CPU that a step keeps the memory it frees: `python freed_memory.py`.

pdvit tells glibc to keep freed memory (`pdvit.engine.device`). This runs the same steps of training twice, with and
without, each in a process of its own, by turns, and prints page faults and CPU time per step. Linux with glibc only.
"""

import argparse
import json
import resource
import subprocess
import sys
from statistics import median

import timm
import torch
from torch.nn import functional as F

from pdvit.config.schema import RunConfig
from pdvit.engine.device import set_up


def steps(args: argparse.Namespace) -> list[float]:
    """Return page faults, and milliseconds of user and system time, per step."""
    torch.set_num_threads(1)
    if args.only == "kept":
        set_up(torch.device("cpu"), RunConfig())
    model = timm.create_model(args.model)
    images, targets = torch.randn(args.batch_size, 3, 224, 224), torch.arange(args.batch_size)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), targets).backward()

    step()
    step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(args.steps):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    names = ("ru_minflt", "ru_utime", "ru_stime")
    faults, user, system = ((getattr(after, name) - getattr(before, name)) / args.steps for name in names)
    return [faults, 1000 * user, 1000 * system]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("kept", "given back"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(steps(args)))
        return
    found: dict[str, list[list[float]]] = {"kept": [], "given back": []}
    for _ in range(args.rounds):
        for name, rows in found.items():
            command = [sys.executable, *sys.argv, "--only", name]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print("| freed memory is | page faults per step | user ms | system ms |\n|" + " --- |" * 4)
    for name, rows in found.items():
        faults, user, system = (median(column) for column in zip(*rows, strict=True))
        print(f"| {name} | {faults:.0f} | {user:.0f} | {system:.0f} |")
    ratios = [sum(kept[1:]) / sum(other[1:]) for kept, other in zip(*found.values(), strict=True)]
    print(f"\nCPU time, kept to given back: {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
