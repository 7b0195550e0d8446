"""Spatial frequencies of the map of patch tokens, by its 2-D Fourier transform."""

import torch
from torch import Tensor

from pdvit.analysis.metrics.patches import ROUNDING, Patches


def spectrum(tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return two fractions of energy `(B,)` and the relative log-amplitude `(B, K)` of the map of tokens `(B, N, D)`.

    The fractions of the squared length are those at frequency 0 and at half of the highest frequency or more, in either
    direction of the grid. Zero tokens are a constant map.

    The relative log-amplitude (Park & Kim 2022) is the logarithm of the amplitude, averaged over channels, along the
    diagonal from frequency 0 to the highest, minus its value at 0; K = min(grid) // 2 + 1. Amplitudes below 1e-6 of
    their channel's largest are rounding and count as that.
    """
    (height, width), side = grid, min(grid)
    size = torch.maximum(tokens.amax((1, 2)), -tokens.amin((1, 2)))[:, None, None]  # squares must not be infinite
    waves = torch.fft.rfft2((tokens / size.where(size > 0, 1)).unflatten(1, grid), dim=(1, 2), norm="ortho")
    power = waves.real.square() + waves.imag.square()  # of half of the frequencies; the others mirror them
    rows, columns = torch.fft.fftfreq(height).abs()[:, None], torch.fft.rfftfreq(width)
    twice = torch.where((columns > 0) & (columns < 0.5), 2.0, 1.0)
    energy = power.sum(3).double() * twice.to(power)
    total = energy.sum((1, 2))
    high = (energy * torch.maximum(rows, columns).ge(0.25).to(energy)).sum((1, 2))
    zero = total == 0
    scale = total.masked_fill(zero, 1)
    places = [(round(k * height / side), round(k * width / side)) for k in range(side // 2 + 1)]
    places = [(down, across) if across <= width // 2 else (-down, width - across) for down, across in places]
    down, across = torch.tensor(places, device=tokens.device).T
    diagonal, floor = power[:, down, across].double(), ROUNDING**2 * power.amax((1, 2)).double()
    curve = diagonal.maximum(floor[:, None]).clamp_min(torch.finfo(torch.float32).tiny).log().mean(2) / 2
    return (energy[:, 0, 0] / scale).masked_fill(zero, 1), high / scale, curve - curve[:, :1]


def spectrum_metrics(patches: Patches) -> dict[str, Tensor]:
    """Return the metrics of spatial frequency."""
    constant, high, curve = spectrum(patches.tokens, patches.grid)
    side = min(patches.grid)  # frequencies as fractions of the highest, pi
    axis = curve.new_tensor([2 * step / side for step in range(side // 2 + 1)]).expand_as(curve)
    scalars = {"dc_share": constant, "high_frequency_share": high, "log_amplitude": curve[:, -1]}
    return scalars | {"by_frequency": curve, "frequency": axis}
