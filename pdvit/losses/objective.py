"""The class loss plus the weighted diversity terms."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from pdvit.errors import UserError
from pdvit.losses.contrastive import contrastive_loss
from pdvit.losses.cosine import cosine_loss
from pdvit.losses.cross_entropy import cross_entropy_loss
from pdvit.losses.koleo import koleo_loss
from pdvit.losses.mixing import mixing_loss
from pdvit.losses.spectral import spectral_loss
from pdvit.losses.variants import VARIANTS, check_variant

TERMS = ("cosine", "contrastive", "mixing", "koleo", "spectral")


class Tokens(Protocol):
    """The output of a model that the objective reads, as `pdvit.DiverseModel` returns it."""

    @property
    def logits(self) -> Tensor: ...  # noqa: D102
    @property
    def first(self) -> Tensor: ...  # noqa: D102
    @property
    def last(self) -> Tensor: ...  # noqa: D102
    @property
    def patch_logits(self) -> Tensor | None: ...  # noqa: D102
    @property
    def others(self) -> tuple[Tensor, ...]:
        """More token maps for the cosine term, which is then the mean over last and these."""

    @property
    def mixing(self) -> Tensor | None:
        """The mixing term, where the forward pass has computed it already."""

    @property
    def smoothing(self) -> float:
        """The label smoothing that it was computed with."""


class Losses(NamedTuple):
    """`total` to minimise, and its unweighted parts by name (`class`, then the terms that are switched on)."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """L = L_class + the weighted sum of the terms; a term of weight 0 is not computed.

    Under `diverse-vit` class and patches are averaged as its code does: (L_class + n w L_mix) / (1 + n w), with n
    patches and w the weight of mixing. Its code has w = 1 or 0; values in between are our extension.

    Attributes:
        cosine, contrastive, mixing, koleo, spectral: weights.
        variant: form of the first three: `paper`, `v1`, `released` (which has no cosine term) or `diverse-vit`.
        label_smoothing: of the class loss and of the patch targets in the mixing term.
        multi_label: an image may have any number of classes: binary cross-entropy, in class loss and mixing term.
        class_loss: a function of logits and targets in place of the cross-entropy; it does its own label smoothing.
        grid: rows and columns of the patches, which only `released` reads; unset: a square.

    Raises UserError where a weight is negative or not finite, label smoothing is not in [0, 1), the variant is
    unknown, or the cosine term is on under `released`.
    """

    cosine: float = 1.0
    contrastive: float = 1.0
    mixing: float = 1.0
    koleo: float = 0.0
    spectral: float = 0.0
    variant: str = "paper"
    label_smoothing: float = 0.0
    multi_label: bool = False
    grid: tuple[int, int] | None = None
    class_loss: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        for name in TERMS:
            weight = getattr(self, name)
            if not (math.isfinite(weight) and weight >= 0):
                what, tip = f"the weight of the {name} term is {weight}", "a weight is a number from 0 (off) upwards"
                raise UserError(what, f"Objective({name}={weight})", tip)
        if not 0 <= self.label_smoothing < 1:
            what, tip = f"label smoothing of {self.label_smoothing}", "choose a number from 0 (off) to below 1"
            raise UserError(what, f"Objective(label_smoothing={self.label_smoothing})", tip)
        check_variant(self.variant, VARIANTS, "diversity.variant, Objective(variant=...)")
        if self.variant == "released" and self.cosine:
            raise UserError(
                "the released code has no cosine term",
                f"Objective(variant='released', cosine={self.cosine:g})",
                "set cosine=0 (--cosine 0), or choose another variant",
            )

    def __call__(
        self, output: Tokens, targets: Tensor, patch_targets: Tensor | None = None, weights: Tensor | None = None
    ) -> Losses:
        """Return the loss of one batch.

        Args:
            output: the forward pass, as `pdvit.DiverseModel` returns it.
            targets: class indices `(B,)` or probabilities `(B, C)`; with `multi_label` `(B, C)`, each in [0, 1].
            patch_targets: `(B, N)` or `(B, N, C)`; needed for the mixing term (`pdvit.patch_cutmix` makes them).
            weights: factors on the terms' weights, one for each of `TERMS`; unset: 1.

        Raises:
            UserError: the mixing term is on and the patch targets or the patch head are missing; targets do not fit, or
                (on the CPU, outside torch.compile) are out of range.
        """
        if self.class_loss is not None:
            parts = {"class": self.class_loss(output.logits, targets)}
        else:
            parts = {"class": cross_entropy_loss(output.logits, targets, self.label_smoothing, self.multi_label)}
        if self.cosine:
            losses = [cosine_loss(tokens, self.variant) for tokens in (output.last, *output.others)]
            parts["cosine"] = sum(losses[1:], start=losses[0]) / len(losses)
        if self.contrastive:
            parts["contrastive"] = contrastive_loss(output.first, output.last, self.variant, grid=self.grid)
        if self.mixing:
            parts["mixing"] = self._mixing(output, patch_targets)
        if self.koleo:
            parts["koleo"] = koleo_loss(output.last)
        if self.spectral:
            parts["spectral"] = spectral_loss(output.last)
        return Losses(self._total(parts, output, weights), parts)

    @property
    def mixing_is_patchwise(self) -> bool:
        """Whether `DiverseModel` can compute the mixing term: `released` averages patches before it compares."""
        return self.mixing > 0 and self.variant != "released" and not self.multi_label

    def _mixing(self, output: Tokens, patch_targets: Tensor | None) -> Tensor:
        if output.mixing is not None:
            if not self.mixing_is_patchwise:
                raise UserError(
                    "the model computed the mixing term patch by patch, and this objective has another form of it",
                    f"Objective(variant='{self.variant}', multi_label={self.multi_label})",
                    "call the model without patch_targets, and the objective with them",
                )
            if output.smoothing != self.label_smoothing:
                raise UserError(
                    f"the model computed the mixing term with label smoothing {output.smoothing:g}, "
                    f"the objective has {self.label_smoothing:g}",
                    "Objective(label_smoothing=...)",
                    f"call the model with (images, patch_targets, {self.label_smoothing:g})",
                )
            return output.mixing
        if patch_targets is None or output.patch_logits is None:
            raise UserError(
                "the mixing term needs the class of every patch and a patch head",
                "Objective(...)(output, targets, patch_targets)",
                "pass patch_targets from pdvit.patch_cutmix, keep DiverseModel's patch_head, or set mixing=0",
            )
        return mixing_loss(output.patch_logits, patch_targets, self.variant, self.label_smoothing, self.multi_label)

    def _total(self, parts: dict[str, Tensor], output: Tokens, factors: Tensor | None) -> Tensor:
        weights = {
            name: getattr(self, name) * (1.0 if factors is None else factors[index])
            for index, name in enumerate(TERMS)
            if name in parts
        }
        total = parts["class"]
        if self.variant == "diverse-vit" and "mixing" in weights:
            patch_weight = output.last.shape[1] * weights.pop("mixing")
            total = (total + patch_weight * parts["mixing"]) / (1 + patch_weight)
        for name, weight in weights.items():
            total = total + weight * parts[name]
        return total
