"""Mean, spread and confidence over images, streamed: nothing is kept per image."""

import math
from dataclasses import dataclass

from scipy.special import stdtrit
from torch import Tensor


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of the values seen so far."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor) -> None:
        """Take in the values `(B,)` of more images (Chan, Golub and LeVeque 1979), in float64."""
        values = values.double()
        new, mean = len(values), float(values.mean())
        total = self.count + new
        apart = mean - self.mean
        self.squares += float((values - mean).square().sum()) + apart**2 * self.count * new / total
        self.mean += apart * new / total
        self.count = total

    @property
    def std(self) -> float | None:
        """Standard deviation over images (n - 1); None for a single image."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else None

    @property
    def ci95(self) -> float | None:
        """Half-width of the 95 % confidence interval of the mean (Student's t); None for a single image."""
        if self.std is None:
            return None
        return float(stdtrit(self.count - 1, 0.975)) * self.std / math.sqrt(self.count)


@dataclass
class Curve:
    """Count and mean of the curves seen so far."""

    count: int = 0
    total: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        """Take in the curves `(B, K)` of more images, in float64."""
        self.total = self.total + values.double().sum(0).cpu()
        self.count += len(values)

    @property
    def mean(self) -> Tensor:
        """Mean over images, `(K,)`."""
        assert isinstance(self.total, Tensor)
        return self.total / self.count
