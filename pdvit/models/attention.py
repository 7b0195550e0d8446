"""Watching the attention of a model: the probabilities between its tokens, block by block."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from pdvit.errors import UserError
from pdvit.models.families import family_of
from pdvit.models.layers import MODEL, Layer, places_of


def attentions_of(model: nn.Module, where: str = MODEL) -> dict[Layer, nn.Module]:
    """Return the attention module of every block; UserError where its probabilities between patches can't be read."""
    family = family_of(model, where)
    blocks = {layer: place.module for layer, place in places_of(model, where).items() if layer.name[:5] == "block"}
    found = {layer: getattr(block, family.attention or "-", None) for layer, block in blocks.items()}
    missing = next((layer for layer, part in found.items() if not isinstance(part, nn.Module)), None)
    if missing is not None:
        raise UserError(
            f"the attention of a {type(model).__name__} can't be read as probabilities between all patches: "
            f"{type(blocks[missing]).__name__} ({missing.name}) works in windows, on merged keys or on channels, mixes "
            f"its heads, or has no attention",
            where,
            "leave out the metric 'attention', or take a plain vision transformer",
        )
    return {layer: part for layer, part in found.items() if part is not None}


@contextmanager
def watch_attention(model: nn.Module, visit: Callable[[Layer, Tensor], None]) -> Iterator[None]:
    """Call `visit(layer, probabilities)` with the attention `(B, heads, T, T)` of every block during each forward pass.

    Queries are the rows, and prefix tokens are among the T tokens, in front. The fused kernels of attention keep no
    probabilities, so they are switched off inside, and back on afterwards; whole matrices are held one block at a time.
    """

    def hook(layer: Layer, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        visit(layer, inputs[0])

    with ExitStack() as stack:
        for layer, module in attentions_of(model).items():
            part: Any = module
            stack.callback(setattr, part, "fused_attn", part.fused_attn)
            part.fused_attn = False
            # the dropout behind the softmax is the one place where timm's modules hand the probabilities on
            stack.callback(part.attn_drop.register_forward_pre_hook(partial(hook, layer)).remove)
        yield
