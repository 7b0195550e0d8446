"""Swin at sizes that are no multiples of the window: pad before the roll, as the original does.

timm rolls first. What it pads then lies between two borders of the image, whose tokens would attend to each other.
"""

from typing import Any

from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from torch import Tensor, nn
from torch.nn import functional as F


class _PadFirst:
    """Hands timm's attention a map that is whole windows already; the mask of shifted windows is then of that size."""

    window_size: tuple[int, int]

    def _padded(self, attend: Any, tokens: Tensor) -> Tensor:
        """Run the attention `(B, H, W, D) -> (B, H, W, D)` on tokens with zeros below and to the right."""
        height, width = tokens.shape[1:3]
        down, right = -height % self.window_size[0], -width % self.window_size[1]
        if not (down or right):
            return attend(tokens)  # type: ignore[no-any-return]
        return attend(F.pad(tokens, (0, 0, 0, right, 0, down)))[:, :height, :width]  # type: ignore[no-any-return]


class _Block(_PadFirst, swin_transformer.SwinTransformerBlock):
    def _attn(self, x: Tensor) -> Tensor:
        return self._padded(super()._attn, x)


class _BlockV2(_PadFirst, swin_transformer_v2.SwinTransformerV2Block):
    def _attn(self, x: Tensor) -> Tensor:
        return self._padded(super()._attn, x)


class _BlockV2Cr(_PadFirst, swin_transformer_v2_cr.SwinTransformerV2CrBlock):
    def _shifted_window_attn(self, x: Tensor) -> Tensor:
        return self._padded(super()._shifted_window_attn, x)


def pad_before_roll(model: nn.Module) -> None:
    """Let every block of a Swin, SwinV2 or SwinV2-CR pad before it rolls; other models stay as they are.

    A block's class changes and not its method, so that copies of the model are whole.
    """
    ours = {kind.__mro__[2]: kind for kind in (_Block, _BlockV2, _BlockV2Cr)}
    for module in model.modules():
        if type(module) in ours:
            module.__class__ = ours[type(module)]
