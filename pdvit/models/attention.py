"""Attention probabilities of a model, block by block."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from pdvit.errors import UserError
from pdvit.models.families import family_of
from pdvit.models.layers import MODEL, Layer, places_of


def attentions_of(model: nn.Module, where: str = MODEL) -> dict[Layer, nn.Module]:
    """Return the attention module of every block; raises UserError if its probabilities can't be read."""
    name = family_of(model, where).attention
    attentions: dict[Layer, nn.Module] = {}
    for layer, place in places_of(model, where).items():
        if not layer.name.startswith("block"):
            continue
        attention = getattr(place.module, name, None) if name else None
        if not isinstance(attention, nn.Module):
            what = (
                f"a {type(model).__name__} has no attention probabilities between all patches: "
                f"{type(place.module).__name__} ({layer.name}) works in windows, on merged keys or on channels, mixes "
                "its heads, or has no attention"
            )
            raise UserError(what, where, "leave out the metric 'attention', or use a plain vision transformer")
        attentions[layer] = attention
    return attentions


@contextmanager
def watch_attention(model: nn.Module, visit: Callable[[Layer, Tensor], None]) -> Iterator[None]:
    """Call `visit(layer, probabilities)` with the attention `(B, heads, T, T)` of every block in each forward pass.

    Rows are queries; the T tokens begin with the prefix tokens. Fused attention, which keeps no probabilities, is
    switched off inside. One block's matrices exist at a time.
    """

    def hook(layer: Layer, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        visit(layer, inputs[0])

    with ExitStack() as stack:
        for layer, module in attentions_of(model).items():
            attention: Any = module
            stack.callback(setattr, attention, "fused_attn", attention.fused_attn)
            attention.fused_attn = False
            # of timm's modules only the dropout behind the softmax receives the probabilities
            stack.callback(attention.attn_drop.register_forward_pre_hook(partial(hook, layer)).remove)
        yield
