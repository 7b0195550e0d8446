"""Mean, spread and confidence interval over images, without keeping a value per image."""

import math
from dataclasses import dataclass

from scipy.special import stdtrit
from torch import Tensor


@dataclass
class Moments:
    """Count, mean and sum of squared deviations over images, in float64."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, values: Tensor) -> None:
        """Add the values `(B,)` of more images."""
        values = values.double()
        mean = float(values.mean())
        self.merge(Moments(len(values), mean, float((values - mean).square().sum())))

    def merge(self, other: "Moments") -> None:
        """Add other images (Chan, Golub and LeVeque 1979)."""
        total = self.count + other.count
        difference = other.mean - self.mean
        self.squares += other.squares + difference**2 * self.count * other.count / total
        self.mean += difference * other.count / total
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
