"""Spatial frequencies of the map of patch tokens, by its 2-D Fourier transform."""

import torch
from torch import Tensor

from pdvit.analysis.metrics.patches import ROUNDING, Patches
from pdvit.similarity import BLOCK_ENTRIES


def spectrum(tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return two fractions of energy `(B,)` and the relative log-amplitude `(B, K)` of the map of tokens `(B, N, D)`.

    The fractions of the squared length are those at frequency 0 and at half of the highest frequency or more, in either
    direction of the grid. Zero tokens are a constant map.

    The relative log-amplitude (Park & Kim 2022) is the logarithm of the amplitude, averaged over channels, along the
    diagonal from frequency 0 to the highest, minus its value at 0; K = min(grid) // 2 + 1. Amplitudes below 1e-6 of
    their channel's largest are rounding and count as that.
    """
    amplitude = torch.fft.fft2(tokens.transpose(1, 2).unflatten(2, grid), norm="ortho").abs().double()
    power = amplitude.square().sum(1)
    total = power.sum((1, 2))
    rows, columns = (torch.fft.fftfreq(size, device=tokens.device).abs() for size in grid)
    high = power * torch.maximum(rows[:, None], columns).ge(0.25)
    zero = total == 0
    scale = total.masked_fill(zero, 1)
    floor = ROUNDING * amplitude.amax((2, 3), keepdim=True)
    logarithm = amplitude.maximum(floor).clamp_min(torch.finfo(torch.float32).tiny).log().mean(1)
    side = min(grid)
    down, across = (
        torch.tensor([round(k * size / side) for k in range(side // 2 + 1)], device=tokens.device) for size in grid
    )
    diagonal = logarithm[:, down, across]
    return (power[:, 0, 0] / scale).masked_fill(zero, 1), high.sum((1, 2)) / scale, diagonal - diagonal[:, :1]


def spectrum_metrics(patches: Patches) -> dict[str, Tensor]:
    """Return the metrics of spatial frequency."""
    count, width = patches.tokens.shape[1:]
    parts = patches.tokens.split(max(1, BLOCK_ENTRIES // (count * width)))  # transforms take several times the tokens
    values = zip(*(spectrum(part, patches.grid) for part in parts), strict=True)
    constant, high, curve = (torch.cat(value) for value in values)
    side = min(patches.grid)  # frequencies as fractions of the highest, pi
    axis = curve.new_tensor([2 * step / side for step in range(side // 2 + 1)]).expand_as(curve)
    scalars = {"dc_share": constant, "high_frequency_share": high, "log_amplitude": curve[:, -1]}
    return scalars | {"by_frequency": curve, "frequency": axis}
