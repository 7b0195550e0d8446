"""A model whose forward pass also returns its first and last patch tokens: what training needs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from pdvit.errors import UserError
from pdvit.losses.chunked import chunked_mixing_loss
from pdvit.models.families import family_of, modules_at
from pdvit.models.layers import Place, evaluating, places_of, shapes_of

FIRST, LAST = "diversity.first (--first)", "diversity.last (--last)"
COSINE = "diversity.cosine_layers (--cosine-layers)"
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


class DiverseModel(nn.Module):
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
        places = {layer.name: place for layer, place in places_of(model).items()}
        if family.plain and (embed := modules_at(model, family.embed)):
            places["patches"] = Place(embed[0])
        shapes = shapes_of(model, places)
        blocks = [name for name in places if name.startswith("block")]
        final = "norm" if "norm" in places else blocks[-1]
        last = _last(last, final, blocks)
        others = [_block(number, blocks, COSINE) for number in cosine_layers]
        # The layers to read: first, last, what the patch head reads, and those of the cosine term.
        self.names = (_first(first, last, blocks, shapes), last, final, *others)
        self.norm = places[final]
        self.frozen: list[nn.Module] = []  # what stays in evaluation mode: see `freezing.freeze`
        self.taps: dict[str, _Tap] | None = None
        if family.plain and set(self.names) <= {*blocks, final}:
            self.indices = sorted({blocks.index(name) for name in self.names if name in blocks})
        else:
            self.taps = {name: _Tap(places[name]) for name in dict.fromkeys(self.names)}
            _let_hooks_through_checkpoints()
        # The model's own classifier stays where it is: as a second name for it, it would be saved twice.
        self.shares_classifier = isinstance(patch_head, str)
        self.patch_head: nn.Module | None = None
        if isinstance(patch_head, str):
            _check_classifier(model, patch_head, places[final], shapes[final][1])
        elif patch_head is not False:
            self.patch_head = _patch_head(model, patch_head, shapes[final])

    def train(self, mode: bool = True) -> Self:
        """Set the mode of training; frozen parts stay in that of evaluation."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that timm's optimizers must not decay (position, class token): the model's own list."""
        own = getattr(self.model, "no_weight_decay", set)
        return {f"model.{name}" for name in own()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Say which block a parameter belongs to, for timm's layer decay: the model's own rules, under `model.`."""
        model: Any = self.model
        if not hasattr(model, "group_matcher"):
            what = f"timm does not say which layer the weights of a {type(model).__name__} belong to"
            raise UserError(what, "optim.layer_decay (--layer-decay)", "leave it out")
        rules = model.group_matcher(coarse)
        if callable(rules):
            return lambda name: rules(name.removeprefix("model."))  # type: ignore[return-value]
        return {group: _under_model(rule) for group, rule in rules.items()}

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
        logits, tokens = self._by_value(images) if self.taps is None else self._by_hook(images, self.taps)
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

    def _by_hook(self, images: Tensor, taps: "Mapping[str, _Tap]") -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits, and tokens by layer as hooks see them: where timm hands out whole stages only."""
        for tap in taps.values():
            tap.open = True
        try:
            logits = self.model(images)
            tokens = {name: tap.place.tokens(tap.value) for name, tap in taps.items()}
        finally:  # an error must not leave activations behind
            for tap in taps.values():
                tap.open, tap.value = False, None
        return logits, tokens


class _Tap:
    """A slot that a hook fills; open during a forward pass only, so that recomputing activations does not fill it.

    Copied with its model, it is the copy's own slot.
    """

    def __init__(self, place: Place) -> None:
        self.place, self.open = place, False
        self.value: Any = None
        place.hook(self.fill)

    def fill(self, value: Any) -> None:
        if self.open:
            self.value = value


def layer_numbers(text: str) -> list[int]:
    """Read the numbers of blocks, with commas between: `6,12`. Raises UserError."""
    numbers = [part.strip() for part in text.split(",") if part.strip()]
    if not all(number.isdecimal() for number in numbers):
        raise UserError(f"'{text}' is not a list of blocks", COSINE, "give their numbers with commas: 6,12")
    return [int(number) for number in numbers]


def _let_hooks_through_checkpoints() -> None:
    """Let compiled code fill a slot from inside a checkpointed block, in the forward pass only.

    Without it torch.compile refuses a hook in there, because recomputing could not repeat what it does. It need not: a
    slot is closed by then.
    """
    import torch._dynamo  # slow to import

    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


def _under_model(rule: Any) -> Any:
    """Return a rule of timm's matcher (a pattern, or a list of (pattern, order)) for names that begin with `model.`."""
    if callable(rule):
        return lambda name: rule(name.removeprefix("model."))
    if isinstance(rule, str):  # all alternatives of it
        return rf"model\.(?:{rule.replace('^', '')})"
    return [(_under_model(pattern), order) for pattern, order in rule]


def _last(last: str, final: str, blocks: list[str]) -> str:
    if last not in ("norm", "block"):
        raise UserError(f"there is no last called '{last}'", LAST, "choose norm or block")
    return final if last == "norm" else blocks[-1]


def _block(number: Any, blocks: list[str], where: str) -> str:
    name = f"block {number}"
    if name not in blocks:
        raise UserError(f"there is no {name}: the model has {len(blocks)}", where, f"choose from 1 to {len(blocks)}")
    return name


def _first(first: str | int, last: str, blocks: list[str], shapes: Mapping[str, tuple[int, int]]) -> str:
    """Return the layer that `first` means; UserError where its grid or width are not those of last."""
    alike = [name for name in blocks if shapes[name] == shapes[last] and name != last]
    if first == "block":
        if not alike:
            tip = "use --first embed or a deeper model" if shapes.get("embed") == shapes[last] else "use --last block"
            raise UserError(f"no block before {last} has its grid and width, so none can be first", FIRST, tip)
        return alike[0]
    if first not in ("embed", "patches") and not str(first).isdecimal():
        what = f"there is no first called '{first}'"
        raise UserError(what, FIRST, f"choose block, embed, patches, or a number from 1 to {len(blocks)}")
    name = str(first) if first in ("embed", "patches") else _block(first, blocks, FIRST)
    if name not in shapes:
        what = f"first is '{name}', but this model's patch embedding is not to be compared with last"
        raise UserError(what, FIRST, "use --first block, whatever the preset says")
    if shapes[name] != shapes[last]:
        (count, width), (last_count, last_width) = shapes[name], shapes[last]
        raise UserError(
            f"{name} has {count} patches of width {width}, but {last} has {last_count} of width {last_width}",
            FIRST,
            f"choose one from {alike[0]} on" if alike else "use --last block",
        )
    if name == last:
        raise UserError(f"first and last are both {name}", FIRST, "choose an earlier one")
    return name


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
