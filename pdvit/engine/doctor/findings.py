"""What was looked for or tried, and how it came out."""

from dataclasses import dataclass
from typing import Literal

LONGEST = 100  # characters of somebody else's error message


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for or tried: there and working, not there, or broken.

    `detail` says what there is, or why there is nothing; without a `needed` thing training does not work.
    """

    mark: Literal["ok", "missing", "failed"]
    detail: str = ""
    tip: str = ""
    needed: bool = False


Findings = dict[str, Finding]


def reason(error: BaseException) -> str:
    """Return the first sentence of an error: torch's go on for a paragraph."""
    return shorten(str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")) or type(error).__name__


def shorten(text: str) -> str:
    """Return a text on one line, cut where it is too long for the screen."""
    words = " ".join(text.split())
    return words if len(words) <= LONGEST else f"{words[: LONGEST - 3]}..."
