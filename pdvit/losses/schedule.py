"""The factor on the weight of a term over the steps."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightSchedule:
    """The factor on a weight as a function of the step alone, so a run can be resumed at any step."""

    total: int  # steps of the run
    warmup: int = 0  # steps over which the factor rises linearly from 0 to 1, from the start
    decay: int = 0  # steps over which it falls linearly from 1 to 0, up to the end of the run
    until: int | None = None  # step from which on it is 0

    def __call__(self, step: int) -> float:
        """Return the factor of step 0, 1, ...: the product of the parts."""
        if self.until is not None and step >= self.until:
            return 0.0
        rise = min(1.0, step / self.warmup) if self.warmup else 1.0
        fall = min(1.0, max(0.0, (self.total - step) / self.decay)) if self.decay else 1.0
        return rise * fall
