"""What have the patches of an image in common, and do they tell it from another one pasted into it?

`python experiments/ablation/shares.py` reads the runs of cpu.toml, `shares.py long` those of long.toml. Of some
variants it takes those at the best learning rate, and the tokens after the final norm of 256 images of a run, scaled
to length 1. Their mean square, which is 1, is split as in an analysis of variance: into what all patches
of all images share, what those of a class share beyond it, those of an image beyond its class, those at a place of the
grid beyond all, and the rest (a class at a place is part of it). With n patches, the mean cosine of two patches of
an image is (n (all + class + image) - 1) / (n - 1); P is that of |cos|.

Then another image of another class is pasted into the left half of each. `own` is the share of these pictures in which
the right half leans more to the class of the right image, against that of the left one, than the left half does: 0.5 by
chance, whatever both halves have in common. A class is the direction of what its patches share on plain images. Where
a run has a patch head, `head_plain` is the share of patches of plain images to which it gives the class of their image,
`head_own` of patches of the pasted pictures, and `head_other` the share to which it gives the class of the other image.

It writes shares.csv (shares-long.csv), a row for each run, and prints means and standard deviations over seeds.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pdvit import DiverseModel
from pdvit.similarity import patch_similarity, unit_tokens

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from regions import of_all_runs, opened, pasted  # noqa: E402

VARIANTS = ("none", "cutmix", "mixing", "cosine", "paper")


def measure(run: Path) -> dict[str, float]:
    """Return P of a run, of |cos| and of cos, the shares, `own`, and what the patch head says where there is one."""
    model, images, labels, task = opened(run)
    mixed, classes, left = pasted(images, labels, task)
    apart = labels != classes
    with torch.no_grad():
        tokens, of_mixed = model(images).last, model(mixed).last
    found = {"similarity": float(patch_similarity(tokens).mean())}
    found |= {"similarity_signed": float(patch_similarity(tokens, signed=True).mean())}
    found |= shares(tokens, labels)
    found |= {"own": own(leanings(tokens, labels, of_mixed, labels, classes)[apart], left)}
    head = task.module
    assert isinstance(head, DiverseModel)
    if head.patch_head is None:
        return found
    head.load_state_dict(load_file(max(run.glob("checkpoints/step-*")) / "module.safetensors"))
    with torch.no_grad():
        plain, of_mixed = (head.eval()(pictures).patch_logits.argmax(-1) for pictures in (images, mixed))
    here, there = labels[:, None], classes[:, None]
    right = {
        "head_plain": plain == here,
        "head_own": (of_mixed == torch.where(left, there, here))[apart],
        "head_other": (of_mixed == torch.where(left, here, there))[apart],
    }
    return found | {name: float(share.float().mean()) for name, share in right.items()}


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


def leanings(tokens: Tensor, labels: Tensor, others: Tensor, to: Tensor, away: Tensor) -> Tensor:
    """Return how much nearer other tokens `(B, N, D)` are to one class than to another, each `(B,)`: `(B, N)`.

    The directions of the classes are those of the tokens with labels.
    """
    unit = unit_tokens(tokens)
    classes = torch.stack([unit[labels == label].mean((0, 1)) for label in range(int(labels.max()) + 1)])
    directions = unit_tokens(classes - unit.mean((0, 1)))
    return ((unit_tokens(others) - unit.mean((0, 1))) * (directions[to] - directions[away])[:, None]).sum(-1)


def own(leanings: Tensor, left: Tensor) -> float:
    """Return the share of pictures whose patches `(B, N)` lean more to the right class on the right side."""
    return float((leanings[:, ~left].mean(1) > leanings[:, left].mean(1)).float().mean())


if __name__ == "__main__":
    of_all_runs(measure, "shares", *sys.argv[1:2], variants=VARIANTS)
