"""Lengths of training in epochs, steps, images or percent: `30ep`, `2000st`, `1e6im`, `5%`."""

import math
import re
from dataclasses import dataclass

from pdvit.errors import UserError

_FORM = re.compile(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*(ep|st|im|%)?", re.IGNORECASE)


@dataclass(frozen=True)
class Duration:
    """A length and its unit: `ep`, `st`, `im` or `%` (of the whole run)."""

    value: float
    unit: str

    def steps(self, steps_per_epoch: int, batch_size: int, total: int | None = None) -> int:
        """Return the length in steps, rounded to the nearest; `total` is what percents are of."""
        if self.unit == "%":
            assert total is not None, "a percentage needs the length of the run"
            return round(self.value / 100 * total)
        per_unit = {"ep": float(steps_per_epoch), "st": 1.0, "im": 1 / batch_size}[self.unit]
        return round(self.value * per_unit)


def parse_duration(text: str, unit: str, where: str, percent: bool = True) -> Duration:
    """Read a duration; a bare number is in `unit`. Raises UserError for anything else, and for % unless `percent`."""
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
    if unit == "%" and not (percent and value <= 100):
        tip = "at most 100 % of the run" if percent else "write epochs (30ep), steps or images"
        raise UserError(f"'{text}' can't be used here", where, tip)
    return Duration(value, unit)
