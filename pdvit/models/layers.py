"""Where the tokens of a model are, layer by layer, and watching them with hooks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from pdvit.errors import UserError
from pdvit.models.families import count_at, family_of, modules_at

T = TypeVar("T")
K = TypeVar("K")
MODEL = "model.name (--model)"


class Layer(NamedTuple):
    """A place where tokens are read: its name, and its depth on the axis of a figure."""

    name: str
    depth: int


@dataclass(frozen=True)
class Place:
    """A module and how what it puts out (or, `entering`, takes in) becomes patch tokens."""

    module: nn.Module
    prefix: int = 0
    channels_first: bool = False
    entering: bool = False
    order: Callable[[Tensor], Tensor] | None = None

    def hook(self, visit: Callable[[Any], None]) -> torch.utils.hooks.RemovableHandle:
        """Register `visit(value)`, to be called with what the module puts out or takes in."""
        if self.entering:
            return self.module.register_forward_pre_hook(_Inputs(visit))
        return self.module.register_forward_hook(_Output(visit))

    def tokens(self, value: Any) -> Tensor:
        """Return the patch tokens `(B, N, D)`, in the order of the image: row by row."""
        value = value[0] if isinstance(value, tuple) else value  # some add the size of the grid
        if self.order is not None:
            value = self.order(value)
        if value.ndim == 4:
            value = value.flatten(2).transpose(1, 2) if self.channels_first else value.flatten(1, 2)
        assert isinstance(value, Tensor)
        return value[:, self.prefix :]


@dataclass(frozen=True)
class _Inputs:
    """A forward pre-hook; an object, not a closure, so that a deep copy of a model gets a hook of its own."""

    visit: Callable[[Any], None]

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.visit(inputs[0])


@dataclass(frozen=True)
class _Output:
    """A forward hook; see `_Inputs`."""

    visit: Callable[[Any], None]

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.visit(output)


def places_of(model: nn.Module, where: str = MODEL) -> dict[Layer, Place]:
    """Return every layer of a model and where its tokens are; UserError where pdvit can't read them.

    They are `embed` (what enters the first block: patch embedding plus position), `block 1` ... `block L` and, where
    there is a final norm over tokens, `norm`.
    """
    family = family_of(model, where)
    blocks = modules_at(model, family.blocks)
    if not blocks:
        raise UserError("the model has no blocks", where, "give it a depth of at least 1")
    orders = modules_at(model, family.order)
    at = partial(Place, prefix=count_at(model, family.prefix), channels_first=family.channels_first)

    def order(index: int) -> Callable[[Tensor], Tensor] | None:
        return partial(orders[0], block_idx=index) if orders else None

    places = {Layer("embed", 0): at(blocks[0], entering=True, order=order(0))}
    places |= {Layer(f"block {i + 1}", i + 1): at(block, order=order(i)) for i, block in enumerate(blocks)}
    prefix = count_at(model, family.norm_prefix)
    for norm in modules_at(model, family.norm):
        places[Layer("norm", len(blocks) + 1)] = at(norm, prefix=prefix)
    return places


@contextmanager
def watch(places: Mapping[K, Place], visit: Callable[[K, Tensor], None]) -> Iterator[None]:
    """Call `visit(key, tokens)` with the patch tokens `(B, N, D)` of every place during each forward pass inside.

    For measuring only (eager, without gradients): hooks stop firing under torch.compile. Nothing is kept.
    """

    def seen(key: K, place: Place) -> Callable[[Any], None]:
        return lambda value: visit(key, place.tokens(value))

    with ExitStack() as stack:
        for key, place in places.items():
            stack.callback(place.hook(seen(key, place)).remove)
        yield


@contextmanager
def watch_layers(model: nn.Module, visit: Callable[[Layer, Tensor], None]) -> Iterator[None]:
    """`watch` every layer of a model."""
    with watch(places_of(model), visit):
        yield


def measure_layers(
    model: nn.Module, images: Tensor, measure: Callable[[Tensor], T], network: nn.Module | None = None
) -> dict[Layer, T]:
    """Return `measure(tokens)` of every layer for one batch, without gradients or autocast.

    `network` is what to call instead of the model, where that is part of something larger (spread over processes).
    """
    found: dict[Layer, T] = {}

    def visit(layer: Layer, tokens: Tensor) -> None:
        found[layer] = measure(tokens)

    with torch.no_grad(), exact_float32(images.device), watch_layers(model, visit):
        (network or model)(images)
    return found


def shapes_of(model: nn.Module, places: Mapping[K, Place], where: str = MODEL) -> dict[K, tuple[int, int]]:
    """Return (number, width) of the patch tokens at each place, from one image that the model looks at.

    Raises UserError where the model fails on an image of its own size.
    """
    found: dict[K, tuple[int, int]] = {}

    def visit(key: K, tokens: Tensor) -> None:
        found[key] = (tokens.shape[1], tokens.shape[2])

    height, width = image_size_of(model)
    weight = next(model.parameters())
    with torch.no_grad(), evaluating(model), watch(places, visit):
        try:
            model(weight.new_zeros(1, getattr(model, "in_chans", 3), height, width))
        except Exception as error:  # timm and torch raise nearly anything where sizes do not fit
            raise UserError(
                f"the model can't take images of {height}x{width}: {type(error).__name__}: {error}",
                f"{where}, with its image size",
                "choose another image size, for example the model's own",
            ) from error
    return found


def with_image_size(model: Any, height: int, width: int) -> nn.Module:
    """Let a model that takes images of any size expect this one: its configuration is where timm looks for it."""
    model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, height, width)}
    assert isinstance(model, nn.Module)
    return model


def image_size_of(model: Any) -> tuple[int, int]:
    """Return the height and width of the images that a model was built for."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = size or get_model_input_config(model)["input_size"][1:]
    return int(height), int(width)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, and every part of it back to its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Compute in float32 proper: no autocast, and no TF32 on a GPU, whatever training chose."""
    products = torch.backends.cuda.matmul
    before, products.allow_tf32 = products.allow_tf32, False
    convolutions = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)
    try:
        with torch.autocast(device.type, enabled=False), convolutions:
            yield
    finally:
        products.allow_tf32 = before
