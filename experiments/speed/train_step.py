"""Images per second of `pdvit train` and of timm's train.py, side by side: `python train_step.py TRAIN_PY`.

TRAIN_PY is timm's training script, which is not in its wheel. Three processes run by their usual command lines: timm,
pdvit with all three terms, pdvit without any. With --compile a fourth is pdvit with all three terms, not compiled. Each
is started and warmed up once; then they take turns: one works until its next log record, --steps steps later, while the
others are stopped (SIGSTOP, workers too); the order rotates. So no start-up, evaluation or checkpoint is in a number,
and sides are compared that ran seconds apart. The clock is this script's, not theirs. One row per round is appended to
train_step.csv. Linux only.
"""

import argparse
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from rounds import append

from pdvit.engine.device import device_name
from pdvit.models.build import FLAGS
from pdvit.tracking.environment import describe_environment

# pdvit's sides begin with their preset. The last one runs beside compiled ones.
EAGER = "paper-eager"
SIDES = {
    "timm": "timm",
    "paper": "pdvit, all three terms",
    "none": "pdvit, no terms",
    EAGER: "pdvit, all three terms, not compiled",
}
SHARED = """--model {model} --img-size {img_size} --batch-size {batch_size} --workers {workers} --device {device}
    --opt adamw --lr 1e-4 --weight-decay 0.05 --epochs 1000000 --warmup-epochs 0 --val-interval 1000000
    --log-interval {steps}"""
PDVIT = "-m pdvit train --data data --diversity {preset} --out {side} --save-every 1000000 --precision {precision}"
# With pdvit's augmentation; an empty interpolation is the model's own, as in pdvit.
TIMM = """train.py --data-dir data --val-split '' --num-classes {found} --output timm --scale 0.35 1 --color-jitter 0
    --smoothing 0 --train-interpolation '' --model-kwargs img_size={img_size}"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_py", type=Path, help="timm's train.py")
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--model-kwargs", nargs="*", default=[], metavar="K=V", help="such as depth=8 embed_dim=48")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile the models of the three sides")
    parser.add_argument("--threads", type=int, default=1, help="of a main process (default 1)")
    parser.add_argument("--workers", type=int, default=1, help="that decode for it (default 1)")
    parser.add_argument("--steps", type=int, default=4, help="in one turn (default 4)")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--data", type=Path, help="a folder with train/CLASS/ and val/CLASS/; unset: one is made")
    parser.add_argument("--classes", type=int, default=1000, help="of the folder that is made (default 1000)")
    parser.add_argument("--timm-args", default="", help="more flags for train.py, such as ' --opt-kwargs fused=True'")
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("train_step.csv"))
    return parser.parse_args()


def make_images(root: Path, size: int, classes: int, count: int) -> None:
    """Write 64 JPEG files, 2.2 by 1.7 times the input, smooth with noise on top; links make them `count`."""
    random = np.random.default_rng(0)
    width, height = round(size * 2.2), round(size * 1.7)
    (root / "jpeg").mkdir(parents=True)
    for number in range(64):
        smooth = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height))
        noisy = np.asarray(smooth, dtype=float) + random.normal(0, 8, (height, width, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / "jpeg" / f"{number}.jpg", quality=90)
    for split, total in (("train", max(count, classes)), ("val", classes)):
        for number in range(total):
            folder = root / split / f"{number % classes:04}"
            folder.mkdir(parents=True, exist_ok=True)
            os.link(root / "jpeg" / f"{number % 64}.jpg", folder / f"{number}.jpg")


def command_of(side: str, args: argparse.Namespace, found: int) -> list[str]:
    if side == "timm":
        line = " ".join([TIMM, *args.model_kwargs, args.timm_args])
        line += " --amp --amp-dtype bfloat16" * (args.precision == "bf16") + " --torchcompile" * args.compile
        line += " --pin-mem" * args.device.startswith("cuda")  # as pdvit does
    else:
        pairs = [pair.split("=", 1) for pair in args.model_kwargs]
        flags = [f"{FLAGS[k]} {v}" if k in FLAGS else f"--model-kwargs {k}={v}" for k, v in pairs]
        line = " ".join([PDVIT, *flags]) + " --compile" * (args.compile and side != EAGER)
    values = {"side": side, "preset": side.partition("-")[0], "found": found}
    return [sys.executable, *shlex.split(f"{line} {SHARED}".format(**values, **vars(args)))]


class Side:
    """A training process that works only in its turns."""

    def __init__(self, name: str, command: list[str], folder: Path, threads: int) -> None:
        self.output = folder / f"{name}.txt"
        self.records = self.output if name == "timm" else folder / name / "metrics.jsonl"
        self.step = 0
        settings = {"env": {**os.environ, "OMP_NUM_THREADS": str(threads)}, "cwd": folder, "start_new_session": True}
        with self.output.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, **settings)

    def turn(self, least: int) -> tuple[int, float, float]:
        """Work until a record `least` steps on or more; return steps, seconds, CPU seconds of the main process.

        timm writes records at the end and the beginning of an epoch too, one step apart.
        """
        start, cpu, size = self.step, self._cpu(), -1
        self.signal(signal.SIGCONT)
        begun = time.perf_counter()
        while self.step < start + least:
            time.sleep(0.004)
            if self.process.poll() is not None:
                raise SystemExit(f"{shlex.join(self.process.args)}\nended:\n{self.output.read_text()[-3000:]}")
            if self.records.exists() and self.records.stat().st_size != size:
                size = self.records.stat().st_size
                self.step = last_step(self.records.read_text())
        seconds = time.perf_counter() - begun
        self.signal(signal.SIGSTOP)
        return self.step - start, seconds, self._cpu() - cpu

    def signal(self, number: signal.Signals) -> None:
        """Signal the process and its workers."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _cpu(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def last_step(text: str) -> int:
    """Return the last step that a log, of either kind, speaks of."""
    if timm := re.findall(r"Train: (\d+) \[ *(\d+)/(\d+)", text):
        epoch, update, per_epoch = map(int, timm[-1])
        return epoch * per_epoch + update + 1
    return max(map(int, re.findall(r'"step": ?(\d+)', text)), default=0)


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """Return, for each round, images per second of every side, and its CPU milliseconds per image."""
    if args.data:
        (folder / "data").symlink_to(args.data.resolve())
    else:  # enough images that no side comes to the end of an epoch
        count = args.batch_size * args.steps * (args.rounds + 10)
        make_images(folder / "data", args.img_size, args.classes, count)
    found = sum(path.is_dir() for path in (folder / "data/train").iterdir())
    shutil.copy(args.train_py, folder / "train.py")  # away from its repository, whose timm it would import
    names = [name for name in SIDES if args.compile or name != EAGER]
    sides: dict[str, Side] = {}
    try:
        for name in names:
            sides[name] = Side(name, command_of(name, args, found), folder, args.threads)
            # Code is compiled at the first step, and again for batches that are not mixed.
            while sides[name].step <= 4 * args.steps:
                sides[name].turn(1)
        rows = []
        for number in range(args.rounds):
            row: dict[str, float] = {"round": number + 1}
            for name in [*names, *names][number % len(names) :][: len(names)]:
                steps, seconds, cpu = sides[name].turn(args.steps)
                row[name] = float(f"{steps * args.batch_size / seconds:.5g}")
                row[f"{name}_cpu_ms"] = float(f"{1000 * cpu / steps / args.batch_size:.5g}")
            rows.append(row)
            print(f"round {number + 1}: " + ", ".join(f"{name} {row[name]:.4g}" for name in names), flush=True)
        return rows
    finally:
        for side in sides.values():
            side.signal(signal.SIGKILL)
            side.process.wait()


def report(args: argparse.Namespace, rows: list[dict[str, float]]) -> None:
    """Print the table, and append the rows to the CSV file."""
    print("\n| side | images/s | ratio to timm | CPU ms per image | ratio to timm |\n|" + " --- |" * 5)
    for name in [name for name in SIDES if name in rows[0]]:
        cells = [SIDES[name]]
        for column, base in ((name, "timm"), (f"{name}_cpu_ms", "timm_cpu_ms")):
            ratios = [row[column] / row[base] for row in rows]
            cells.append(f"{median(row[column] for row in rows):.4g}")
            cells.append(f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        print(f"| {' | '.join(cells)} |")
    machine = describe_environment(device_name(torch.device(args.device)))
    facts = {name: value for name, value in vars(args).items() if name not in ("train_py", "data", "csv")}
    facts |= {"model_kwargs": " ".join(args.model_kwargs), "hardware": machine["processor"], "cores": machine["cores"]}
    facts |= {} if args.device == "cpu" else {"hardware": machine["device"]}
    facts |= {"torch": machine["packages"]["torch"], "timm_version": machine["packages"]["timm"]}
    facts |= {"train_py": hashlib.sha256(args.train_py.read_bytes()).hexdigest()[:8], "commit": machine["commit"]}
    print("\n" + ", ".join(f"{name} {value}" for name, value in facts.items() if value not in ("", False)))
    columns = [*facts, "round", *(column for name in SIDES for column in (name, f"{name}_cpu_ms"))]
    append(args.csv, columns, (facts | row for row in rows))


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # else the stopped processes would stay
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    report(args, rows)


if __name__ == "__main__":
    main()
