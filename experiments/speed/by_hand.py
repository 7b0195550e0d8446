"""What an analysis costs beside code written by hand: `python by_hand.py`.

Each side measures P of every block and of the final norm on the same random images, in a process of its own: `pdvit`,
`hooks` (hooks keep the tokens of all images, then one matrix of cosines for each layer, as one writes it in a
notebook), `batched` (the same hooks, but the matrices of each batch at once) and `torchlens` (its `extract`, eight
images at a time, with the same matrices). `bare` is the forward pass alone. The sides take turns. Seconds are those of
the CPU, memory is the highest resident size above that after a bare pass of one batch. One row per process is appended
to by_hand.csv. torchlens is no dependency of pdvit; without it, leave its side out. Linux only.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from rounds import append
from terms import held_mb
from torch import Tensor, nn
from torch.nn import functional as F

from pdvit import analyze
from pdvit.tracking.environment import describe_environment

SIDES = ("bare", "pdvit", "hooks", "batched", "torchlens")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_base_patch16_224")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=list(SIDES))
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--one", choices=SIDES, help="measure this side in this process, and print JSON")
    return parser.parse_args()


def batches(args: argparse.Namespace) -> list[Tensor]:
    images = torch.randn(args.images, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return list(images.split(args.batch_size))


def mean_cosine(tokens: Tensor) -> Tensor:
    """Return the mean of |cos| over the pairs of patches of each image, `(B, N, D)` with the class token first."""
    unit = F.normalize(tokens[:, 1:], dim=-1)
    cosines, count = (unit @ unit.mT).abs(), unit.shape[1]
    return (cosines.sum((1, 2)) - count) / (count * (count - 1))


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in [*(f"blocks.{n}" for n in range(len(model.blocks))), "norm"]}


def hooked(model: nn.Module, images: Sequence[Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the tokens of all layers for each batch."""
    kept: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: kept.update({name: output}))
        for name, module in layers_of(model).items()
    ]
    for batch in images:
        model(batch)
        yield dict(kept)
    for handle in handles:
        handle.remove()


def bare(model: nn.Module, images: Sequence[Tensor]) -> list[float]:
    for batch in images:
        model(batch)
    return []


def by_pdvit(model: nn.Module, images: Sequence[Tensor]) -> list[float]:
    table = analyze(model, images, ["similarity"]).table
    return [float(value) for value in table[table["depth"] > 0]["mean"]]


def by_hooks(model: nn.Module, images: Sequence[Tensor]) -> list[float]:
    kept = list(hooked(model, images))
    return [float(mean_cosine(torch.cat([tokens[name] for tokens in kept])).mean()) for name in layers_of(model)]


def by_batches(model: nn.Module, images: Sequence[Tensor]) -> list[float]:
    found = [[mean_cosine(tokens[name]) for name in layers_of(model)] for tokens in hooked(model, images)]
    return [float(torch.cat(values).mean()) for values in zip(*found, strict=True)]


def by_torchlens(model: nn.Module, images: Sequence[Tensor]) -> list[float]:
    import torchlens

    found = []
    for part in (part for batch in images for part in batch.split(8)):  # of 32 images, torchlens refuses to keep all
        tokens = torchlens.extract(model, part, list(layers_of(model)))
        found.append([mean_cosine(layer) for layer in tokens.values()])
    return [float(torch.cat(values).mean()) for values in zip(*found, strict=True)]


MEASURE: dict[str, Callable[[nn.Module, Sequence[Tensor]], list[float]]] = {
    "bare": bare,
    "pdvit": by_pdvit,
    "hooks": by_hooks,
    "batched": by_batches,
    "torchlens": by_torchlens,
}


@torch.no_grad()
def one_side(args: argparse.Namespace) -> dict[str, Any]:
    """Return seconds of CPU, megabytes and P of each layer of one side; a first batch warms it up."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, images = timm.create_model(args.model).eval(), batches(args)
    bare(model, images[:1])
    before, begun = held_mb(), time.process_time()
    values = MEASURE[args.one](model, images)
    return {"seconds": time.process_time() - begun, "mb": held_mb() - before, "similarity": values}


def main() -> None:
    args = arguments()
    if args.one:
        print(json.dumps(one_side(args)))
        return
    rows = []
    for number in range(args.rounds):
        for side in args.sides[number % len(args.sides) :] + args.sides[: number % len(args.sides)]:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", side]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append({"round": number + 1, "side": side, **json.loads(done.stdout.splitlines()[-1])})
    print("| side | seconds of CPU | ratio to bare | MB above the start | largest difference in P |\n|" + " --- |" * 5)
    reference = next((row["similarity"] for row in rows if row["similarity"]), [])
    bare_seconds = {row["round"]: row["seconds"] for row in rows if row["side"] == "bare"}
    for side in args.sides:
        mine = [row for row in rows if row["side"] == side]
        seconds, mb = (median(row[name] for row in mine) for name in ("seconds", "mb"))
        ratio = median(row["seconds"] / bare_seconds.get(row["round"], math.nan) for row in mine)
        values = mine[0]["similarity"]
        pairs = zip(values, reference, strict=True) if values else ()
        away = max((abs(value - other) for value, other in pairs), default=0.0)
        print(f"| {side} | {seconds:.4g} | {ratio:.3f} | {mb:.0f} | {away:.1g} |")
    machine = describe_environment("cpu")
    facts: dict[str, Any] = {
        key: value for key, value in vars(args).items() if key not in ("sides", "csv", "one", "rounds")
    }
    facts |= {"hardware": machine["processor"], "torch": machine["packages"]["torch"], "commit": machine["commit"]}
    print("\n" + ", ".join(f"{name} {value}" for name, value in facts.items()))
    columns = [*facts, "round", "side", "seconds", "mb"]
    append(args.csv, columns, ({name: (facts | row)[name] for name in columns} for row in rows))


if __name__ == "__main__":
    main()
