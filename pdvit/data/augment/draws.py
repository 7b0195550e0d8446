"""What RandAugment and the colour jitter do to each image, drawn on the host: places in `NAMES`, and arguments."""

import math

import torch
from torch import Tensor

from pdvit.config.policy import EVEN, Policy
from pdvit.data.augment.crop import between
from pdvit.data.augment.operations import NAMES

# Numbers drawn for each layer of a policy.
DRAWS = 5
JITTERED = ("Brightness", "Contrast", "Color")


def draw_policy(draws: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
    """Return operations and arguments of RandAugment, both `(B, layers)`; see `operate`.

    Args:
        draws: `(B, layers * 5)`, numbers in [0, 1), on the host: which operation, whether at all, two for the
            magnitude, and the direction.
        policy: what to draw.
    """
    which, whether, first, second, way = draws.double().view(len(draws), -1, DRAWS).unbind(-1)
    chosen = (which * len(NAMES)).long()
    level = torch.full_like(which, policy.magnitude)
    if policy.noise > EVEN:
        level = first * policy.magnitude
    elif policy.noise > 0:  # Box and Muller's normal number
        level = level + policy.noise * (-2 * (1 - first).log()).sqrt() * (2 * math.pi * second).cos()
    table = arguments_of(level.clamp(0, policy.most), torch.where(way < 0.5, 1.0, -1.0), policy.increasing)
    arguments = torch.stack([table[name] for name in NAMES], -1).gather(-1, chosen[..., None])[..., 0]
    return torch.where(whether < policy.prob, chosen, -1), arguments


def arguments_of(level: Tensor, sign: Tensor, increasing: bool) -> dict[str, Tensor]:
    """Return the argument of every operation at a level from 0 to 10, as in timm's RandAugment."""
    share = level / 10
    bits, threshold = (share * 4).floor(), (share * 256).floor().clamp(max=256)
    factor = share * 1.8 + 0.1
    if increasing:
        bits, threshold = 4 - bits, 256 - threshold
        factor = (1 + sign * share * 0.9).clamp(min=0.1)
    nothing = torch.zeros_like(share)
    return {
        **dict.fromkeys(("AutoContrast", "Equalize", "Invert"), nothing),
        **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), factor),
        **dict.fromkeys(("ShearX", "ShearY"), sign * share * 0.3),
        **dict.fromkeys(("TranslateX", "TranslateY"), sign * share * 0.45),
        "Rotate": sign * share * 30,
        "Posterize": bits,
        "Solarize": threshold,
        "SolarizeAdd": (share * 110).floor().clamp(max=128),
    }


def draw_jitter(draws: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Return brightness, contrast and saturation in an order of each image's own, and their factors, both `(B, 3)`.

    Factors lie between 1 - strength, but not below 0, and 1 + strength, as in torchvision's ColorJitter.

    Args:
        draws: `(B, 6)`, numbers in [0, 1), on the host.
        strength: timm's number for all three.
    """
    order = draws[:, :3].argsort(1)
    chosen = torch.tensor([NAMES.index(name) for name in JITTERED])[order]
    return chosen, between(draws[:, 3:].double(), max(0.0, 1 - strength), 1 + strength)
