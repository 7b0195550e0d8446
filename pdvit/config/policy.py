"""RandAugment in timm's notation: `rand-m9-mstd0.5-inc1`."""

import re

from pdvit.errors import UserError

# Magnitude, layers, upper bound, probability of a layer, standard deviation of the magnitude, increasing severity.
SECTION = re.compile(r"(m|n|mmax)[0-9]+|(p|mstd)[0-9]+(\.[0-9]+)?|inc[01]")


def check_auto_augment(text: str) -> None:
    """Raise UserError unless timm can read the policy; an empty one is none."""
    name, *sections = text.split("-")
    where, tip = "augment.auto_augment (--aa)", "for example rand-m9-mstd0.5-inc1"
    if name not in ("", "rand"):
        raise UserError(f"the policy '{name}' is not supported", where, f"only RandAugment is: {tip}")
    for section in sections:
        if not SECTION.fullmatch(section):
            what = f"'{section}' of '{text}' is not supported"
            raise UserError(what, where, f"known are m, n, mmax, p, mstd and inc with a number, {tip}")
    values = dict(re.findall(r"-([a-z]+)([0-9.]+)", text))
    if float(values.get("m", 10)) > float(values.get("mmax", 10)) or float(values.get("p", 1)) > 1:
        raise UserError(f"'{text}' is out of range", where, "m is at most mmax (10 by default), p at most 1")
