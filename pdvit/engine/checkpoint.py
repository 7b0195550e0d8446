"""Checkpoints on disk: a thread writes each beside its target and renames it; the pointer to it comes last."""

import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from pdvit.engine.device import is_out_of_memory
from pdvit.engine.distributed import Ranks
from pdvit.engine.state import VERSION, Snapshot, TrainState
from pdvit.errors import UserError
from pdvit.files import read_json, reading, reason_of
from pdvit.tracking.run_directory import BEST, LAST, read_pointer, sync, write_file

Check = Callable[[dict[str, Any]], None]  # of metadata; raises UserError
METADATA, SUFFIX, FOLDERS = "state.json", ".safetensors", "step-" + 8 * "[0-9]"
ANCHOR = "../anchor" + SUFFIX  # as seen from a checkpoint
JSON: dict[str, Any] = {"indent": 2, "ensure_ascii": False}  # Python reads back numbers that are not finite


class Checkpoints:
    """The folder `checkpoints/` of a run: the newest `keep`, the best, and multiples of `milestone_every` steps."""

    def __init__(self, folder: Path, keep: int = 1, milestone_every: int | None = None) -> None:
        self.folder, self.keep, self.milestone_every = folder, keep, milestone_every
        self.writing: Future[None] = Future()  # the last write: its result waits for the disk, and raises UserError
        self.writing.set_result(None)

    def save(self, snapshot: Snapshot, best: bool = False) -> None:
        """Start to write a snapshot; raises UserError if the last write failed."""
        self.writing.result()  # so that at most one waits in memory
        writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing = writer.submit(self.write, snapshot, best)
        writer.shutdown(wait=False)  # it ends with the write

    def load(self, state: TrainState, check: Check, tip: str = "start the run again") -> Snapshot | None:
        """Load what `last` points to, if there is any; a UserError names an older one or `tip`. All ranks take part."""
        with state.ranks.raise_on_all_ranks(), self._report_damage(tip):
            snapshot = self._read(state.ranks, check) if (self.folder / LAST).is_file() else None
        if snapshot is not None:
            with self._report_damage(tip):
                state.load_state_dict(snapshot)
        return snapshot

    def _read(self, ranks: Ranks, check: Check) -> Snapshot:
        """Read a checkpoint; ranks other than 0 read only their own small tensors."""
        source = self.folder / (self.folder / LAST).read_text().strip()
        metadata = read_json(source / METADATA)
        if metadata["version"] != VERSION:
            what = f"the checkpoint has format {metadata['version']}, this version of pdvit reads format {VERSION}"
            raise UserError(what, str(source), "resume it with the version of pdvit that wrote it, or start a new run")
        sums, anchor = metadata.pop("checksums"), dict[str, Tensor]()
        expected = sums.pop(ANCHOR, None)
        if expected is not None and ranks.main:
            with reading(source / ANCHOR, "restore it, or start a new run: all its checkpoints need it"):
                if _checksum(source / ANCHOR) != expected:
                    raise ValueError("it is not what was written")
                anchor = load_file(source / ANCHOR)
        for name, expected in sorted(sums.items()) if ranks.main else ():
            found = _checksum(metadata if name == METADATA else source / name)
            if found != expected:
                raise ValueError(f"{name} is not what was written (checksum {found:08x}, not {expected:08x})")
        check(metadata)
        if ranks.main:
            tensors = {name.removesuffix(SUFFIX): load_file(source / name) for name in sums if name != METADATA}
        else:
            with safe_open(source / f"state{SUFFIX}", framework="pt") as file:
                own = [name for name in file.keys() if name.startswith(("0.", f"{ranks.rank}."))]  # noqa: SIM118
                tensors = {"state": {name: file.get_tensor(name) for name in own}}
        return Snapshot(metadata["progress"]["step"], metadata, tensors, anchor)

    @contextmanager
    def _report_damage(self, tip: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # of Python, torch and safetensors
            if is_out_of_memory(error):
                raise
            damaged = read_pointer(self.folder / LAST)
            if older := [path.name for path in self.folder.glob(FOLDERS) if path.name < damaged]:
                tip = f"write {max(older)}, an older one, into {self.folder / LAST}, or {tip}"
            what = f"the checkpoint is damaged: {type(error).__name__}: {reason_of(error)}"
            raise UserError(what, str(self.folder / damaged), tip) from error

    def write(self, snapshot: Snapshot, best: bool = False) -> None:
        """Write a snapshot and its pointers, then remove what is not to be kept; raises UserError."""
        name = f"step-{snapshot.step:08d}"
        beside, target = self.folder / f".{name}", self.folder / name
        try:
            if read_pointer(self.folder / LAST) != name:  # else it is there, and to replace it would be a risk
                self.folder.mkdir(exist_ok=True)
                beside.mkdir()
                for file, tensors in snapshot.tensors.items():
                    save_file(tensors, beside / f"{file}{SUFFIX}")
                sums = {path.name: _checksum(path) for path in beside.glob(f"*{SUFFIX}")}
                if snapshot.anchor:
                    anchor, begun = beside / ANCHOR, bool(read_pointer(self.folder / LAST))
                    if not (begun and anchor.is_file()):  # a file without a checkpoint is of a run that was killed
                        copies = {name: tensor.to("cpu", copy=True) for name, tensor in snapshot.anchor.items()}
                        write_file(anchor, save({name: tensor.contiguous() for name, tensor in copies.items()}))
                    sums[ANCHOR] = _checksum(anchor)
                sums[METADATA] = _checksum(snapshot.metadata)
                write_file(beside / METADATA, json.dumps(snapshot.metadata | {"checksums": sums}, **JSON))
                for path in (*beside.glob(f"*{SUFFIX}"), beside):
                    sync(path)
                shutil.rmtree(target, ignore_errors=True)  # of a run that was killed before its pointer was written
                beside.rename(target)
                sync(self.folder)
            for pointer in (BEST, LAST) if best else (LAST,):
                write_file(self.folder / pointer, name)
            sync(self.folder)
            every, names = self.milestone_every, sorted(path.name for path in self.folder.glob(FOLDERS))
            kept = [older for older in names if older <= name][-self.keep :]
            for other in {*names} - {*kept, read_pointer(self.folder / BEST)}:
                # those after the newest are left from before the run was resumed
                if other > name or not every or int(other.removeprefix("step-")) % every:
                    shutil.rmtree(self.folder / other, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            what = f"the checkpoint of step {snapshot.step} can't be written: {reason_of(error)}"
            raise UserError(what, str(self.folder), "make room there; what was saved before is whole") from error


def _checksum(content: Path | dict[str, Any]) -> int:
    """Return the CRC-32 of a file, or of metadata as JSON."""
    if isinstance(content, dict):
        return zlib.crc32(json.dumps(content, **JSON).encode())
    with content.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as mapped:
        return zlib.crc32(mapped)
