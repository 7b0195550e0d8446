"""RandAugment in timm's words: `rand-m9-mstd0.5-inc1`."""

import re
from dataclasses import dataclass

from pdvit.errors import UserError

WHERE = "augment.auto_augment (--aa)"
TIP = "for example rand-m9-mstd0.5-inc1"
# timm's words for a number: above so much, noise is drawn evenly from 0 to the magnitude.
EVEN = 100.0


@dataclass(frozen=True)
class Policy:
    """RandAugment (arXiv 1909.13719) as timm understands it.

    Attributes:
        magnitude: strength on a scale to 10 (`m`).
        layers: operations per image (`n`).
        prob: share of them that are done (`p`).
        noise: standard deviation of the magnitude (`mstd`); above 100: drawn evenly from 0 to the magnitude.
        most: what a noisy magnitude is cut at (`mmax`).
        increasing: a larger magnitude is a stronger change for each operation (`inc`).
    """

    magnitude: int = 10
    layers: int = 2
    prob: float = 0.5
    noise: float = 0.0
    most: int = 10
    increasing: bool = False


_FIELDS: dict[str, tuple[str, type]] = {
    "m": ("magnitude", int),
    "n": ("layers", int),
    "p": ("prob", float),
    "mstd": ("noise", float),
    "mmax": ("most", int),
    "inc": ("increasing", int),
}


def parse_policy(text: str) -> Policy | None:
    """Read timm's string; None for an empty one. Raises UserError, by name, for what is not supported."""
    if not text:
        return None
    kind, *parts = text.split("-")
    if kind != "rand":
        raise UserError(f"the policy '{kind}' is not supported", WHERE, f"only RandAugment is: {TIP}")
    values: dict[str, float] = {}
    for part in parts:
        match = re.fullmatch(r"([a-z]+)([0-9.]+)", part)
        if match is None or match[1] not in _FIELDS:
            what = f"'{part}' of '{text}' is not supported"
            raise UserError(what, WHERE, f"known are {', '.join(_FIELDS)} with a number, {TIP}")
        name, kind_of = _FIELDS[match[1]]
        try:
            values[name] = kind_of(match[2])
        except ValueError as error:
            kinds = {int: "a whole number", float: "a number"}
            raise UserError(f"'{part}' needs {kinds[kind_of]}", WHERE, TIP) from error
    policy = Policy(**values)  # type: ignore[arg-type]
    if policy.layers > 8 or policy.prob > 1 or not 1 <= policy.most <= 10 or policy.magnitude > policy.most:
        what = f"'{text}' is out of range"
        raise UserError(what, WHERE, "m at most mmax, mmax from 1 to 10, n at most 8, p at most 1")
    return policy
