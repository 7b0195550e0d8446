"""What have the patches of an image in common? `python experiments/ablation/shares.py [long]`.

It reads the runs of cpu.toml, or of long.toml. Of some variants it takes those at the best learning rate, and the
tokens behind the final norm of 256 of the images that a run ended with, scaled to length 1. Their mean square, which is
1, is split as in an analysis of variance: into what all patches of all images share, what those of a class share beyond
it, those of an image beyond its class, those at a place of the grid beyond all, and the rest. The first three make up P
as far as cosines are positive: with n patches, the mean cosine of different patches of an image is
(n (all + class + image) - 1) / (n - 1).

Then another image of another class is pasted into the left half of each: `own` is the share of patches that are nearer
to the class of the image that they are from than to that of the other, 0.5 by chance. A class is the direction of what
its patches share. It writes shares.csv (shares-long.csv), a row for each run, and prints means and standard deviations
over seeds.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from pdvit.similarity import patch_similarity, unit_tokens

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from regions import of_all_runs, opened, pasted  # noqa: E402

VARIANTS = ("none", "cutmix", "mixing", "cosine", "paper")


def measure(run: Path) -> dict[str, float]:
    """Return P of a run, of |cos| and of cos, the shares, and `own`."""
    model, images, labels, task = opened(run)
    mixed, classes, left = pasted(images, labels, task)
    with torch.no_grad():
        tokens, of_mixed = model(images).last, model(mixed).last
    both = {"similarity": False, "similarity_signed": True}
    found = {name: float(patch_similarity(tokens, signed).mean()) for name, signed in both.items()}
    apart, here, there = labels != classes, labels[:, None], classes[:, None]
    nearer = margins(tokens, labels, of_mixed, torch.where(left, there, here), torch.where(left, here, there))[apart]
    return found | shares(tokens, labels) | {"own": float((nearer > 0).float().mean())}


def shares(tokens: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the share of each part in the mean square of the tokens `(B, N, D)`, of images with labels `(B,)`."""
    unit = unit_tokens(tokens)
    everything, images, places = unit.mean((0, 1)), unit.mean(1), unit.mean(0)
    classes = torch.stack([images[labels == label].mean(0) for label in labels])
    parts = {
        "all": everything[None],
        "class": classes - everything,
        "image": images - classes,
        "place": places - everything,
    }
    found = {name: float(part.square().sum(-1).mean()) for name, part in parts.items()}
    return found | {"rest": 1 - sum(found.values())}


def margins(tokens: Tensor, labels: Tensor, others: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Return how much nearer other tokens `(B, N, D)` are to one class than to another, both `(B, N)`: `(B, N)`.

    The directions of the classes are those of the tokens with labels.
    """
    unit = unit_tokens(tokens)
    classes = torch.stack([unit[labels == label].mean((0, 1)) for label in range(int(labels.max()) + 1)])
    directions = unit_tokens(classes - unit.mean((0, 1)))
    near = (unit_tokens(others) - unit.mean((0, 1))) @ directions.T
    return (near.gather(2, own[..., None]) - near.gather(2, other[..., None])).squeeze(2)


if __name__ == "__main__":
    of_all_runs(measure, "shares", *(sys.argv[1:] or ["cpu"]), variants=VARIANTS)
