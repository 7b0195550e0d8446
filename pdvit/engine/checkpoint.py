"""Checkpoints on disk: written beside their place by a thread, then renamed, and the pointer to them last."""

import json
import re
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pdvit.engine.state import VERSION, Snapshot, State
from pdvit.errors import UserError
from pdvit.tracking import sync, to_json, write_file

LAST, BEST = "last", "best"
FACTS = "state.json"
NAME = re.compile(r"step-\d{8,}")
CHUNK = 2**20  # bytes of a file in memory at a time
# What files that are not what they should be make Python, torch and safetensors raise.
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)


class Checkpoints:
    """The folder `checkpoints/` of a run: the newest few, the best, and milestones."""

    def __init__(self, folder: Path, keep: int, milestone: int | None = None) -> None:
        """`milestone`: checkpoints at multiples of so many steps are never removed."""
        self.folder, self.keep, self.milestone = folder, keep, milestone
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None

    def save(self, snapshot: Snapshot, best: bool = False) -> None:
        """Begin to write a snapshot; raises UserError where the one before could not be written."""
        self.wait()  # so at most one waits in memory
        self.writing = self.writer.submit(self._write, snapshot, best)

    def wait(self) -> None:
        """Wait until what was begun is on the disk; raises UserError where it could not be written."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def failed(self) -> bool:
        """Tell without waiting whether writing came to grief; `wait` then says why."""
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def restore(self, state: State, check: Callable[[dict[str, Any]], None]) -> bool:
        """Load the checkpoint that `last` points to; False where there is none yet.

        `check` looks at its facts first. Raises UserError where it is damaged, and what `check` raises.
        """
        if not (self.folder / LAST).is_file():
            return False
        source = self.folder
        try:
            source = self.folder / (self.folder / LAST).read_text().strip()
            facts = json.loads((source / FACTS).read_text())
            _verify(source, facts)
            if facts["version"] != VERSION:
                what = f"the checkpoint has format {facts['version']}, this version of pdvit reads format {VERSION}"
                tip = "resume it with the version of pdvit that wrote it, or start a new run"
                raise UserError(what, str(source), tip)
            check(facts)
            files = ["module", "state", *(["ema"] if (source / "ema.safetensors").is_file() else [])]
            state.take(Snapshot(facts, {file: load_file(source / f"{file}.safetensors") for file in files}))
        except torch.OutOfMemoryError:
            raise
        except DAMAGE as error:
            others = [name for name in self._names() if name != source.name]
            tip = f"start again with --config {self.folder.parent / 'run.toml'}"
            if others:
                tip = f"an older one may be whole: write {others[-1]} into {self.folder / LAST}"
            what = f"the checkpoint is damaged: {type(error).__name__}: {error}"
            raise UserError(what, str(source), tip) from error
        return True

    def _write(self, snapshot: Snapshot, best: bool) -> None:
        try:
            self._write_beside(snapshot, best)
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise UserError(
                f"the checkpoint of step {snapshot.step} can't be written: {reason}",
                str(self.folder),
                "make room there; what was saved before is whole",
            ) from error

    def _write_beside(self, snapshot: Snapshot, best: bool) -> None:
        self.folder.mkdir(exist_ok=True)
        target = self.folder / f"step-{snapshot.step:08d}"
        if self._points_to(target.name) and not best:
            return  # the same state is there; to replace it would leave nothing for a moment
        beside = self.folder / f".{target.name}"
        for left in self.folder.glob(".step-*"):  # by a kill, or a disk that was full
            shutil.rmtree(left, ignore_errors=True)
        beside.mkdir()
        for file, tensors in snapshot.tensors.items():
            save_file(tensors, beside / f"{file}.safetensors")
        sums = {path.name: _checksum(path) for path in beside.glob("*.safetensors")}
        sums[FACTS] = _checksum_of(snapshot.facts)
        write_file(beside / FACTS, to_json(snapshot.facts | {"checksums": sums}))
        for written in (*beside.glob("*.safetensors"), beside):
            sync(written)
        shutil.rmtree(target, ignore_errors=True)  # of a run that was killed before its pointer got there
        beside.rename(target)
        sync(self.folder)
        if best:
            write_file(self.folder / BEST, target.name)
        write_file(self.folder / LAST, target.name)
        sync(self.folder)
        self._remove_old(target.name)

    def _names(self) -> list[str]:
        """Return the names of the checkpoints, the oldest first."""
        return sorted(path.name for path in self.folder.iterdir() if NAME.fullmatch(path.name))

    def _points_to(self, name: str) -> bool:
        try:
            return (self.folder / LAST).read_text().strip() == name
        except OSError:
            return False

    def _remove_old(self, newest: str) -> None:
        """Remove all but the newest few, the best and the milestones."""
        names = self._names()
        upto = [name for name in names if name <= newest]
        later = names[len(upto) :]  # left from before the run was taken up again at an earlier step
        best = ""
        with suppress(OSError):
            best = (self.folder / BEST).read_text().strip()
        for name in upto[: -self.keep] + later:
            milestone = self.milestone is not None and int(name.removeprefix("step-")) % self.milestone == 0
            if name in later or not (name == best or milestone):
                shutil.rmtree(self.folder / name, ignore_errors=True)


def _verify(source: Path, facts: dict[str, Any]) -> None:
    """Raise ValueError where a file is not what was written; takes the checksums out of the facts.

    Checkpoints of pdvit before there were checksums have none.
    """
    for name, expected in sorted(facts.pop("checksums", {}).items()):
        found = _checksum_of(facts) if name == FACTS else _checksum(source / name)
        if found != expected:
            raise ValueError(f"{name} is not what was written (checksum {found:08x}, not {expected:08x})")


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            total = zlib.crc32(chunk, total)
    return total


def _checksum_of(facts: dict[str, Any]) -> int:
    return zlib.crc32(to_json(facts).encode())
