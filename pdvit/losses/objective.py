"""Class loss plus weighted diversity terms."""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pdvit.errors import UserError
from pdvit.losses.contrastive import contrastive_loss
from pdvit.losses.cosine import cosine_loss
from pdvit.losses.mixing import mixing_loss
from pdvit.similarity import at_least_float32

TERMS = ("cosine", "contrastive", "mixing")


class Tokens(Protocol):
    """What the objective reads of a forward pass; `pdvit.DiverseModel` returns it."""

    @property
    def logits(self) -> Tensor: ...  # noqa: D102
    @property
    def first(self) -> Tensor: ...  # noqa: D102
    @property
    def last(self) -> Tensor: ...  # noqa: D102
    @property
    def patch_logits(self) -> Tensor | None: ...  # noqa: D102
    @property
    def others(self) -> tuple[Tensor, ...]: ...  # noqa: D102


class Losses(NamedTuple):
    """`total` to minimise, and its unweighted parts by name (`class`, then the terms that are switched on)."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """L = L_class + cosine * L_cos + contrastive * L_con + mixing * L_mix; a term of weight 0 is not computed.

    Raises UserError where a weight is negative or not a number, or label smoothing is not in [0, 1).
    """

    cosine: float = 1.0
    contrastive: float = 1.0
    mixing: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in TERMS:
            weight = getattr(self, name)
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(
                    f"the weight of the {name} term is {weight}",
                    f"Objective({name}={weight})",
                    "a weight is a number from 0 (off) upwards",
                )
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"label smoothing of {self.label_smoothing}",
                f"Objective(label_smoothing={self.label_smoothing})",
                "choose a number from 0 (off) to below 1",
            )

    def __call__(self, output: Tokens, targets: Tensor, patch_targets: Tensor | None = None) -> Losses:
        """Add up the loss of one batch.

        Args:
            output: the forward pass, as `pdvit.DiverseModel` returns it.
            targets: class indices `(B,)` or probabilities `(B, C)`.
            patch_targets: `(B, N)` or `(B, N, C)`; needed for the mixing term (`pdvit.patch_cutmix` makes them).

        Raises:
            UserError: the mixing term is on and the patch targets or the patch head are missing.
        """
        parts = {
            "class": F.cross_entropy(at_least_float32(output.logits), targets, label_smoothing=self.label_smoothing)
        }
        if self.cosine:
            layers = (output.last, *output.others)
            parts["cosine"] = torch.stack([cosine_loss(tokens) for tokens in layers]).mean()
        if self.contrastive:
            parts["contrastive"] = contrastive_loss(output.first, output.last)
        if self.mixing:
            if patch_targets is None or output.patch_logits is None:
                raise UserError(
                    "the mixing term needs the class of every patch and a patch head",
                    "Objective(...)(output, targets, patch_targets)",
                    "pass patch_targets from pdvit.patch_cutmix, keep DiverseModel's patch_head, or set mixing=0",
                )
            parts["mixing"] = mixing_loss(output.patch_logits, patch_targets)
        total = parts["class"]
        for name in TERMS:
            if name in parts:
                total = total + getattr(self, name) * parts[name]
        return Losses(total, parts)
