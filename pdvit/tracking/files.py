"""Files that are either whole or absent: written beside their target, then renamed."""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pdvit.errors import UserError


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file beside its target and rename it. Raises OSError; the target then is what it was."""
    with new_file(path) as opened:
        opened.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def writing(what: str, where: Path) -> Iterator[None]:
    """Say an OSError inside as a UserError: what could not be written, for which the user names another `--out`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} can't be written: {error.strerror}", str(where), "choose another --out") from error


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write beside its target, renamed at the end; after an error the target is what it was."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("wb") as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def hold(path: Path, wait: bool = False) -> Iterator[None]:
    """Lock a file against other processes. Raises BlockingIOError where one has it, unless told to `wait`; OSError.

    The lock ends with this process, and is not its workers'.
    """
    with path.open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any, indent: int | None = 2) -> str:
    """Write JSON that every reader takes: a number that is not finite is refused with ValueError."""
    return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)
