"""The class loss plus the weighted diversity terms."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from pdvit.config.schema import GRAM_VARIANTS, TERMS, VARIANTS
from pdvit.errors import UserError
from pdvit.losses.contrastive import contrastive_loss
from pdvit.losses.cross_entropy import cross_entropy_loss
from pdvit.losses.gram import gram_loss
from pdvit.losses.mixing import mixing_loss
from pdvit.losses.terms import LAST_LAYER_TERMS, check_variant, cosine_loss


class TokenOutput(NamedTuple):
    """The output of `pdvit.DiverseModel`; the objective reads any output with these attributes."""

    logits: Tensor  # (B, C)
    first: Tensor  # patch tokens (B, N, D) of the two layers that the terms compare
    last: Tensor
    patch_logits: Tensor | None  # (B, N, C); None without a patch head
    others: tuple[Tensor, ...] = ()  # patch tokens of more layers: the cosine term is the mean over last and these
    mixing: Tensor | None = None  # the mixing term, if the model computed it
    smoothing: float = 0.0  # its label smoothing
    aux: Tensor | None = None  # logits of the auxiliary head of a segmentation model, in training


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
        cosine, contrastive, mixing, koleo, spectral, gram: weight of each term.
        variant: form of the first three terms: `paper`, `v1`, `released` (which has no cosine term) or `diverse-vit`.
        label_smoothing: of the class loss and of the patch targets in the mixing term.
        multi_label: an image may have any number of classes: binary cross-entropy, in class loss and mixing term.
        grid: rows and columns of the patches, which only `released` reads; unset: a square.
        gram_variant: form of the gram term, a name of `GRAM_VARIANTS`.
        class_loss: a function of logits and targets in place of the cross-entropy; it does its own label smoothing.
    """

    cosine: float = 1.0
    contrastive: float = 1.0
    mixing: float = 1.0
    koleo: float = 0.0
    spectral: float = 0.0
    gram: float = 0.0
    variant: str = "paper"
    label_smoothing: float = 0.0
    multi_label: bool = False
    grid: tuple[int, int] | None = None
    gram_variant: str = "paper"
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
        check_variant(self.gram_variant, GRAM_VARIANTS, "diversity.gram_variant, Objective(gram_variant=...)")
        if self.variant == "released" and self.cosine:
            where = f"Objective(variant='released', cosine={self.cosine:g})"
            tip = "set cosine=0 (--cosine 0), or choose another variant"
            raise UserError("the released code has no cosine term", where, tip)

    def __call__(
        self,
        output: TokenOutput,
        targets: Tensor,
        patch_targets: Tensor | None = None,
        weights: Tensor | None = None,
        anchor: Tensor | None = None,
    ) -> Losses:
        """Return the loss of one batch.

        `targets` are class indices `(B,)` or probabilities `(B, C)` (with `multi_label` each in [0, 1]). The mixing
        term needs `patch_targets`, `(B, N)` or `(B, N, C)`, which `pdvit.patch_cutmix` makes. `weights` are factors on
        the weights of `TERMS`. `anchor` has the last patch tokens `(B, N, D')` of the gram term's anchor. UserError if
        patch targets, head or anchor are missing, or as `check_targets` and `gram_loss`.
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
            where = f"Objective('{self.variant}', multi_label={self.multi_label})(output, targets, patch_targets)"
            if output.mixing is not None:
                if not self.mixing_is_patchwise:
                    what = "the model computed mixing patch by patch, and this objective has another form of it"
                    raise UserError(what, where, "call the model without patch_targets, and the objective with them")
                if output.smoothing != self.label_smoothing:
                    theirs, ours = f"{output.smoothing:g}", f"{self.label_smoothing:g}"
                    what = f"the mixing term of the model has label smoothing {theirs}, the objective has {ours}"
                    raise UserError(what, where, f"call the model with (images, patch_targets, {ours})")
                parts["mixing"] = output.mixing
            elif patch_targets is None or output.patch_logits is None:
                tip = "pass patch_targets from pdvit.patch_cutmix, keep DiverseModel's patch_head, or set mixing=0"
                raise UserError("the mixing term needs the class of every patch and a patch head", where, tip)
            else:
                parts["mixing"] = mixing_loss(
                    output.patch_logits, patch_targets, self.variant, self.label_smoothing, self.multi_label
                )
        for name, term in LAST_LAYER_TERMS.items():
            if getattr(self, name):
                parts[name] = term(output.last)
        if self.gram:
            if anchor is None:
                tip = "pass anchor=, the last tokens of a frozen model on the same images, or set gram=0"
                raise UserError("the gram term needs an anchor", "Objective(gram=...)(output, targets)", tip)
            parts["gram"] = gram_loss(output.last, anchor, self.gram_variant)
        total = parts["class"]
        factors = {name: getattr(self, name) for name in TERMS if name in parts}
        if weights is not None:
            factors = {name: weight * weights[TERMS.index(name)] for name, weight in factors.items()}
        if self.variant == "diverse-vit" and "mixing" in factors:
            patch_weight = output.last.shape[1] * factors.pop("mixing")
            total = (total + patch_weight * parts["mixing"]) / (1 + patch_weight)
        for name, weight in factors.items():
            total = total + weight * parts[name]
        return Losses(total, parts)

    @property
    def mixing_is_patchwise(self) -> bool:
        """Whether `DiverseModel` can compute the mixing term: `released` averages patches before it compares."""
        return self.mixing > 0 and self.variant != "released" and not self.multi_label
