"""Messages of long work, and locks in the user's cache folder."""

import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

Say = Callable[[str], None]


def say_on_stderr(text: str) -> None:
    """Say something to whoever looks, without mixing with what a program reads."""
    print(text, file=sys.stderr)


def cache_folder() -> Path:
    """Return the cache folder: $PDVIT_CACHE, or `pdvit` in the user's cache folder."""
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
