"""The run directory, and files that are either complete or absent: written beside their target, then renamed."""

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any, Literal

from pdvit.errors import RunFailed, UserError, closest, closest_path, command
from pdvit.files import read_json, reading

RUNS = Path("runs")
RECORDS, CHANGES, STATUS, CHECKPOINTS = "metrics.jsonl", "changes.json", "status.json", "checkpoints"
WRITTEN = ("run.toml", STATUS, RECORDS, CHANGES, "summary.json", "config.json", "model.safetensors")  # by training
LAST, BEST = "last", "best"  # files with the name of a checkpoint beside them
IN_CHECKPOINTS = (f"{CHECKPOINTS}/{LAST}", f"{CHECKPOINTS}/{BEST}", f"{CHECKPOINTS}/anchor.safetensors")
LOCK = ".lock"  # in the folder that it locks
JOBS = "jobs"  # of a launcher: it makes this folder before the run begins
FREE, OTHER = "check free space and permissions", "choose another --out"
Status = Literal["running", "finished", "stopped", "failed"]


@contextmanager
def writing(what: str, where: Path, tip: str = OTHER) -> Iterator[None]:
    """Turn an OSError inside into a UserError: `what` can't be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} can't be written: {error.strerror}", str(where), tip) from error


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file beside its target and rename it; after an OSError the target is unchanged."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("wb") as opened:
            opened.write(content.encode() if isinstance(content, str) else content)
            opened.flush()
            os.fsync(opened.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def hold(folder: Path, what: str, tip: str) -> Iterator[IO[str]]:
    """Make a folder and lock it for this process, not for its workers; raises UserError if another one holds it."""
    with ExitStack() as stack:
        with writing(f"{folder.name}/{LOCK}", folder.parent, FREE):
            folder.mkdir(exist_ok=True)
            file = stack.enter_context((folder / LOCK).open("w"))
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(what, str(folder.parent), tip) from error
        yield file


def sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_pointer(file: Path) -> str:
    """Return the name of the checkpoint in LAST or BEST; empty if there is none."""
    with suppress(OSError, ValueError):
        return file.read_text().strip()
    return ""


def to_json(value: Any, indent: int | None = 2) -> str:
    """Return JSON that every reader accepts: numbers that are not finite become null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(finite, indent=indent, ensure_ascii=False)


@dataclass
class RunDirectory:
    """The files of one run. With `writes` unset, as on all ranks but 0, methods that write do nothing."""

    path: Path
    writes: bool = True
    lock: IO[str] | None = None  # while this process trains the run

    @classmethod
    def create(cls, out: str | None, name: str, config: str | None = None) -> "RunDirectory":
        """Make the directory `out`, or runs/NAME with a suffix if that exists, with run.toml; raises UserError.

        Without `config`, the content of run.toml, it is that of a job which has not begun.
        """
        text = name if out is None else out
        if text == "" or (out is None and (name == ".." or Path(name).name != name)):
            raise UserError(f"'{text}' is not a name", "run.name (--name), run.out (--out)", "give a path with --out")
        path = RUNS / name if out is None else Path(os.path.expanduser(out))
        for number in count(2):
            refuse_taken(out)
            with writing("the run directory", path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileExistsError):
                    path.mkdir(exist_ok=out is not None)
                    # Of several commands that train, one makes the folder of checkpoints.
                    (path / (JOBS if config is None else CHECKPOINTS)).mkdir(exist_ok=config is None)
                    break
            path = RUNS / f"{name}-{number}" if out is None else path
        directory = cls(path)
        try:
            if config is not None:
                directory.write("run.toml", config)
        except UserError:
            for folder in (path / CHECKPOINTS, path):
                with suppress(OSError):  # a job's folder stays
                    folder.rmdir()
            raise
        return directory

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training this run; raises UserError if one does."""
        if not self.writes:
            yield
            return
        checkpoints = self.path / CHECKPOINTS
        with hold(checkpoints, "another process is training this run", "stop that one first") as self.lock:
            try:
                for file in map(self.path.joinpath, WRITTEN + IN_CHECKPOINTS):
                    for left in file.parent.glob(f".{file.name}.{8 * '[0-9a-f]'}"):  # by a process that was killed
                        with suppress(OSError):  # a folder of that name stays
                            left.unlink()
                for folder in checkpoints.glob(f".step-{8 * '[0-9]'}"):
                    shutil.rmtree(folder, ignore_errors=True)
                yield
            finally:
                self.lock = None

    def held(self) -> bool:
        """Return whether another process trains this run, without locking it."""
        with suppress(FileNotFoundError), (self.path / CHECKPOINTS / LOCK).open("rb") as file:
            try:
                os.lockf(file.fileno(), os.F_TEST, 0)
            except PermissionError:
                return True
        return False

    def check(self) -> None:
        """Raise RunFailed if the folder that this process trains is gone, or another one is in its place."""
        if self.lock is not None:
            with suppress(OSError):
                if os.path.samestat(os.fstat(self.lock.fileno()), os.stat(self.path / CHECKPOINTS / LOCK)):
                    return
            tip = "if it was moved, resume it where it is now: pdvit train --resume PATH"
            raise RunFailed(f"the run directory is gone or is another folder now: {self.path}", tip)

    def write(self, name: str, content: bytes | str | Mapping[str, Any]) -> None:
        """Write a file, a table as JSON; raises UserError."""
        if self.writes:
            self.check()
            content, file = to_json(content) + "\n" if isinstance(content, Mapping) else content, self.path / name
            with writing(name, self.path, FREE):
                file.parent.mkdir(exist_ok=True)
                try:
                    write_file(file, content)
                except OSError:
                    if name != STATUS or not file.is_file():
                        raise
                    # A full disk still has the room that the file takes.
                    with file.open("r+", encoding="utf-8") as opened:
                        opened.write(str(content))
                        opened.truncate()

    def mark(self, status: Status, reason: str) -> None:
        """Write how a run ended that could not write it, unless it is finished; raises UserError."""
        self.path.mkdir(exist_ok=True)
        before = self.read_json(STATUS, optional=True)
        if before.get("status") != "finished":
            self.write(STATUS, {**before, "status": status, "reason": reason})

    def read_json(self, name: str, optional: bool = False) -> dict[str, Any]:
        """Read a JSON table; raises UserError if it is damaged, or missing and not `optional`."""
        with self.reading(name):
            return {} if optional and not (self.path / name).is_file() else read_json(self.path / name)

    def reading(self, name: str) -> AbstractContextManager[None]:
        """Raise UserError if a file of the run is missing, damaged or of another format."""
        return reading(self.path / name, "the run is damaged; start another", f"{name} can't be read")

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record to metrics.jsonl."""
        if self.writes:
            self.check()
            with writing(RECORDS, self.path, FREE), (self.path / RECORDS).open("a", encoding="utf-8") as file:
                file.write(to_json(record, indent=None) + "\n")

    def cut_records(self, step: int) -> int:
        """Drop the records after `step` and a line that a kill left incomplete; return how many are left."""
        file = self.path / RECORDS
        if not (self.writes and file.exists()):
            return 0
        kept = []
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            with suppress(ValueError, LookupError, TypeError, RecursionError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        self.write(RECORDS, "".join(kept))
        return len(kept)

    def changes(self) -> list[dict[str, Any]]:
        """Return the changes of settings since the run began, each with its `step`, `key`, `from` and `to`."""
        with self.reading(CHANGES):
            found = self.read_json(CHANGES, optional=True).get("changes", [])
            return [{name: entry[name] for name in ("step", "key", "from", "to")} for entry in found]

    def record_changes(self, step: int, changes: Mapping[str, tuple[Any, Any]], config: str) -> None:
        """Record the changes (old, new) that take effect after `step`, and write the configuration as run.toml."""
        entries = [{"step": step, "key": key, "from": old, "to": new} for key, (old, new) in changes.items()]
        # First, because a configuration with changes that are not recorded is refused.
        self.write(CHANGES, {"changes": self.changes() + entries})
        self.write("run.toml", config)


def refuse_taken(out: str | None) -> None:
    """Raise UserError if a new run can't be made in the folder `out`: a job leaves JOBS and STATUS before it begins."""
    path = Path(os.path.expanduser(out or ""))
    if out and os.path.lexists(path):
        names = [name for name in os.listdir(path) if not name.startswith(".")] if path.is_dir() else [""]
        if not {*names} <= {JOBS, STATUS}:
            again = f", or resume it: {command('train', '--resume', path)}" if (path / "run.toml").is_file() else ""
            raise UserError("the path exists already", str(path), OTHER + again)


def newest(marker: str) -> list[Path]:
    """Return the folders under runs/ that hold the file `marker`, the one written last first."""
    files = [file for file in RUNS.glob(f"*/{marker}") if file.is_file()]
    return [RUNS / file.parts[1] for file in sorted(files, key=os.path.getmtime, reverse=True)]


def closest_run(name: str, *markers: str) -> str:
    """Return a tip for a path that is no run: the most similar folder under runs/ that holds one of `markers`.

    Without a similar one the tip has all of them, or the command that makes one.
    """
    runs = dict.fromkeys(path.name for marker in markers for path in newest(marker))
    tip = closest(os.path.basename(name), runs, folder=f"{RUNS}/")
    return tip if runs else f"{RUNS}/ has none yet; train one: {command('train')}"


def check_path(checkpoint: str) -> None:
    """Raise UserError for a path that does not exist; other names may be of models."""
    if os.sep in checkpoint and ":" not in checkpoint and not os.path.exists(os.path.expanduser(checkpoint)):
        tip = closest_path(checkpoint, f"check the path; {closest_run(checkpoint, 'model.safetensors')}")
        raise UserError("there is no such checkpoint", checkpoint, tip)


def find_run(name: str | Path) -> Path:
    """Return an existing run directory, the newest for the text `auto`; raises UserError."""
    path = next(iter(newest("run.toml")), None) if name == "auto" else Path(os.path.expanduser(name))
    if path is None:
        tip = f"name its folder, or start one: {command('train')}"
        raise UserError("there is no run to resume", "--resume auto", tip)
    if not (path / "run.toml").is_file():
        what = "this is not a run directory" if os.path.lexists(path) else "there is no such run"
        raise UserError(what, str(path), closest_run(str(path), "run.toml"))
    return path
