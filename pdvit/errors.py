"""UserError, which a user can mend; RunFailed; tips for names that are almost right, and commands to copy."""

import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from glob import iglob
from itertools import islice

LONGEST = 2000  # letters in a line of an error
MAX_COMPARED = 5000  # names in a folder: to compare them takes 0.2 s


class UserError(Exception):
    """Something the user can mend; the command line prints its three lines and exits with 2."""

    def __init__(self, what: str, where: str, tip: str) -> None:
        super().__init__(what, where, tip)
        self.what, self.where, self.tip = what, where, tip

    def __str__(self) -> str:
        return f"{one_line(self.what)}\n  where: {one_line(self.where)}\n  tip:   {one_line(self.tip)}"

    def _render_traceback_(self) -> list[str]:  # what IPython shows in place of a traceback
        return str(self).split("\n")


class RunFailed(Exception):
    """A run that broke down although its input was sound; the command line exits with 1."""

    def __init__(self, what: str, tip: str) -> None:
        super().__init__(what, tip)
        self.what, self.tip = what, tip

    def __str__(self) -> str:
        return f"{one_line(self.what)}\n  tip:   {one_line(self.tip)}"

    _render_traceback_ = UserError._render_traceback_


@contextmanager
def adding(where: str = "", tip: str = "") -> Iterator[None]:
    """Add to the place and the tip of a UserError that is raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(error.what, error.where + where, error.tip + tip) from error


def one_line(text: str) -> str:
    """Return a text on one printable line, cut in the middle if it is very long: it may be from a file."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def printable(text: str) -> str:
    """Escape what is not printable: names and files may hold any bytes, terminal commands among them."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def command(*words: object) -> str:
    """Return a pdvit command, quoted for the shell. It ends a printed line, so that it can be copied."""
    return shlex.join(["pdvit", *map(str, words)])


def closest(name: str, options: Iterable[str], shown: int = 8, folder: str = "", otherwise: str = "") -> str:
    """Return a tip: the option below `folder` most like `name`; without one `otherwise`, or the first `shown`."""
    name, names = name[:100].lower(), list(options)  # the comparison takes the square of the length
    # Also by an option's beginning: people shorten `vit_tiny_patch16_224` to `vit_tiny`.
    texts = {option.lower()[: len(name) + 1]: option for option in sorted(names, key=len, reverse=True)}
    texts |= {option.lower(): option for option in names}
    if found := get_close_matches(name, texts, n=1):
        return f"did you mean '{folder}{texts[found[0]]}'?"
    if otherwise or not names:
        return otherwise or "there are none"
    listed = ", ".join(f"{folder}{name}" for name in names[:shown])
    return f"choose from: {listed}{', ...' if len(names) > shown else ''}"


def closest_path(path: str, otherwise: str) -> str:
    """Return a tip: the path beside `path`, which does not exist, that is most like it, or `otherwise`."""
    folder, name = os.path.split(os.path.normpath(os.path.expanduser(path)))
    names = list[str]()
    with suppress(ValueError):  # of a null byte
        names = sorted({*islice(iglob("*", root_dir=folder or "."), MAX_COMPARED)} - {name})
    return closest(name, names, folder=folder and f"{folder}/", otherwise=otherwise)
