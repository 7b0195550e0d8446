"""Reading patch tokens: by return value for training, by hooks for measuring every layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pdvit.errors import UserError
from pdvit.models.families import family_of

T = TypeVar("T")


class TokenOutput(NamedTuple):
    """A forward pass: what the class loss and the three terms need.

    Attributes:
        logits: `(B, C)`.
        first: patch tokens `(B, N, D)` after the first block.
        last: patch tokens `(B, N, D)` after the last block and the final norm, where the model has one over tokens.
        patch_logits: `(B, N, C)`, or None without a patch head.
        others: more token maps for the cosine term.
        mixing: the mixing term itself, where it is computed here.
    """

    logits: Tensor
    first: Tensor
    last: Tensor
    patch_logits: Tensor | None
    others: tuple[Tensor, ...] = ()
    mixing: Tensor | None = None


class DiverseModel(nn.Module):
    """A timm vision transformer whose forward pass also returns its first and last patch tokens.

    The network is unchanged: logits equal the bare model's. Compile or distribute this module, and optimize its
    parameters: it owns the linear patch head of the mixing term. `model` is the bare timm model, to export.

    Raises UserError for a model whose patches can't be read, and for a patch head on a model without classes.
    """

    def __init__(self, model: nn.Module, patch_head: bool = True) -> None:
        super().__init__()
        family_of(model)
        parts: Any = model
        self.model = model
        self.prefix = int(parts.num_prefix_tokens)
        self.patch_head: nn.Linear | None = None
        if patch_head:
            if parts.num_classes < 1:
                raise UserError(
                    "the model has no classes, so a patch head has nothing to tell",
                    "DiverseModel(model, patch_head=True)",
                    "build it with num_classes=C, or pass patch_head=False and leave the mixing term off",
                )
            self.patch_head = nn.Linear(parts.embed_dim, parts.num_classes)
            nn.init.trunc_normal_(self.patch_head.weight, std=0.02)
            nn.init.zeros_(self.patch_head.bias)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that timm's optimizers must not decay (position, class token): the model's own list."""
        model: Any = self.model
        return {f"model.{name}" for name in model.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Say which block a parameter belongs to, for timm's layer decay: the model's own rules, under `model.`."""
        model: Any = self.model
        return {group: _under_model(rule) for group, rule in model.group_matcher(coarse).items()}

    def forward(self, images: Tensor) -> TokenOutput:
        """Run the model once on `(B, C, H, W)` images."""
        model: Any = self.model
        features, (first,) = model.forward_intermediates(images, indices=[0], output_fmt="NLC")
        last = features[:, self.prefix :]
        logits = model.forward_head(features)
        patch_logits = None if self.patch_head is None else self.patch_head(last)
        return TokenOutput(logits, first, last, patch_logits)


def _under_model(rule: Any) -> Any:
    """Return a rule of timm's matcher (a pattern, or a list of (pattern, order)) for names that begin with `model.`."""
    if isinstance(rule, str):
        return rule.replace("^", r"^model\.")
    return [(_under_model(pattern), order) for pattern, order in rule]


class Layer(NamedTuple):
    """A place where tokens are read: its name, and its depth on the axis of a figure."""

    name: str
    depth: int


def layers_of(model: nn.Module) -> list[Layer]:
    """List the places that `watch_layers` reads: `embed`, `block 1` ... `block L` and, where there is one, `norm`.

    `embed` is what enters the first block: patch embedding plus position.
    """
    family = family_of(model)
    blocks = getattr(model, family.blocks)
    layers = [Layer("embed", 0), *(Layer(f"block {i}", i) for i in range(1, len(blocks) + 1))]
    if not isinstance(getattr(model, family.norm), nn.Identity):
        layers.append(Layer("norm", len(blocks) + 1))
    return layers


@contextmanager
def watch_layers(model: nn.Module, visit: Callable[[Layer, Tensor], None]) -> Iterator[None]:
    """Call `visit(layer, tokens)` with the patch tokens `(B, N, D)` of every layer during each forward pass inside.

    For measuring only (eager, without gradients): hooks stop firing under torch.compile. Nothing is kept.
    """
    family = family_of(model)
    parts: Any = model
    prefix = int(parts.num_prefix_tokens)
    blocks = list(getattr(model, family.blocks))
    layers = layers_of(model)

    def on_input(layer: Layer) -> Callable[..., None]:
        return lambda _, inputs: visit(layer, inputs[0][:, prefix:])

    def on_output(layer: Layer) -> Callable[..., None]:
        return lambda _, __, output: visit(layer, output[:, prefix:])

    handles = [blocks[0].register_forward_pre_hook(on_input(layers[0]))]
    outputs = [*blocks, getattr(model, family.norm)]
    handles += [
        module.register_forward_hook(on_output(layer)) for module, layer in zip(outputs, layers[1:], strict=False)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
