"""Seconds until the first step and the first table: `python start.py`.

Each round starts `pdvit train` on the digits, and `pdvit analyze` of a run, in new processes: the time from the command
to its first line, to the first step (its record in metrics.jsonl), to the table, and to the end. The run of `analyze`
and a first start of each, which fills the disk's cache, are not counted. Imports are those of `python -X importtime`,
once for each command: the packages that take most, each with what only it imports. One row per round is appended to
start.csv.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from rounds import append

from pdvit.tracking.environment import describe_environment

PDVIT = ["-m", "pdvit"]
TRAIN = [*PDVIT, "train", "--log-interval", "1st", "--out"]
DEAREST = 5
LINE = re.compile(r"import time: +(\d+) \| +(\d+) \| ( *)(\S+)")
COLUMNS = ("train_line", "train_step", "train_end", "analyze_line", "analyze_table", "analyze_end")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"))
    return parser.parse_args()


class Command:
    """A command, and the seconds to each line of its output."""

    def __init__(self, words: list[str], folder: Path, threads: int) -> None:
        settings: dict[str, Any] = {"cwd": folder, "env": os.environ | {"OMP_NUM_THREADS": str(threads)}, "text": True}
        self.begun, self.lines = time.perf_counter(), list[tuple[float, str]]()
        self.process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, **settings)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((self.seconds(), line))

    def seconds(self) -> float:
        return time.perf_counter() - self.begun

    def until(self, text: str) -> float:
        """Return the seconds to the first line that begins so."""
        return next(seconds for seconds, line in self.lines if line.startswith(text))

    def end(self) -> float:
        if self.process.wait():
            raise SystemExit("".join(line for _, line in self.lines))
        self.reader.join()
        return self.seconds()


def one_round(folder: Path, number: int, threads: int) -> dict[str, float]:
    run = folder / f"run{number}"
    train = Command([*TRAIN, run.name, "--epochs", "3st"], folder, threads)
    records = run / "metrics.jsonl"
    while train.process.poll() is None and not (records.exists() and records.stat().st_size):
        time.sleep(0.002)
    found = {"train_step": train.seconds(), "train_end": train.end(), "train_line": train.until("opening")}
    analyze = Command([*PDVIT, "analyze", run.name], folder, threads)
    found |= {"analyze_end": analyze.end(), "analyze_line": analyze.until("opening")}
    found["analyze_table"] = analyze.until("layer")
    return {"round": number, **{name: float(f"{found[name]:.4g}") for name in COLUMNS}}


def imports(words: list[str], folder: Path) -> tuple[float, Counter[str]]:
    """Return the seconds of all imports of a command, and of each package those of its own modules."""
    done = subprocess.run([sys.executable, "-X", "importtime", *words], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    packages = Counter[str]()
    for own, _, _, name in LINE.findall(done.stderr):
        packages[name.partition(".")[0]] += int(own)
    return packages.total() / 1e6, packages


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        rows = [one_round(folder, number, args.threads) for number in range(args.rounds + 1)][1:]
        print("| seconds from the command to | median (minimum to maximum) |\n| --- | --- |")
        for name in COLUMNS:
            values = [row[name] for row in rows]
            print(f"| {name.replace('_', ': ')} | {median(values):.3g} ({min(values):.3g} to {max(values):.3g}) |")
        print("\n| imports | seconds | dearest packages, by their own modules |\n|" + " --- |" * 3)
        for words in ([*TRAIN, "imports", "--epochs", "1st"], [*PDVIT, "analyze", "run0"]):
            total, packages = imports(words, folder)
            dearest = ", ".join(f"{name} {own / 1e6:.2f}" for name, own in packages.most_common(DEAREST))
            print(f"| pdvit {words[2]} | {total:.2f} | {dearest} |")
    machine = describe_environment("cpu")
    facts: dict[str, Any] = {"threads": args.threads, "hardware": machine["processor"], "cores": machine["cores"]}
    facts |= {"python": machine["python"], "torch": machine["packages"]["torch"], "commit": machine["commit"]}
    print("\n" + ", ".join(f"{name} {value}" for name, value in facts.items()))
    append(args.csv, [*facts, *rows[0]], (facts | row for row in rows))


if __name__ == "__main__":
    main()
