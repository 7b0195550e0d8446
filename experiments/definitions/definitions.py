"""How far apart the definitions of patch similarity read on one model: `python definitions.py CHECKPOINT`.

Each definition is written out here as its formula stands, one image at a time, in float64, apart from pdvit's own
metrics. The images are those that `pdvit analyze CHECKPOINT` takes. The rows go to definitions.csv, the table of
README.md is printed.
"""

import argparse
import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pdvit.config import build, read_toml
from pdvit.data.loader import LoaderConfig, eval_batches
from pdvit.data.opening import held_out_images
from pdvit.data.preprocessing import Preprocessing
from pdvit.models.layers import find_layers, watch
from pdvit.models.loading import load_model
from pdvit.models.resolved_checkpoint import resolve_checkpoint
from pdvit.tracking.environment import describe_environment

IMAGES = 256
# One image's tokens `(T, D)`, class token first, and how many tokens that is; returns the similarity.
Measure = Callable[[Tensor, int], float]


def cosines(tokens: Tensor) -> Tensor:
    """Return the cosines of all pairs, `(T, T)`."""
    unit = tokens / tokens.norm(dim=1, keepdim=True)
    return unit @ unit.T


def off_diagonal(matrix: Tensor) -> Tensor:
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


def neighbours(tokens: Tensor) -> float:
    """Mean cosine of each patch with those above, below and beside it."""
    side = round(len(tokens) ** 0.5)
    grid = (tokens / tokens.norm(dim=1, keepdim=True)).view(side, side, -1)
    beside = [(grid[1:] * grid[:-1]).sum(-1).flatten(), (grid[:, 1:] * grid[:, :-1]).sum(-1).flatten()]
    return float(torch.cat(beside).mean())


# Words for the table, who defines it so (the source as docs and issues tell it), and the formula.
DEFINITIONS: list[tuple[str, str, Measure]] = [
    (
        "P: mean of \\|cos\\| over i ≠ j, patches only",
        "Gong et al. 2021, v3 (arXiv 2104.12753); here",
        lambda tokens, prefix: float(off_diagonal(cosines(tokens[prefix:])).abs().mean()),
    ),
    (
        "signed: mean of cos over i ≠ j",
        "v1 of the same paper",
        lambda tokens, prefix: float(off_diagonal(cosines(tokens[prefix:])).mean()),
    ),
    (
        "\\|cos\\| with the diagonal",
        "Wang et al. 2022 (arXiv 2203.05962), as answered in ViT-Anti-Oversmoothing#2",
        lambda tokens, prefix: float(cosines(tokens[prefix:]).abs().mean()),
    ),
    (
        "cos, signed, with the diagonal",
        "the code of Diverse-ViT",
        lambda tokens, prefix: float(cosines(tokens[prefix:]).mean()),
    ),
    (
        "\\|cos\\| over i ≠ j, class token among the tokens",
        "code that slices nothing off",
        lambda tokens, prefix: float(off_diagonal(cosines(tokens)).abs().mean()),
    ),
    (
        "\\|cos\\| over i ≠ j after the image's mean patch is taken off",
        "the high-frequency part of Wang et al. 2022",
        lambda tokens, prefix: float(off_diagonal(cosines(tokens[prefix:] - tokens[prefix:].mean(0))).abs().mean()),
    ),
    (
        "cos with the four neighbours alone",
        "after Darcet et al. 2024 (arXiv 2309.16588), figure 5a",
        lambda tokens, prefix: neighbours(tokens[prefix:]),
    ),
    (
        "length of the mean patch over the root mean square length: √ of `dc_share`",
        "Wang et al. 2022",
        lambda tokens, prefix: float(tokens[prefix:].mean(0).norm() / tokens[prefix:].square().sum(1).mean().sqrt()),
    ),
]


def whole_tokens(checkpoint: Path) -> tuple[dict[str, list[Tensor]], int]:
    """Return the tokens of every image `(T, D)`, prefix tokens with them, of the layers that are compared."""
    loaded = load_model(resolve_checkpoint(checkpoint))
    places = find_layers(loaded.model)[1]
    prefix = places["norm"].prefix
    blocks = [name for name in places if name.startswith("block")]
    names = ("embed", blocks[len(blocks) // 2 - 1], blocks[-1], "norm")
    chosen = {name: replace(places[name], prefix=0) for name in names}  # the class token is wanted here
    found: dict[str, list[Tensor]] = {name: [] for name in chosen}
    run = build(("run.toml", read_toml(checkpoint / "run.toml")))
    loading = LoaderConfig(32, 0, 0, torch.device("cpu"), Preprocessing.for_model(loaded.model))
    with torch.no_grad(), watch(chosen, lambda name, tokens: found[name].extend(tokens.double())):
        for batch in eval_batches(held_out_images(run).subsample(IMAGES).split, loading):
            loaded.model(batch.images)
    return found, prefix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a run directory of a plain model with a class token")
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    found, prefix = whole_tokens(args.checkpoint)
    made = describe_environment("cpu")
    rows = []
    print(f"| definition | as in | {' | '.join(found)} |\n| --- | --- |{' --- |' * len(found)}")
    for text, source, measure in DEFINITIONS:
        values = {name: [measure(tokens, prefix) for tokens in images] for name, images in found.items()}
        means = {name: sum(each) / len(each) for name, each in values.items()}
        print(f"| {text} | {source} | {' | '.join(f'{mean:.3f}' for mean in means.values())} |")
        rows.append({"definition": text.replace("\\", ""), "source": source, **means, "images": len(values["norm"])})
    with args.csv.open("w", newline="", encoding="utf-8") as file:
        facts = {"checkpoint": args.checkpoint.name, "processor": made["processor"], "commit": made["commit"]}
        writer = csv.DictWriter(file, [*rows[0], *facts])
        writer.writeheader()
        writer.writerows(row | facts for row in rows)


if __name__ == "__main__":
    main()
