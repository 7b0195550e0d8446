"""Files that are either whole or absent: written beside their target, then renamed."""

import json
import os
import secrets
from pathlib import Path
from typing import Any


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file beside its target and rename it. Raises OSError; the target then is what it was."""
    data = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


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
