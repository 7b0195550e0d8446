"""The course of a term's weight over a run: `warmup:3ep,until:50%`."""

from pdvit.config.duration import Duration, parse_duration
from pdvit.config.schema import DiversityConfig
from pdvit.errors import UserError, closest

PARTS = ("warmup", "decay", "until")


def weight_schedule(diversity: DiversityConfig, term: str) -> dict[str, Duration]:
    """Return the parts of a term's schedule, `warmup`, `decay` and `until`, with their lengths; none if constant.

    A bare number is epochs. Raises UserError for anything else than `constant` or parts NAME:LENGTH joined by commas.
    """
    text, where = getattr(diversity, f"{term}_schedule"), f"diversity.{term}_schedule (--{term}-schedule)"
    if text.strip() == "constant":
        return {}
    lengths: dict[str, Duration] = {}
    for part in text.split(","):
        name, colon, length = (piece.strip() for piece in part.partition(":"))
        if name == "constant":
            raise UserError("'constant' stands alone", where, "leave it out, or leave out the rest")
        if not name:
            raise UserError("a part of the schedule is empty", where, "constant, or for example warmup:3ep,until:80%")
        if name not in PARTS:
            raise UserError(f"no schedule of a weight is named '{name}'", where, closest(name, ("constant", *PARTS)))
        if not colon:
            raise UserError(f"'{name}' needs a length", where, f"for example {name}:3ep")
        if name in lengths:
            raise UserError(f"'{name}' comes twice", where, "give each part once")
        lengths[name] = parse_duration(length, "ep", where)
    return lengths
