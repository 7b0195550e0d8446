"""Lengths of training in epochs, steps, images, percent or time: `30ep`, `2000st`, `1e6im`, `5%`, `10min`."""

import math
import re
from dataclasses import dataclass

from pdvit.config.schema import DiversityConfig
from pdvit.errors import UserError, closest

SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
EXAMPLES = {"ep": "30ep", "st": "2000st", "im": "1e6im", "%": "5%", "min": "10min", "h": "12h", "s": "300s"}
WEIGHT_SCHEDULES = ("warmup", "decay", "until")
_FORM = re.compile(r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)\s*(ep|st|im|%|min|h|s)?", re.IGNORECASE)


def describe_duration(seconds: float) -> str:
    """Return a time as text."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Duration:
    """A length and its unit: `ep`, `st`, `im`, `%` of the run, or the times `s`, `min`, `h`."""

    value: float
    unit: str

    @property
    def seconds(self) -> float | None:
        """The time in seconds; None for a length of training."""
        return self.value * SECONDS[self.unit] if self.unit in SECONDS else None

    def steps(self, steps_per_epoch: int, batch_size: int, total: int | None = None) -> int:
        """Return the length in steps, rounded to the nearest. A percentage is of `total`."""
        if self.unit == "%":
            assert total is not None, "a percentage needs the length of the run"
            return round(self.value / 100 * total)
        return round(self.value * {"ep": float(steps_per_epoch), "st": 1.0, "im": 1 / batch_size}[self.unit])


def parse_duration(text: str, unit: str, where: str, percent: bool = True, clock: bool = False) -> Duration:
    """Read a duration; bare numbers are in `unit`; `percent` allows %, `clock` times. Raises UserError otherwise."""
    match = _FORM.fullmatch(text.strip())
    found = (match[2] or unit).lower() if match else ""
    value = float(match[1]) if match else math.nan
    units = {*SECONDS}
    if unit not in SECONDS:
        units = {"ep", "st", "im"} | ({"%"} if percent else set()) | (units if clock else set())
    if found in units and value <= (100 if found == "%" else 1e15):
        return Duration(value, found)
    what = f"'{text}' is not a valid {'time' if unit in SECONDS else 'length of training'}"
    forms = ", ".join(example for name, example in EXAMPLES.items() if name in units)
    raise UserError(what, where, f"write it as one of {forms}; a bare number is in {unit}")


def weight_schedule(diversity: DiversityConfig, term: str) -> dict[str, Duration]:
    """Return the parts of the schedule of a term's weight with their lengths; empty if constant.

    The text is `constant`, or parts NAME:LENGTH joined by commas. A bare number is epochs. Raises UserError.
    """
    text, where = getattr(diversity, f"{term}_schedule").strip(), f"diversity.{term}_schedule (--{term}-schedule)"
    lengths: dict[str, Duration] = {}
    for part in [] if text == "constant" else text.split(","):
        name, _, length = (piece.strip() for piece in part.partition(":"))
        if name not in WEIGHT_SCHEDULES:
            what = f"'{part.strip()}' is not part of a weight schedule"
            raise UserError(what, where, closest(name, WEIGHT_SCHEDULES))
        if name in lengths:
            raise UserError(f"'{name}' is given twice", where, "give each part once")
        lengths[name] = parse_duration(length, "ep", where)
    return lengths
