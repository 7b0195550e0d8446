"""Lengths of training in epochs, steps, images, percent or time: `30ep`, `2000st`, `1e6im`, `5%`, `10min`."""

import math
import re
from dataclasses import dataclass

from pdvit.errors import UserError

_FORM = re.compile(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*(ep|st|im|%|min|h|s)?", re.IGNORECASE)


SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Duration:
    """A length and its unit: `ep`, `st`, `im`, `%` (of the whole run), or `s`, `min`, `h` (of the clock)."""

    value: float
    unit: str

    @property
    def seconds(self) -> float | None:
        """The length on the clock; None where it is a length of training."""
        return self.value * SECONDS[self.unit] if self.unit in SECONDS else None

    def steps(self, steps_per_epoch: int, batch_size: int, total: int | None = None) -> int:
        """Return the length in steps, rounded to the nearest; `total` is what percents are of."""
        if self.unit == "%":
            assert total is not None, "a percentage needs the length of the run"
            return round(self.value / 100 * total)
        per_unit = {"ep": float(steps_per_epoch), "st": 1.0, "im": 1 / batch_size}[self.unit]
        return round(self.value * per_unit)


def parse_duration(text: str, unit: str, where: str, percent: bool = True, clock: bool = False) -> Duration:
    """Read a duration; a bare number is in `unit`.

    Raises UserError for anything else, for % unless `percent`, and for a length on the clock unless `clock`.
    """
    match = _FORM.fullmatch(text.strip())
    try:
        value = float(match[1]) if match else math.nan
    except ValueError:
        value = math.nan
    if match is None or not math.isfinite(value) or value > 1e15:
        raise UserError(
            f"'{text}' is not a length of training",
            where,
            "write 30ep, 2000st, 1e6im or 5%, or a bare number",
        )
    unit = (match[2] or unit).lower()
    if unit in SECONDS and not clock:
        raise UserError(f"'{text}' can't be used here", where, "write a length of training: 30ep, 2000st, 1e6im or 5%")
    if unit == "%" and not (percent and value <= 100):
        tip = "at most 100 % of the run" if percent else "write epochs (30ep), steps or images"
        raise UserError(f"'{text}' can't be used here", where, tip)
    return Duration(value, unit)
