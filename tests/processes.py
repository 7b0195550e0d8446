"""Commands in processes of their own."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = 500.0  # seconds
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
# pdvit with a signal, its first argument, while torch is imported.
EARLY = """
import os, sys
number = int(sys.argv.pop(1))
class Early:
    def find_spec(self, name, *_):
        if name == "torch":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), number)
sys.meta_path.insert(0, Early())
from pdvit.__main__ import main
main()
"""


def start(*words: object, **options: Any) -> subprocess.Popen[str]:
    """Start `pdvit`; `options` are those of Popen."""
    line = [sys.executable, "-m", "pdvit", *map(str, words)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    """Wait for the end of a process, and return what it printed."""
    shown = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == status, shown
    return shown


def wait(condition: Callable[[], object], what: object) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@contextmanager
def held_elsewhere(run: Path) -> Iterator[None]:
    """Another process trains the run."""
    code = "import sys; from pathlib import Path; from pdvit.tracking.run_directory import RunDirectory\n"
    code += "with RunDirectory(Path(sys.argv[1])).locked(): print(flush=True); input()"
    command, pipe = [sys.executable, "-c", code, str(run)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        process.stdout.readline()
        yield
        process.communicate("\n")
