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

    Raises UserError for anything else, for % unless `percent`, for a time unless `clock`, and for anything but a time
    where `unit` is one.
    """
    forms = _forms(unit, percent, clock)
    match = _FORM.fullmatch(text.strip())
    try:
        value = float(match[1]) if match else math.nan
    except ValueError:
        value = math.nan
    if match is None or not math.isfinite(value) or value > 1e15:
        kind = "a time" if unit in SECONDS else "a length of training"
        raise UserError(f"'{text}' is not {kind}", where, f"write {forms}")
    found = (match[2] or unit).lower()
    if unit in SECONDS and found not in SECONDS:
        raise UserError(f"'{text}' is not a time", where, f"write {forms}")
    if (found in SECONDS and not clock) or (found == "%" and not percent):
        raise UserError(f"'{text}' can't be used here", where, f"write {forms}")
    if found == "%" and value > 100:
        raise UserError(f"'{text}' can't be used here", where, "at most 100 % of the run")
    return Duration(value, found)


def _forms(unit: str, percent: bool, clock: bool) -> str:
    """Say what may be written where a bare number is in `unit`."""
    if unit in SECONDS:
        return f"90min, 12h or 300s; a bare number is in {unit}"
    forms = ["30ep", "2000st", "1e6im", *(["5%"] if percent else []), *(["10min"] if clock else [])]
    return f"{', '.join(forms[:-1])} or {forms[-1]}; a bare number is in {unit}"
