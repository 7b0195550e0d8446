"""What one key of the configuration knows about itself: its default, help, flags and range."""

from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field
from typing import Any


@dataclass(frozen=True)
class KeyInfo:
    """Help, command-line flags and allowed values of one key."""

    help: str
    flags: tuple[str, ...]
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    unit: str = ""  # the key is a duration, and this is the unit of a bare number
    percent: bool = True  # a duration may be a share of the run
    clock: bool = False  # a duration may be a time, such as 10min
    words: Mapping[str, int] = field(default_factory=dict)  # texts that stand for numbers
    number: bool = False  # a text that may be a whole number too


def key(
    default: Any,
    help: str,
    *flags: str,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: Sequence[str] = (),
    unit: str = "",
    percent: bool = True,
    clock: bool = False,
    words: Mapping[str, int] | None = None,
    number: bool = False,
) -> Any:
    """Declare a key: `minimum` and `maximum` are inclusive, `above` is a strict lower bound."""
    info = KeyInfo(help, flags, minimum, maximum, above, tuple(choices), unit, percent, clock, words or {}, number)
    return field(default=default, metadata={"key": info})


def info_of(item: "Field[Any]") -> KeyInfo:
    """Return what `key` declared for a dataclass field."""
    info = item.metadata["key"]
    assert isinstance(info, KeyInfo)
    return info
