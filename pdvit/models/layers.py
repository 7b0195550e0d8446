"""The layers of a model: where tokens and attention are, and hooks that read them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from pdvit.errors import UserError
from pdvit.files import reading
from pdvit.models.families import family_of, modules_at

K = TypeVar("K")
MODEL = "model.name (--model)"


class Layer(NamedTuple):
    """A layer."""

    name: str
    depth: int  # on the axis of a figure


@dataclass(frozen=True)
class Place:
    """A module whose output (or input, if `entering`) holds patch tokens, and their layout: see `families.Family`."""

    module: nn.Module
    prefix: int = 0
    channels_first: bool = False
    entering: bool = False
    order: Callable[[Tensor], Tensor] | None = None

    def register(self, hook: Callable[..., None]) -> torch.utils.hooks.RemovableHandle:
        """Register `hook(module, inputs, output=None)` on the module."""
        return (self.module.register_forward_pre_hook if self.entering else self.module.register_forward_hook)(hook)

    def tokens(self, value: Any) -> Tensor:
        """Return the patch tokens `(B, N, D)` in the order of the image, row by row."""
        value = value[0] if isinstance(value, tuple) else value  # some blocks add the size of the grid
        if self.order is not None:
            value = self.order(value)
        if value.ndim == 4:
            value = value.flatten(2).transpose(1, 2) if self.channels_first else value.flatten(1, 2)
        tokens: Tensor = value[:, self.prefix :]
        return tokens


def places_of(model: nn.Module, where: str = MODEL) -> dict[Layer, Place]:
    """Return the place of every layer; raises UserError if the family is not supported.

    They are `embed` (input of the first block: patches plus positions), `block 1` ..., and `norm` if it is over tokens.
    """
    family = family_of(model, where)
    blocks = modules_at(model, family.blocks)
    if not blocks:
        raise UserError("the model has no blocks", where, "set a depth of at least 1")
    orders: list[Any] = modules_at(model, family.order)
    # The number of prefix tokens, or the tokens `(1, K, D)` themselves.
    attributes = [getattr(model, name, None) if name else None for name in (family.prefix, family.norm_prefix)]
    prefix, norm_prefix = (int(value.shape[1] if isinstance(value, Tensor) else value or 0) for value in attributes)
    at = partial(Place, prefix=prefix, channels_first=family.channels_first)
    order = [partial(orders[0], block_idx=index) if orders else None for index in range(len(blocks))]
    places = {Layer("embed", 0): at(blocks[0], entering=True, order=order[0])}
    places |= {Layer(f"block {i + 1}", i + 1): at(block, order=order[i]) for i, block in enumerate(blocks)}
    for norm in modules_at(model, family.norm):
        places[Layer("norm", len(blocks) + 1)] = at(norm, prefix=norm_prefix)
    return places


@contextmanager
def watch(places: Mapping[K, Place], visit: Callable[[K, Tensor], None]) -> Iterator[None]:
    """Call `visit(key, tokens)` with the patch tokens `(B, N, D)` of each place during each forward pass inside.

    For measurements in eager mode: hooks that are registered and removed do not fire under torch.compile.
    """

    def hook(key: K, place: Place, module: nn.Module, inputs: tuple[Any, ...], output: Any = None) -> None:
        visit(key, place.tokens(inputs[0] if place.entering else output))

    with ExitStack() as stack:
        for key, place in places.items():
            stack.callback(place.register(partial(hook, key, place)).remove)
        yield


@contextmanager
def watch_attention(model: nn.Module, visit: Callable[[Layer, Tensor], None]) -> Iterator[None]:
    """Call `visit(layer, probabilities)` with the attention `(B, heads, T, T)` of every block in each forward pass.

    Rows are queries; the T tokens begin with the prefix tokens. Fused attention, which keeps no probabilities, is
    switched off inside. One block's matrices exist at a time. Raises UserError for a family without such attention.
    """
    name = family_of(model).attention
    attentions: dict[Layer, Any] = {}
    for layer, place in places_of(model).items():
        if layer.name.startswith("block"):
            attentions[layer] = getattr(place.module, name, None) if name else None
            if not isinstance(attentions[layer], nn.Module):
                what = f"{layer.name}, a {type(place.module).__name__}, has no attention between all patches: it works "
                what += "in windows, on merged keys or on channels, mixes heads, or has none"
                raise UserError(what, MODEL, "leave out the metric 'attention', or use a plain vision transformer")

    def hook(layer: Layer, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        visit(layer, inputs[0])

    with ExitStack() as stack:
        for layer, attention in attentions.items():
            stack.callback(setattr, attention, "fused_attn", attention.fused_attn)
            attention.fused_attn = False
            # of timm's modules only the dropout after the softmax receives the probabilities
            stack.callback(attention.attn_drop.register_forward_pre_hook(partial(hook, layer)).remove)
        yield


def shapes_of(model: nn.Module, places: Mapping[K, Place], where: str = MODEL) -> dict[K, tuple[int, int]]:
    """Return (number, width) of the patch tokens at each place; raises UserError if a forward pass fails."""
    shapes: dict[K, tuple[int, int]] = {}
    keep = watch(places, lambda key, tokens: shapes.update({key: (tokens.shape[1], tokens.shape[2])}))
    height, width = image_size_of(model)
    weight = next(model.parameters())
    what, tip = f"the model can't take images of {height}x{width}", "choose another image size, such as the model's own"
    with torch.no_grad(), evaluating(model), keep, reading(f"{where}, with its image size", tip, what):
        model(weight.new_zeros(1, getattr(model, "in_chans", 3), height, width))
    return shapes


def image_size_of(model: Any) -> tuple[int, int]:
    """Return the height and width of the images that a model was built for."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = size or get_model_input_config(model)["input_size"][1:]
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
