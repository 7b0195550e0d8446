"""Copies of what can't be read at random: made once, whole or not at all, in a folder of the user's."""

import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from pdvit.errors import UserError

Say = Callable[[str], None]


def say_on_stderr(text: str) -> None:
    """Say something to whoever looks, without mixing with what a program reads."""
    print(text, file=sys.stderr)


def cache_folder() -> Path:
    """Return where copies lie: $PDVIT_CACHE, or `pdvit` in the user's cache folder."""
    if own := os.environ.get("PDVIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pdvit"


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Let one process of this machine at a time do what goes by a name; raises OSError where the cache refuses."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def digest(identity: str) -> str:
    """Return twelve letters that tell an identity from others."""
    return sha256(identity.encode(errors="surrogateescape")).hexdigest()[:12]


def cached(original: Path, suffix: str, make: Callable[[Path], None], say: Say) -> Path:
    """Return the copy of a file, made by `make(target)` unless there is one of this very size and time."""
    stat = original.stat()
    identity = f"{original.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    return cached_by(original.name, identity, suffix, make, say)


def cached_by(name: str, identity: str, suffix: str, make: Callable[[Path], None], say: Say) -> Path:
    """Return the copy that belongs to an identity, made by `make(target)` unless it is there.

    It gets its name only when it is whole; several processes make it once. Raises UserError where the disk refuses.
    """
    copy = cache_folder() / f"{name}-{digest(identity)}{suffix}"
    part = copy.with_name(f"{copy.name}.part")
    try:
        with locked(copy.name):
            if not copy.exists():
                say(f"copying it to {copy}, once ($PDVIT_CACHE moves it) ...")
                make(part)
                os.replace(part, copy)
    except OSError as error:
        tip = "make room, or name another folder with $PDVIT_CACHE"
        raise UserError(f"the copy can't be written: {error.strerror}", str(copy), tip) from error
    finally:
        with suppress(OSError):
            part.unlink()
    return copy
