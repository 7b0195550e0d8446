"""The operations of RandAugment and of the colour jitter on a batch, with one argument for each image.

Each takes uint8 images `(B, 3, H, W)` and an argument `(B, 1, 1, 1)`, float32, and returns uint8 images, truncated to
whole levels as Pillow and torchvision do. A sum over an image is one of whole numbers, so that its order can't matter.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# Shares of red, green and blue in the brightness that an eye sees (ITU-R BT.601).
GREY = (0.2989, 0.587, 0.114)


def _levels(values: Tensor) -> Tensor:
    return values.clamp_(0, 255).to(torch.uint8)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Go from `other` (factor 0) to the images (1) and beyond."""
    return _levels(images * factor + other * (1 - factor))


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=1)
    grey: Tensor = red * GREY[0] + green * GREY[1] + blue * GREY[2]
    return grey.floor_()


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply by the factor."""
    return _levels(images * factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Move away from the mean grey of the image."""
    grey = _grey(images).long()
    return _blend(images, grey.sum((1, 2, 3), keepdim=True).float() / grey[0].numel(), factor)


def colour(images: Tensor, factor: Tensor) -> Tensor:
    """Move away from the grey of each pixel."""
    return _blend(images, _grey(images), factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Move away from a blur over 3x3 pixels, the middle one counted five times; the border is left as it is."""
    blurred = images.float()
    rows = blurred[..., :-2, :] + blurred[..., 1:-1, :] + blurred[..., 2:, :]
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    middle = blurred[..., 1:-1, 1:-1]
    middle.copy_(((around + 4 * middle) / 13).round_())
    return _blend(images, blurred, factor)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel from 0 to 255; one of a single level stays."""
    low, high = images.amin((2, 3), keepdim=True).int(), images.amax((2, 3), keepdim=True).int()
    stretched = (images - low) * 255 // (high - low).clamp(min=1)
    return torch.where(high > low, stretched.to(torch.uint8), images)


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Spread the levels of each channel evenly, by Pillow's table."""
    flat = images.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    highest = flat.amax(2, keepdim=True)
    step = (flat.shape[2] - counts.gather(2, highest)) // 255
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    spread = table.gather(2, flat).to(torch.uint8).view_as(images)
    return torch.where(step[..., None] > 0, spread, images)


def invert(images: Tensor, _: Tensor) -> Tensor:
    """Turn white into black."""
    return 255 - images


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep so many bits of each level; 0 is black."""
    return images & (256 - 2 ** (8 - bits.long())).to(torch.uint8)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the levels from the threshold on."""
    return torch.where(images < threshold, images, 255 - images)


def solarize_add(images: Tensor, add: Tensor) -> Tensor:
    """Add to the levels below 128."""
    return torch.where(images < 128, _levels(images + add), images)


def shear_x(images: Tensor, factor: Tensor, fill: Tensor) -> Tensor:
    """Move each row to the left by `factor` times its distance from the top."""
    return _moved(images, fill, lambda x, y: (x + factor[:, 0] * (y + images.shape[2] / 2), y))


def shear_y(images: Tensor, factor: Tensor, fill: Tensor) -> Tensor:
    """Move each column up by `factor` times its distance from the left."""
    return _moved(images, fill, lambda x, y: (x, y + factor[:, 0] * (x + images.shape[3] / 2)))


def translate_x(images: Tensor, share: Tensor, fill: Tensor) -> Tensor:
    """Move to the left by a share of the width."""
    return _moved(images, fill, lambda x, y: (x + share[:, 0] * images.shape[3], y))


def translate_y(images: Tensor, share: Tensor, fill: Tensor) -> Tensor:
    """Move up by a share of the height."""
    return _moved(images, fill, lambda x, y: (x, y + share[:, 0] * images.shape[2]))


def rotate(images: Tensor, degrees: Tensor, fill: Tensor) -> Tensor:
    """Turn counterclockwise around the middle."""
    angle = degrees[:, 0].deg2rad()
    cos, sin = angle.cos(), angle.sin()
    return _moved(images, fill, lambda x, y: (cos * x - sin * y, sin * x + cos * y))


def _moved(images: Tensor, fill: Tensor, source: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Fetch every pixel from where `source` says, bilinearly; what lies outside has the level `fill` `(3, 1, 1)`.

    `source` maps columns and rows, both counted from the middle, to those `(B, H, W)` of the pixel to fetch.
    """
    height, width = images.shape[2:]
    rows = (torch.arange(height, device=images.device) - (height - 1) / 2)[:, None]
    columns = torch.arange(width, device=images.device) - (width - 1) / 2
    x, y = source(columns, rows)
    shape = (len(images), height, width)
    grid = torch.stack([(x * (2 / width)).expand(shape), (y * (2 / height)).expand(shape)], -1)
    found = F.grid_sample(images - fill, grid, align_corners=False)
    return _levels((found + fill).round_())


# By timm's names, without their endings: Increasing, Rel.
LEVELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AutoContrast": autocontrast,
    "Equalize": equalize,
    "Invert": invert,
    "Posterize": posterize,
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
    "Color": colour,
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
}
MOVES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "Rotate": rotate,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
}
NAMES = (*LEVELS, *MOVES)


def operate(images: Tensor, chosen: Tensor, arguments: Tensor, fill: Tensor) -> Tensor:
    """Do one operation on each image, in layers.

    The choice is made on the host, so that images with the same operation can be taken together without waiting for
    the device.

    Args:
        images: uint8 `(B, 3, H, W)`; left as they are.
        chosen: `(B, layers)` on the host, places in `NAMES`; -1 does nothing.
        arguments: `(B, layers)` on the host.
        fill: `(3, 1, 1)` on the device of the images, the levels of what moves in from outside.
    """
    images = images.clone()
    for layer in range(chosen.shape[1]):
        order = chosen[:, layer].argsort(stable=True)
        ends = torch.searchsorted(chosen[order, layer], torch.arange(len(NAMES) + 1)).tolist()
        rows = order.to(images.device, non_blocking=True)
        values = arguments[order, layer].float().to(images.device, non_blocking=True)[:, None, None, None]
        for name, begin, end in zip(NAMES, ends[:-1], ends[1:], strict=True):
            if begin < end:
                some, value = rows[begin:end], values[begin:end]
                part = images[some]
                images[some] = LEVELS[name](part, value) if name in LEVELS else MOVES[name](part, value, fill)
    return images
