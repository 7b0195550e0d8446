"""Spatial frequencies of the map of patch tokens, by its 2-D Fourier transform."""

import torch
from torch import Tensor

from pdvit.analysis.metrics.patches import ROUNDING, Patches


def spectrum_metrics(patches: Patches) -> dict[str, Tensor]:
    """Return the metrics of spatial frequency: two fractions of energy `(B,)` and the relative log-amplitude `(B, K)`.

    The fractions of the squared length are those at frequency 0 and at half of the highest frequency or more, in either
    direction of the grid. Zero tokens are a constant map.

    The relative log-amplitude (Park & Kim 2022) is the logarithm of the amplitude, averaged over channels, along the
    diagonal from frequency 0 to the highest, minus its value at 0; K = min(grid) // 2 + 1. Amplitudes below 1e-6 of
    their channel's largest are rounding and count as that.
    """
    tokens, grid = patches.tokens, patches.grid
    (height, width), side = grid, min(grid)
    size = torch.maximum(tokens.amax((1, 2)), -tokens.amin((1, 2)))[:, None, None]  # squares must not be infinite
    waves = torch.fft.rfft2((tokens / size.where(size > 0, 1)).unflatten(1, grid), dim=(1, 2), norm="ortho")
    power = waves.real.square() + waves.imag.square()  # of half of the frequencies; the others mirror them
    rows = torch.fft.fftfreq(height, device=tokens.device).abs()[:, None]
    columns = torch.fft.rfftfreq(width, device=tokens.device)
    twice = torch.where((columns > 0) & (columns < 0.5), 2.0, 1.0)
    energy = power.sum(3).double() * twice
    total = energy.sum((1, 2))
    high = (energy * torch.maximum(rows, columns).ge(0.25)).sum((1, 2))
    zero = total == 0
    scale = total.masked_fill(zero, 1)
    step = torch.arange(side // 2 + 1, dtype=torch.float64, device=tokens.device)
    down, across = ((step * length / side).round().long() for length in grid)
    mirrored = across > width // 2
    down, across = torch.where(mirrored, -down, down), torch.where(mirrored, width - across, across)
    diagonal, floor = power[:, down, across].double(), ROUNDING**2 * power.amax((1, 2)).double()
    curve = diagonal.maximum(floor[:, None]).clamp_min(torch.finfo(torch.float32).tiny).log().mean(2) / 2
    curve = curve - curve[:, :1]
    return {
        "dc_share": (energy[:, 0, 0] / scale).masked_fill(zero, 1),
        "high_frequency_share": high / scale,
        "log_amplitude": curve[:, -1],
        "by_frequency": curve,
        "frequency": (2 * step / side).expand_as(curve),  # as fractions of the highest, pi
    }
