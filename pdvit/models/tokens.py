"""A model whose forward pass also returns its first and last patch tokens: what training needs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pdvit.errors import UserError
from pdvit.losses.mixing import chunked_mixing_loss
from pdvit.models.families import family_of, modules_at
from pdvit.models.layers import Place, evaluating
from pdvit.models.reading import Tap, layers_to_read, tapped, taps_at
from pdvit.models.wrapper import Wrapper

HEAD = "DiverseModel(model, patch_head=...)"
LINEAR = "use nn.Linear, or call the model without patch_targets and the objective with them"


class TokenOutput(NamedTuple):
    """A forward pass: what the class loss and the terms need.

    Attributes:
        logits: `(B, C)`.
        first: patch tokens `(B, N, D)` of the first layer.
        last: patch tokens `(B, N, D)` of the last layer.
        patch_logits: `(B, N, C)`, or None without a patch head.
        others: patch tokens `(B, N', D')` of more layers, for the cosine term.
        mixing: the mixing term, where patch targets were given; then there are no patch logits.
        smoothing: the label smoothing that it was computed with.
    """

    logits: Tensor
    first: Tensor
    last: Tensor
    patch_logits: Tensor | None
    others: tuple[Tensor, ...] = ()
    mixing: Tensor | None = None
    smoothing: float = 0.0


class DiverseModel(Wrapper):
    """A timm vision transformer whose forward pass also returns its first and last patch tokens.

    The network is unchanged: logits equal the bare model's. Compile or distribute this module, and optimize its
    parameters: it owns the linear patch head of the mixing term. `model` is the bare timm model, to export.

    Args:
        model: a bare timm model, built for the image size that it will see.
        patch_head: True for a linear head of its own over the tokens that the model's head reads, a module to be used
            as that head, `"class"` for the model's own classifier, False for none.
        first: `"block"`, the output of the first block whose grid and width are those of last (in a hierarchical
            model, of the last stage); `"embed"`, what enters the first block; `"patches"`, the patch embedding before
            positions are added; or the number of a block, from 1.
        last: `"norm"`, after the final norm where the model has one over tokens; `"block"`, the last block's output.
        cosine_layers: numbers of blocks whose tokens the cosine term sees too.

    Raises:
        UserError: the patches can't be read, first and last can't be compared, there is no such layer, or the patch
            head does not fit.
    """

    inner = "model"

    def __init__(
        self,
        model: nn.Module,
        patch_head: "bool | str | nn.Module" = True,
        first: str | int = "block",
        last: str = "norm",
        cosine_layers: Sequence[int] = (),
    ) -> None:
        super().__init__()
        family = family_of(model)
        self.model = model
        layers = layers_to_read(model, first, last, cosine_layers)
        # First, last, what the patch head reads, and those of the cosine term.
        self.names = (layers.first, layers.last, layers.final, *layers.others)
        self.norm = layers.places[layers.final]
        width = layers.shapes[layers.final][1]
        self.taps: dict[str, Tap] | None = None
        if family.plain and set(self.names) <= {*layers.blocks, layers.final}:
            self.indices = sorted({layers.blocks.index(name) for name in self.names if name in layers.blocks})
        else:
            self.taps = taps_at(layers.places, self.names)
        # The model's own classifier stays where it is: as a second name for it, it would be saved twice.
        self.shares_classifier = isinstance(patch_head, str)
        self.patch_head: nn.Module | None = None
        if isinstance(patch_head, str):
            _check_classifier(model, patch_head, self.norm, width)
        elif patch_head is not False:
            self.patch_head = _patch_head(model, patch_head, layers.shapes[layers.final])

    def forward(
        self,
        images: Tensor,
        patch_targets: Tensor | None = None,
        label_smoothing: float = 0.0,
        patch_logits: bool = True,
    ) -> TokenOutput:
        """Run the model once on `(B, C, H, W)` images.

        With patch targets, indices `(B, N)` or probabilities `(B, N, C)`, it returns the mixing term itself, `mixing`:
        the mean cross-entropy of the patches, computed in parts, so that their logits never exist at once. That
        needs a linear patch head. `patch_logits=False` leaves the patch head out, to measure or predict.
        """
        logits, tokens = self._by_value(images) if self.taps is None else tapped(self.taps, self.model, images)
        first, last, final, *more = (tokens[name] for name in self.names)
        head: Any = self.model.get_classifier() if self.shares_classifier else self.patch_head  # type: ignore[operator]
        others = tuple(more)
        if head is None or not patch_logits:
            return TokenOutput(logits, first, last, None, others)
        if patch_targets is None:  # no _replace below: torch 2.11 can't compile it
            return TokenOutput(logits, first, last, head(final), others)
        if not isinstance(head, nn.Linear):
            raise UserError(f"a patch head that is a {type(head).__name__} can't be computed in parts", HEAD, LINEAR)
        mixing = chunked_mixing_loss(final, head.weight, head.bias, patch_targets, label_smoothing)
        return TokenOutput(logits, first, last, None, others, mixing, label_smoothing)

    def _by_value(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits, and tokens by layer as timm's `forward_intermediates` hands them out."""
        model: Any = self.model
        features, blocks = model.forward_intermediates(images, indices=self.indices, output_fmt="NLC")
        tokens = {f"block {index + 1}": block for index, block in zip(self.indices, blocks, strict=True)}
        return model.forward_head(features), tokens | {"norm": self.norm.tokens(features)}


def _patch_head(model: Any, given: "bool | nn.Module", shape: tuple[int, int]) -> nn.Module:
    """Return a new linear head, or the given one where it fits."""
    count, width = shape
    if model.num_classes < 1:
        raise UserError(
            "the model has no classes, so a patch head has nothing to tell",
            HEAD,
            "build it with num_classes=C, or pass patch_head=False and leave the mixing term off",
        )
    if isinstance(given, bool):
        like = next(model.parameters())
        head = nn.Linear(width, model.num_classes, device=like.device, dtype=like.dtype)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head
    weight = next(given.parameters(), torch.empty(0))
    try:
        with torch.no_grad(), evaluating(given):
            found = tuple(given(weight.new_zeros(1, count, width)).shape)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"the patch head does not take tokens of width {width}", HEAD, f"{error}") from error
    if found != (1, count, model.num_classes):
        raise UserError(
            f"the patch head returns {found} for (1, {count}, {width}) tokens, not {model.num_classes} classes each",
            HEAD,
            f"pass a linear head, nn.Linear({width}, {model.num_classes}), or True for a new one",
        )
    return given


def _check_classifier(model: Any, name: str, final: Place, width: int) -> None:
    """Raise UserError unless the model's classifier, put to each token, is what the model's own head does to them."""
    if name != "class":
        raise UserError(f"there is no patch head called '{name}'", HEAD, "pass True, False, 'class' or a module")
    classifier = model.get_classifier()
    why = ""
    if not isinstance(classifier, nn.Linear):
        why = f"it is a {type(classifier).__name__}, not one linear layer"
    elif classifier.in_features != width:
        why = f"it reads {classifier.in_features} features, and the tokens have {width}"
    elif between := [
        path for path in ("attn_pool", "fc_norm", "head.norm", "head.pre_logits") if modules_at(model, path)
    ]:
        why = f"the model's head puts {between[0]} between tokens and classifier"
    if why:
        tip = "pass True, for a linear head of its own"
        raise UserError(f"the model's classifier can't be the patch head: {why}", HEAD, tip)
