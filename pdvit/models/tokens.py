"""The module that training uses: a timm model that also returns the patch tokens which the terms compare."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pdvit.errors import UserError
from pdvit.losses.mixing import chunked_mixing_loss
from pdvit.losses.objective import TokenOutput
from pdvit.models.families import WRAPPERS, family_of, image_model_of, modules_at
from pdvit.models.layers import MODEL, Place, find_layers, shapes_of
from pdvit.models.wrapper import Wrapper

R = TypeVar("R")
HEAD = "DiverseModel(model, patch_head=...)"
FIRST, LAST = "diversity.first (--first)", "diversity.last (--last)"
COSINE = "diversity.cosine_layers (--cosine-layers)"
EARLY = ("embed", "patches")


class DiverseModel(Wrapper):
    """A vision transformer that also returns its first and last patch tokens.

    Logits equal the bare model's. Compile, distribute and optimize this module, because it owns the linear patch head
    of the mixing term. Export `model`, the bare model.

    Args:
        model: a bare model of timm, transformers or torchvision with logits, built for the size of its images; or any
            other, with `blocks`.
        patch_head: True for a new linear head on the tokens that the model's head reads, a module to use as that head,
            `"class"` for the model's own classifier, False for none.
        first: `"block"`, the output of the first block with the grid and width of last (in a hierarchical model, of the
            last stage); `"embed"`, the input of the first block; `"patches"`, the patch embedding before positions are
            added; or the number of a block, from 1.
        last: `"norm"`, the output of the final norm over tokens if the model has one; `"block"`, of the last block.
        cosine_layers: numbers of more blocks for the cosine term.
        compared: whether the contrastive term is on. Without it, first may be last, or have another grid or width.
        layout: `blocks`, `prefix_tokens` and `norm` of another model, as in `pdvit.analyze`. The attribute
            `image_size` of such a model is the side of its images, by default 224.

    Raises:
        UserError: the model is not supported, first and last can't be compared, there is no such layer, or the patch
            head does not fit.
    """

    inner = "model"

    def __init__(
        self,
        model: nn.Module,
        patch_head: "bool | str | nn.Module" = True,
        first: str | int = "block",
        last: str = "norm",
        cosine_layers: Sequence[int | str] = (),
        compared: bool = True,
        **layout: Any,
    ) -> None:
        super().__init__()
        if image_model_of(model, WRAPPERS) is not model:
            tip = "pass the model inside it, and wrap the DiverseModel instead"
            raise UserError(f"a {type(model).__name__} is a wrapper around the model", "DiverseModel(model)", tip)
        if getattr(model, "main_input_name", "pixel_values") != "pixel_values":  # of transformers
            tip = "pass a classifier of images, such as CLIPForImageClassification"
            raise UserError(f"a {type(model).__name__} does not take images alone", "DiverseModel(model)", tip)
        self.model = model
        self.token_layout = layout  # which `find_layers` reads
        self.taps = Taps(model, first, last, cosine_layers, compared, True, "DiverseModel(model)", **layout)
        # The model's own classifier is not registered a second time, or it would be saved twice.
        self.shares_classifier = isinstance(patch_head, str)
        self.patch_head: nn.Module | None = patch_head if isinstance(patch_head, nn.Module) else None
        if patch_head is False:
            return
        bare: Any = model
        classes = int(getattr(bare, "num_classes", getattr(bare, "num_labels", 0)))  # the second of transformers
        width, like = self.taps.width, next(bare.parameters())
        outputs = classes or getattr(patch_head, "out_features", 0)
        if isinstance(patch_head, str):
            classifier = getattr(bare, "get_classifier", lambda: None)()  # other libraries have no such method
            between = modules_at(model, r"attn_pool|fc_norm|head\.(?:norm|pre_logits)")
            linear = isinstance(classifier, nn.Linear) and classifier.in_features == width and not between
            if patch_head == "class" and linear:
                return
            what = f"there is no patch head called '{patch_head}'"
            if patch_head == "class":
                what = "the model's classifier can't be the patch head: it is not one linear layer on tokens"
            raise UserError(what, HEAD, "pass True for a new linear head")
        if self.patch_head is None:
            if classes < 1:
                tip = "pass patch_head=nn.Linear(width, classes), or patch_head=False and leave the mixing term off"
                raise UserError("the model has no classes, and the patch head needs them", HEAD, tip)
            self.patch_head = head = nn.Linear(width, classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        elif isinstance(patch_head, nn.Linear) and patch_head.weight.shape != (outputs, width):
            what = f"the patch head is a {patch_head}, for {classes} classes and tokens of width {width}"
            raise UserError(what, HEAD, f"pass nn.Linear({width}, {classes}), or True for a new one")

    def forward(
        self,
        images: Tensor,
        patch_targets: Tensor | None = None,
        label_smoothing: float = 0.0,
        patch_logits: bool = True,
    ) -> TokenOutput:
        """Run the model on images `(B, C, H, W)`.

        With patch targets, indices `(B, N)` or probabilities `(B, N, C)`, the output has `mixing`, the mean
        cross-entropy of the patches, instead of patch logits. It is computed in parts, so that all patch logits never
        exist at once, and needs a linear patch head. `patch_logits=False` skips the patch head.
        """
        output, (first, last, final, *others) = self.taps.read(self.model, images)
        logits = getattr(output, "logits", output)  # of transformers
        if not isinstance(logits, Tensor):
            what = f"a {type(self.model).__name__} returns no logits, but a {type(output).__name__}"
            raise UserError(what, "DiverseModel(model)", "use a model with a classifier")
        head: Any = self.model.get_classifier() if self.shares_classifier else self.patch_head  # type: ignore[operator]
        patches = mixing = None
        if head is not None and patch_logits:
            if patch_targets is None:
                patches = head(final)
            elif isinstance(head, nn.Linear):
                mixing = chunked_mixing_loss(final, head.weight, head.bias, patch_targets, label_smoothing)
            else:
                tip = "use nn.Linear, or pass patch_targets to the objective only"
                raise UserError(f"the mixing term can't be computed in parts with a {type(head).__name__}", HEAD, tip)
        return TokenOutput(logits, first, last, patches, tuple(others), mixing, label_smoothing)

    @torch.no_grad()
    def last_tokens(self, images: Tensor) -> Tensor:
        """Return the last patch tokens, without gradient."""
        return self.taps.read(self.model, images)[1][1]


def _block(number: Any, blocks: list[str], where: str) -> str:
    name = f"block {number}"
    if name not in blocks:
        raise UserError(f"there is no {name}: the model has {len(blocks)}", where, f"choose from 1 to {len(blocks)}")
    return name


class Taps:
    """Reads the patch tokens of first, last and more layers during a model's forward pass.

    Hooks are registered at construction, because compiled code ignores later ones. They are methods, so that those of a
    copied model store in its own copy. They are open during a forward pass only, so that gradient checkpointing, which
    runs blocks again, stores nothing.

    The arguments are those of `DiverseModel`, with its `cosine_layers` as others; layout is that of `find_layers`. With
    `head_input`, the tokens that the model's head reads follow first and last; `width` is theirs. Raises UserError if
    there are no such layers, or first and last can't be compared.
    """

    def __init__(
        self,
        model: nn.Module,
        first: str | int,
        last: str,
        others: Sequence[int | str],
        compared: bool = True,
        head_input: bool = False,
        where: str = MODEL,
        **layout: Any,
    ) -> None:
        import torch._dynamo  # slow to import

        # Allows compiled code to fill a tap inside a checkpointed block.
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        bare, places = find_layers(model, **layout, where=where)
        if not layout.get("blocks") and (family := family_of(bare)).plain and (embed := modules_at(bare, family.embed)):
            places["patches"] = Place(embed[0])
        shapes = shapes_of(model, places, where)
        blocks = [name for name in places if name.startswith("block")]
        if last not in ("norm", "block"):
            raise UserError(f"there is no last called '{last}'", LAST, "choose norm or block")
        final = "norm" if "norm" in places else blocks[-1]
        last = final if last == "norm" else blocks[-1]
        more = [_block(number, blocks, COSINE) for number in others]
        if first == "block":
            first = next((name for name in blocks if shapes[name] == shapes[last]), last)
        elif first not in EARLY:
            if not str(first).isdecimal():
                tip = f"choose block, embed, patches, or a number from 1 to {len(blocks)}"
                raise UserError(f"there is no first called '{first}'", FIRST, tip)
            first = _block(first, blocks, FIRST)
        first = str(first)
        if first == last and compared:
            tip = "choose an earlier layer, a model with two blocks at its end, or no such term (--contrastive 0)"
            raise UserError(f"first and last are both {first}, so the contrastive term compares nothing", FIRST, tip)
        if first not in shapes or (shapes[first] != shapes[last] and compared):
            theirs = shapes.get(first, "pdvit knows it of plain timm models only")
            what = f"the shape of {first} is not that of {last}: {theirs} against {shapes[last]} (patches, width)"
            raise UserError(what, FIRST, "use --first block, whatever the preset says")
        self.names = (first, last, *([final] if head_input else []), *more)
        self.width = shapes[final][1]
        self.open, self.values = False, dict[str, Any]()
        self.places = {name: places[name] for name in dict.fromkeys(self.names)}
        for name, place in self.places.items():
            place.register(partial(self._store, name))

    def _store(self, name: str, module: nn.Module, inputs: tuple[Any, ...], more: Any) -> None:
        if self.open:
            self.values[name] = (inputs if self.places[name].entering else (), more)

    def read(self, forward: Callable[[Tensor], R], images: Tensor) -> tuple[R, list[Tensor]]:
        """Return `forward(images)`, and the patch tokens of the layers in that forward pass."""
        self.open = True
        try:
            result = forward(images)
            tokens = {name: place.tokens(*self.values[name]) for name, place in self.places.items()}
        finally:  # an error must not keep activations
            self.open, self.values = False, {}
        return result, [tokens[name] for name in self.names]
