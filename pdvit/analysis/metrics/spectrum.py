"""How fine the pattern is that the tokens make over the image: the Fourier transform of the map of patches."""

import torch
from torch import Tensor

from pdvit.analysis.metrics.group import ROUNDING, Definition, Group, Patches
from pdvit.similarity import BLOCK_ENTRIES


def energies(tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the squared length of the tokens `(B, N, D)` at frequency 0, and at high ones, as shares: `(B,)` each.

    High is half of the highest frequency or more, in either direction of the grid. Zero tokens are a constant map.
    """
    power = _transform(tokens, grid).abs().square().double().sum(1)
    total = power.sum((1, 2))
    rows, columns = (torch.fft.fftfreq(size, device=tokens.device).abs() for size in grid)
    high = power * torch.maximum(rows[:, None], columns).ge(0.25)
    nothing = total == 0
    scale = total.masked_fill(nothing, 1)
    return (power[:, 0, 0] / scale).masked_fill(nothing, 1), high.sum((1, 2)) / scale


def log_amplitudes(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the Fourier relative log-amplitude of the map of tokens, `(B, min(grid) // 2 + 1)`: Park & Kim 2022.

    The logarithm of the amplitude, averaged over channels, at frequencies from 0 to the highest along the diagonal,
    minus that at 0. Amplitudes below 1e-6 of their channel's largest are rounding and count as that.
    """
    amplitude = _transform(tokens, grid).abs().double()
    least = ROUNDING * amplitude.amax((2, 3), keepdim=True)
    logarithm = amplitude.maximum(least).clamp_min(torch.finfo(torch.float32).tiny).log().mean(1)
    rows, columns = (torch.tensor(places, device=tokens.device) for places in zip(*_diagonal(grid), strict=True))
    along = logarithm[:, rows, columns]
    return along - along[:, :1]


def frequencies(grid: tuple[int, int]) -> list[float]:
    """Return the frequencies of `log_amplitudes` as shares of the highest, pi."""
    return [2 * step / min(grid) for step in range(min(grid) // 2 + 1)]


def _diagonal(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the places of a transform with the same frequency in both directions."""
    least = min(grid)
    return [(round(k * grid[0] / least), round(k * grid[1] / least)) for k in range(least // 2 + 1)]


def _transform(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the orthonormal transform over the grid, `(B, D, H, W)`, complex."""
    found: Tensor = torch.fft.fft2(tokens.transpose(1, 2).unflatten(2, grid), norm="ortho")
    return found


def _spectrum(patches: Patches) -> dict[str, Tensor]:
    count, width = patches.tokens.shape[1:]
    parts = patches.tokens.split(max(1, BLOCK_ENTRIES // (count * width)))  # transforms take several times the tokens
    found = [(*energies(part, patches.grid), log_amplitudes(part, patches.grid)) for part in parts]
    constant, high, curve = (torch.cat(values) for values in zip(*found, strict=True))
    axis = curve.new_tensor(frequencies(patches.grid)).expand_as(curve)
    scalars = {"dc_share": constant, "high_frequency_share": high, "log_amplitude": curve[:, -1]}
    return scalars | {"by_frequency": curve, "frequency": axis}


SPECTRUM = Group(
    _spectrum,
    {
        "dc_share": Definition(
            "the share of the tokens' squared length that lies in their mean over the patches (frequency 0); 1 minus "
            "it is the high-frequency component of Wang et al.",
            "0 to 1",
            "1/n",
            "1",
            "1/n high for independent tokens",
            "Wang et al. 2022 (arXiv 2203.05962)",
        ),
        "high_frequency_share": Definition(
            "the share of the tokens' squared length at spatial frequencies of half the highest or more, in either "
            "direction of the grid",
            "0 to 1",
            "the share of such frequencies: 0.75 on a grid of 14x14",
            "0",
            "the set of frequencies depends on the grid",
            "ours",
        ),
        "log_amplitude": Definition(
            "the mean over channels of ln |F| at the highest frequency of the diagonal minus that at frequency 0, F "
            "the 2-D Fourier transform of the map; |F| below 1e-6 of its channel's largest counts as that",
            "-13.8 upwards (usually negative)",
            "about 0 (0.35 between 0 and π, where F is complex)",
            "-13.8",
            "the highest frequency depends on the grid; an odd grid has none at π",
            "Park & Kim 2022 (arXiv 2202.06709)",
        ),
    },
    {
        "by_frequency": "log_amplitude at each frequency of the diagonal, from 0 on",
        "frequency": "those frequencies, as shares of the highest (π)",
    },
    shown={"dc_share": "DC", "high_frequency_share": "high", "log_amplitude": "ln |F|"},
)
