"""Swin at sizes that are no multiples of the window: pad before the roll, as the original does.

timm rolls first. What it pads then lies between two borders of the image, whose tokens would attend to each other.
"""

from typing import Any

from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from torch import Tensor, nn
from torch.nn import functional as F


def _padding(block: type[Any], method: str) -> type[nn.Module]:
    """Return a subclass of a block whose method, the attention `(B, H, W, D) -> (B, H, W, D)`, gets whole windows.

    Tokens are padded with zeros below and to the right, and timm's mask of shifted windows is then of that size.
    """

    def attend(self: Any, tokens: Tensor) -> Tensor:
        height, width = tokens.shape[1:3]
        down, right = -height % self.window_size[0], -width % self.window_size[1]
        if down or right:
            tokens = F.pad(tokens, (0, 0, 0, right, 0, down))
        attended: Tensor = getattr(block, method)(self, tokens)
        return attended[:, :height, :width]

    return type(f"Padded{block.__name__}", (block,), {method: attend})


PADDING: dict[type[nn.Module], type[nn.Module]] = {
    block: _padding(block, method)
    for block, method in (
        (swin_transformer.SwinTransformerBlock, "_attn"),
        (swin_transformer_v2.SwinTransformerV2Block, "_attn"),
        (swin_transformer_v2_cr.SwinTransformerV2CrBlock, "_shifted_window_attn"),
    )
}


def pad_before_roll(model: nn.Module) -> None:
    """Let every block of a Swin, SwinV2 or SwinV2-CR pad before it rolls; other models stay as they are.

    A block's class changes and not its method, so that copies of the model are whole.
    """
    for module in model.modules():
        if type(module) in PADDING:
            module.__class__ = PADDING[type(module)]
