"""The run directory: everything that one run leaves behind, and nothing half-written."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pdvit.errors import UserError
from pdvit.tracking.files import hold, to_json, write_file

RUNS = Path("runs")
RECORDS = "metrics.jsonl"
CHANGES = "changes.json"
Status = Literal["running", "finished", "stopped", "failed"]


class RunDirectory:
    """The files of one run; see `docs/design.md` for what each is.

    Of several processes only one writes; for the others every method that writes does nothing.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    @classmethod
    def create(cls, out: str | None, name: str) -> "RunDirectory":
        """Make an empty run directory: at `out`, or at runs/NAME with a suffix where that is taken.

        Raises UserError where `out` exists or the place can't be written.
        """
        if out is not None:
            path = Path(os.path.expanduser(out))
            if not out:
                raise UserError(
                    "the name of the run directory is empty", "run.out (--out)", "leave it out, or name one"
                )
            if os.path.isfile(path):
                raise UserError("there is a file of this name", str(path), "choose another --out")
            if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
                tip = f"choose another --out, or go on with that run: pdvit train --resume {out}"
                raise UserError("the run directory exists already", str(path), tip)
            return cls(_make(path))
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"'{name}' is not a name", "run.name (--name)", "give a path with --out instead")
        for number in range(1, 10_000):
            path = RUNS / (name if number == 1 else f"{name}-{number}")
            if not os.path.lexists(path):
                with suppress(FileExistsError):  # somebody else took it just now
                    return cls(_make(path))
        raise UserError(f"there are too many runs named '{name}'", str(RUNS), "choose another --name")

    @classmethod
    def open(cls, path: Path, writes: bool = True) -> "RunDirectory":
        """Open a run that exists; UserError where the folder is not a run."""
        if not (path / "run.toml").is_file():
            raise UserError("this is not a run directory", str(path), "name a folder that holds a run.toml")
        return cls(path, writes)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training this run meanwhile; UserError where one does."""
        if not self.writes:
            yield
            return
        with ExitStack() as stack:
            try:
                (self.path / "checkpoints").mkdir(exist_ok=True)
                stack.enter_context(hold(self.path / "checkpoints" / ".lock"))
            except BlockingIOError as error:
                what = "another process is training this run"
                raise UserError(what, str(self.path), "stop that one first") from error
            except OSError as error:
                raise _refused("checkpoints/.lock", self.path, error) from error
            yield

    def write(self, name: str, content: bytes | str) -> None:
        """Write one of its files; UserError where the disk refuses."""
        if not self.writes:
            return
        try:
            (self.path / name).parent.mkdir(exist_ok=True)
            write_file(self.path / name, content)
        except OSError as error:
            raise UserError(
                f"{name} can't be written: {error.strerror}",
                str(self.path),
                "check free space and permissions",
            ) from error

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write one of its JSON files."""
        self.write(name, to_json({key: _finite(item) for key, item in value.items()}) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Read one of its JSON files; UserError where it is missing or damaged."""
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{name} can't be read: {error}", str(self.path / name), "the run is damaged; start another"
            ) from error
        if not isinstance(value, dict):
            raise UserError(
                f"{name} can't be read: it is not a table", str(self.path / name), "the run is damaged; start another"
            )
        return value

    def status(self, status: Status, **facts: Any) -> None:
        """Write status.json."""
        self.write_json("status.json", {"status": status} | facts)

    def append(self, kind: str, record: Mapping[str, Any], clock: Mapping[str, float] | None = None) -> None:
        """Add a record to metrics.jsonl; what depends on the clock goes under "time"."""
        line: dict[str, Any] = {"kind": kind} | {name: _finite(value) for name, value in record.items()}
        if clock:
            line["time"] = dict(clock)
        if not self.writes:
            return
        try:
            with (self.path / RECORDS).open("a", encoding="utf-8") as file:
                file.write(to_json(line, indent=None) + "\n")
        except OSError as error:
            raise _refused(RECORDS, self.path, error) from error

    def cut_records(self, step: int) -> int:
        """Drop the records after `step`, and a line that a kill left half-written; return how many are left."""
        file = self.path / RECORDS
        if not (self.writes and file.exists()):
            return 0
        kept = []
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            with suppress(ValueError, LookupError, TypeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        self.write(RECORDS, "".join(kept))
        return len(kept)

    def changes(self) -> dict[str, Any]:
        """Return the settings that were changed on purpose since the run began, `{section.key: value}`."""
        if not (self.path / CHANGES).is_file():
            return {}
        return {entry["key"]: entry["to"] for entry in self.read_json(CHANGES).get("changes", [])}

    def record_changes(self, step: int, changes: Mapping[str, tuple[Any, Any]], config: str) -> None:
        """Write down what was changed before the step after `step`, and the configuration with it as run.toml."""
        known = self.read_json(CHANGES)["changes"] if (self.path / CHANGES).is_file() else []
        known += [{"step": step, "key": key, "from": old, "to": new} for key, (old, new) in changes.items()]
        self.write_json(CHANGES, {"changes": known})  # first: a configuration nobody recorded would be refused
        self.write("run.toml", config)


def _refused(name: str, folder: Path, error: OSError) -> UserError:
    return UserError(f"{name} can't be written: {error.strerror}", str(folder), "check free space and permissions")


def _finite(value: Any) -> Any:
    """Return the value with every number that is not finite as None: JSON has no NaN."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _make(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=path.is_dir() and not any(path.iterdir()))
        # A folder can be made where files can't be (a full disk, an odd mount): find out now.
        probe = path / ".probe"
        probe.touch()
        probe.unlink()
    except FileExistsError:
        raise
    except OSError as error:
        raise UserError(
            f"the run directory can't be made: {error.strerror}", str(path), "choose another --out"
        ) from error
    return path


def newest(marker: str, root: Path = RUNS) -> list[Path]:
    """Return the folders under runs/ that hold the file `marker`, the one written last first."""
    files = [path for path in root.glob(f"*/{marker}") if path.is_file()]
    return [root / path.relative_to(root).parts[0] for path in sorted(files, key=_written, reverse=True)]


def _written(path: Path) -> float:
    return os.stat(path).st_mtime


def timestamp() -> str:
    """Return the time of day in UTC, for environment.json."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
