"""The layers of a model: where tokens and attention are, and hooks that read them."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from pdvit.errors import UserError, closest
from pdvit.files import reading
from pdvit.models.families import WRAPPERS, Family, family_of, image_model_of, modules_at

MODEL = "model.name (--model)"
NOT_IMAGES = "the first axis of the tokens is not that of the images: {} for {}"
BATCH_FIRST = "name blocks with tokens (images, tokens, width); torch's need batch_first=True"


@dataclass(frozen=True)
class Place:
    """A module whose output (or input, if `entering`) holds patch tokens, and their layout: see `families.Family`."""

    module: nn.Module
    prefix: int = 0
    channels_first: bool | None = False
    entering: bool = False
    order: Callable[[Tensor], Tensor] | None = None
    attention: str = ""

    def register(self, hook: Callable[..., None]) -> torch.utils.hooks.RemovableHandle:
        """Register `hook(module, inputs, more)` on the module: more are named inputs, if entering, or the output."""
        if self.entering:
            return self.module.register_forward_pre_hook(hook, with_kwargs=True)
        return self.module.register_forward_hook(hook)

    def tokens(self, inputs: tuple[Any, ...], more: Any) -> Tensor:
        """Return the patch tokens `(B, N, D)` in the order of the image, row by row, from what a hook receives."""
        value, waiting = None, [inputs, more] if self.entering else [more]
        while waiting and value is None:  # the first tensor with three axes, or four of a map
            part = waiting.pop(0)
            if isinstance(part, Tensor) and (part.ndim == 3 or (part.ndim == 4 and self.channels_first is not None)):
                value = part
            elif isinstance(part, tuple | list | Mapping):
                waiting[:0] = part.values() if isinstance(part, Mapping) else part
        if value is None:
            what = f"a {type(self.module).__name__} has no {'input' if self.entering else 'output'} of the shape"
            raise UserError(f"{what} (images, tokens, width)", "blocks=..., norm=...", "name modules with such tokens")
        if self.order is not None:
            value = self.order(value)
        if value.ndim == 4:
            value = value.flatten(2).transpose(1, 2) if self.channels_first else value.flatten(1, 2)
        return value[:, self.prefix :]


def find_layers(
    model: nn.Module, blocks: Any = None, prefix_tokens: int = 0, norm: str = "", where: str = MODEL
) -> tuple[nn.Module, dict[str, Place]]:
    """Return the image model without wrappers and heads, and the places of its layers by name, in order.

    They are `embed` (input of the first block: patches plus positions), `block 1` ..., and `norm` if it is over tokens.
    The table of families has them. For another model, `blocks` are the blocks in a list, or the path of one, such as
    `encoder.layers`: they take and return `(B, T, D)`, which can be in a tuple or table, with `prefix_tokens` in front.
    `norm` is the path of a norm over all tokens after the last block. Of such a model only wrappers are removed;
    a `DiverseModel` among them may have named its blocks already.

    Raises UserError if the tokens can't be read, or a path leads to no modules.
    """
    if blocks is None and (prefix_tokens or norm):
        raise UserError("prefix_tokens and norm belong to the blocks", where, "name them too: blocks='encoder.layers'")
    named = getattr(image_model_of(model, ("torch", "timm")), "token_layout", {})  # of a DiverseModel
    if blocks is None and named.get("blocks") is not None:
        return find_layers(model, **named, where=where)
    if not isinstance(prefix_tokens, int) or prefix_tokens < 0:
        raise UserError(f"prefix_tokens is {prefix_tokens!r}", "prefix_tokens=...", "pass the number of tokens, from 0")
    model = image_model_of(model) if blocks is None else image_model_of(model, WRAPPERS)
    family = family_of(model, where) if blocks is None else _named_family(model, blocks, prefix_tokens, norm)
    blocks, orders = modules_at(model, family.blocks), modules_at(model, family.order)
    if not blocks:
        raise UserError("the model has no blocks", where, "set a depth of at least 1")
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    prefix, norm_prefix = (
        it if isinstance(it, int) else sum(shapes[name][1:-1].numel() for name in shapes if re.fullmatch(it, name))
        for it in (family.prefix, family.prefix if family.norm_prefix is None else family.norm_prefix)
    )
    at = partial(Place, prefix=prefix, channels_first=family.channels_first, attention=family.attention)
    order = [partial(orders[0], block_idx=index) if orders else None for index in range(len(blocks))]
    places = {"embed": at(blocks[0], entering=True, order=order[0])}
    places |= {f"block {i + 1}": at(block, order=order[i]) for i, block in enumerate(blocks)}
    for last in modules_at(model, family.norm)[-1:]:
        places["norm"] = at(last, prefix=norm_prefix)
    return model, places


def _named_family(model: nn.Module, blocks: Any, prefix_tokens: int, norm: Any) -> Family:
    """Return the family of a model whose blocks and norm are named: see `find_layers`."""
    modules = dict(model.named_modules(remove_duplicate=False))
    lists = {name: it for name, it in modules.items() if isinstance(it, nn.ModuleList | nn.Sequential)}
    if isinstance(blocks, str) and blocks not in lists:
        tip = closest(blocks, filter(None, lists))
        raise UserError(f"a {type(model).__name__} has no list of modules at '{blocks}'", "blocks=...", tip)
    parts = tuple(lists[blocks] if isinstance(blocks, str) else blocks if isinstance(blocks, Iterable) else [None])
    tip = "pass a path or a list, and the path of the norm: blocks='encoder.layers', norm='encoder.ln'"
    if not all(isinstance(part, nn.Module) for part in parts):
        raise UserError(f"blocks is a {type(blocks).__name__}, not a path or a list of modules", "blocks=...", tip)
    if not isinstance(norm, str):
        raise UserError(f"norm is a {type(norm).__name__}, not a path", "norm=...", tip)
    if len({*parts}) < len(parts):
        what = "a block is in the list twice, and its outputs can't be told apart"
        raise UserError(what, "blocks=...", "list blocks that the model calls once")
    if norm and (norm in lists or norm not in modules):
        inside = {module for part in parts for module in part.modules()}
        single = [name for name, it in modules.items() if it not in inside and not [*it.children()]]
        raise UserError(f"a {type(model).__name__} has no norm at '{norm}'", "norm=...", closest(norm, single))
    return Family(parts, re.escape(norm), None, prefix_tokens)


@contextmanager
def watch(places: Mapping[str, Place], visit: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `visit(layer, tokens)` with the patch tokens `(B, N, D)` of each place during each forward pass inside.

    For measurements in eager mode: hooks that are registered and removed do not fire under torch.compile.
    """

    def hook(layer: str, module: nn.Module, inputs: tuple[Any, ...], more: Any) -> None:
        visit(layer, places[layer].tokens(inputs, more))

    with ExitStack() as stack:
        for layer, place in places.items():
            stack.callback(place.register(partial(hook, layer)).remove)
        yield


@contextmanager
def watch_attention(places: Mapping[str, Place], visit: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `visit(layer, probabilities)` with the attention `(B, heads, T, T)` of every block in each forward pass.

    Rows are queries; the T tokens begin with the prefix tokens. Fused attention, which keeps no probabilities, is
    switched off inside. One block's matrices exist at a time. Raises UserError for a family without such attention.
    """
    attentions: dict[str, Any] = {}
    for layer, place in places.items():
        if layer.startswith("block"):
            attentions[layer] = getattr(place.module, place.attention, None) if place.attention else None
            if not isinstance(attentions[layer], nn.Module):
                what = f"the attention of {layer}, a {type(place.module).__name__}, can't be read: it works in "
                what += "windows, on merged keys or on channels, mixes heads, or is not timm's"
                raise UserError(what, MODEL, "leave out the metric 'attention', or use a plain model of timm")

    def hook(layer: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        visit(layer, inputs[0])

    with ExitStack() as stack:
        for layer, attention in attentions.items():
            stack.callback(setattr, attention, "fused_attn", attention.fused_attn)
            attention.fused_attn = False
            # of timm's modules only the dropout after the softmax receives the probabilities
            stack.callback(attention.attn_drop.register_forward_pre_hook(partial(hook, layer)).remove)
        yield


def shapes_of(
    model: nn.Module, places: Mapping[str, Place], where: str = MODEL, image: Tensor | None = None
) -> dict[str, tuple[int, int]]:
    """Return (number, width) of the patch tokens at each place; raises UserError if a forward pass fails.

    `image` is `(1, C, H, W)`, by default zeros of the size that the model was built for.
    """
    shapes: dict[str, torch.Size] = {}
    if image is None:
        channels = getattr(model, "in_chans", 3)
        image = next(model.parameters()).new_zeros(1, channels, *image_size_of(model))
    height, width = image.shape[-2:]
    tip = "pass an image model, and images of its size; of another library, set its attribute image_size"
    what = f"the model can't take images of {height}x{width}"
    keep = watch(places, lambda layer, tokens: shapes.update({layer: tokens.shape}))
    with torch.no_grad(), evaluating(model), keep, reading(f"{where}, with its image size", tip, what):
        model(image)
    if wrong := [shape for shape in shapes.values() if shape[0] != 1]:
        raise UserError(NOT_IMAGES.format(tuple(wrong[0]), 1), where, BATCH_FIRST)
    return {layer: (shape[1], shape[2]) for layer, shape in shapes.items()}


def image_size_of(model: Any) -> tuple[int, int]:
    """Return the height and width of the images that a model was built for; 224 if it does not say."""
    model = image_model_of(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    for part in (model, getattr(model, "config", None)):  # of other libraries
        size = size or getattr(part, "image_size", None)
    height, width = (size, size) if isinstance(size, int) else size or get_model_input_config(model)["input_size"][1:]
    return int(height), int(width)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, and each of its modules back to its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Compute in full float32: no autocast and no TF32, whatever training uses."""
    products = torch.backends.cuda.matmul
    before, products.allow_tf32 = products.allow_tf32, False
    convolutions = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)
    try:
        with torch.autocast(device.type, enabled=False), convolutions:
            yield
    finally:
        products.allow_tf32 = before
