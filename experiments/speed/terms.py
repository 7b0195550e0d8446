"""What the three terms add to a step of training: `python terms.py`.

One step is forward, loss, backward. Sides take turns on the same model, images and targets: the bare timm model with
its class loss; the same with all three terms; with each alone; with the gram term, whose anchor is a frozen copy of
the model; and with all three written down literally (the whole matrix of cosines, all logits of the patches at once).
The order rotates, and every number is a ratio to the bare step of its own round (median and middle half), or of the
least time of each side. Time is that of the CPU's clock for the process, or of the GPU between synchronisations. Peak
memory comes from a fresh process for each side: the most it held beyond what it held before the model was built. One
row per round is appended to terms.csv.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from rounds import append
from torch import Tensor, nn
from torch.nn import functional as F

from pdvit import DiverseModel, Objective
from pdvit.engine.device import device_name
from pdvit.losses import TERMS
from pdvit.tracking.environment import describe_environment

SIDES = ("plain", "all", *TERMS[:3], "gram", "literal")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--model-kwargs", nargs="*", default=[], metavar="K=V", help="such as depth=8 embed_dim=48")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=SIDES)
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("terms.csv"))
    return parser.parse_args()


def literal(first: Tensor, last: Tensor, patch_logits: Tensor, patch_targets: Tensor) -> Tensor:
    """The three formulas as they stand in the paper, added up."""
    count = last.shape[1]
    unit = F.normalize(last.float(), dim=-1)
    cosines = (unit @ unit.transpose(1, 2)).abs()
    alike = (cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)) / (count * (count - 1))
    others = (last.sum(1, keepdim=True) - last) / (count - 1)
    own, other = (first.detach() * last).sum(-1), (first.detach() * others).sum(-1)
    contrast = torch.logaddexp(own, other) - own
    mixing = F.cross_entropy(patch_logits.flatten(0, 1), patch_targets.flatten())
    return alike.mean() + contrast.mean() + mixing


def make_step(side: str, args: argparse.Namespace) -> Callable[[], None]:
    """Build a model on the device, and return one step of a side."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    values = {key: int(value) for key, value in (pair.split("=") for pair in args.model_kwargs)}
    sizes = {"img_size": args.img_size, "patch_size": args.patch_size, "num_classes": args.classes}
    model = timm.create_model(args.model, **sizes, **values)
    mixing = side in ("all", "mixing", "literal")
    wrapped = None if side == "plain" else DiverseModel(model, patch_head=mixing).to(device)
    network: nn.Module = (model.to(device) if wrapped is None else wrapped).train()
    frozen = wrapped.make_anchor() if wrapped is not None and side == "gram" else None
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    targets = torch.randint(args.classes, (args.batch_size,), device=device)
    count = (args.img_size // args.patch_size) ** 2
    patch_targets = targets[:, None].expand(-1, count).contiguous() if mixing else None
    weights = dict.fromkeys(TERMS, 0.0) | ({} if side in ("plain", "literal") else {side: 1.0})
    weights = dict.fromkeys(("cosine", "contrastive", "mixing"), 1.0) if side == "all" else weights
    objective = Objective(**weights)

    def loss() -> Tensor:
        if side == "plain":
            return F.cross_entropy(network(images).float(), targets)
        if side == "literal":
            output = network(images)
            assert patch_targets is not None
            terms = literal(output.first, output.last, output.patch_logits.float(), patch_targets)
            return F.cross_entropy(output.logits.float(), targets) + terms
        output = network(images, patch_targets) if mixing else network(images)
        with torch.no_grad():
            anchor = None if frozen is None else frozen.last_tokens(images)
        return objective(output, targets, patch_targets, anchor=anchor).total

    forward = torch.compile(loss, fullgraph=True, dynamic=False) if args.compile else loss

    def step() -> None:
        network.zero_grad(set_to_none=True)
        half = torch.autocast(device.type, torch.bfloat16) if args.precision == "bf16" else nullcontext()
        with half:
            value = forward()
        value.backward()

    return step


def seconds(step: Callable[[], None], device: torch.device, steps: int) -> float:
    """Return the time of a step: of the process's CPU, or of the GPU until it is done."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = clock()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - begun) / steps


def peak_mb(side: str, args: argparse.Namespace) -> float:
    """Return the most memory of two steps, beyond what the process held before the model was built, in MB."""
    if args.device != "cpu":
        step = make_step(side, args)
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 1e6
    before = held_mb()
    step = make_step(side, args)
    for _ in range(2):
        step()
    return held_mb() - before


def held_mb() -> float:
    """Return the most memory that this process held so far. Linux only; `getrusage` would begin with its parent's."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e6


def measure(args: argparse.Namespace) -> list[dict[str, float]]:
    """Return, for each round, the milliseconds of a step of every side."""
    device = torch.device(args.device)
    steps = {side: make_step(side, args) for side in args.sides}
    for step in steps.values():
        seconds(step, device, 2)
    times = 20 if device.type == "cuda" else 1
    rows = []
    for number in range(args.rounds):
        order = [*args.sides, *args.sides][number % len(args.sides) :][: len(args.sides)]
        spent = {side: seconds(steps[side], device, times) for side in order}
        rows.append({"round": number + 1, **{side: float(f"{1000 * spent[side]:.5g}") for side in args.sides}})
    return rows


def memory(args: argparse.Namespace) -> dict[str, float]:
    """Return the peak of every side, each in a process of its own."""
    found = {}
    for side in args.sides:
        command = [sys.executable, *sys.argv, "--memory-of", side]
        found[side] = float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return found


def report(args: argparse.Namespace, rows: list[dict[str, float]], peaks: dict[str, float]) -> None:
    """Print the table, and append the rows to the CSV file."""
    print("| side | ms per step | ratio to plain | of the least times | peak MB | ratio to plain |\n|" + " --- |" * 6)
    for side in args.sides:
        ratios = sorted(row[side] / row["plain"] for row in rows)
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        least = min(row[side] for row in rows) / min(row["plain"] for row in rows)
        spent = (
            f"{median(row[side] for row in rows):.4g} | {median(ratios):.3f} ({low:.3f} to {high:.3f}) | {least:.3f}"
        )
        print(f"| {side} | {spent} | {peaks[side]:.0f} | {peaks[side] / peaks['plain']:.3f} |")
    machine = describe_environment(device_name(torch.device(args.device)))
    facts: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in ("sides", "csv", "memory_of")}
    facts |= {"model_kwargs": " ".join(args.model_kwargs)}
    facts |= {"hardware": machine["processor"] if args.device == "cpu" else machine["device"]}
    facts |= {"torch": machine["packages"]["torch"], "timm": machine["packages"]["timm"], "commit": machine["commit"]}
    facts |= {f"{side}_peak_mb": float(f"{peak:.5g}") for side, peak in peaks.items()}
    print("\n" + ", ".join(f"{name} {value}" for name, value in facts.items() if value not in ("", False)))
    columns = [name for name in facts if not name.endswith("_peak_mb")]
    columns += ["round", *SIDES, *(f"{side}_peak_mb" for side in SIDES)]
    append(args.csv, columns, (facts | row for row in rows))


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(peak_mb(args.memory_of, args))
        return
    report(args, measure(args), memory(args))


if __name__ == "__main__":
    main()
