"""Run the evidence of a folder beside this script: `python experiments/run.py FOLDER [FILE] [words for pdvit train]`.

    python experiments/run.py ablation           # the sweep of experiments/ablation/cpu.toml
    python experiments/run.py ablation tuning    # tuning.toml: prints the best learning rates on validation
    python experiments/run.py ablation gpu --parallel 4 --set data.source=../cifar100
    python experiments/run.py ablation gpu --launcher slurm --follow --gpus 1 --time 2h

It trains the cells of the sweep, and measures P and effective rank of every layer of each finished one on 256 images of
the split that the run ended with: with its final weights and with those that it began from. Then it writes
FOLDER/results.csv, one row per cell, and FOLDER/layers.csv, one row per cell and layer (results-gpu.csv and
layers-gpu.csv of gpu.toml; of tuning.toml tuning.csv alone, and of a segmentation its results: nothing else is
measured). README.md tells the columns. Where words change the recipe, or some cells have not ended, the tables lie in
the folder of the sweep.

What is finished is skipped: the same command goes on, also after Ctrl-C (status 75). One cell runs at a time on each
GPU, or as many as --parallel says; without a GPU as many as there are cores in all, with one thread each.
CUDA_VISIBLE_DEVICES= hides the GPUs. With --launcher slurm the cells are jobs, and --follow waits for them. The exit
status is that of pdvit train, or 1 where a finished run could not be measured.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
from tables import ENDED, LAYERS, NUMBERS, best_rates, cells_of, layers_of, write_table

from pdvit import analyze
from pdvit.config import build, read_toml
from pdvit.config.schema import KEYS
from pdvit.data.loader import eval_batches
from pdvit.data.sources.split import subsample
from pdvit.engine.device import visible_gpus
from pdvit.engine.terminal import EXIT_STOPPED, StopRequest, stop_on_signals
from pdvit.errors import UserError
from pdvit.launch import Jobs
from pdvit.models.loading import load_model
from pdvit.models.resolved_checkpoint import resolve_checkpoint
from pdvit.sweep import Folder
from pdvit.tracking.run_directory import write_file
from pdvit.workflows.console import make_console
from pdvit.workflows.runs import build_trainer

HERE = Path(__file__).parent
IMAGES = 256


def train(line: Sequence[str], stop: StopRequest) -> int:
    """Run the command; return its exit status. A stop is handed on: the cells finish their steps and save."""
    process = subprocess.Popen(line, process_group=0)  # a terminal's Ctrl-C reaches this process alone
    while process.poll() is None:
        time.sleep(0.2)
        if stop:
            process.terminate()
            return process.wait()
    return process.returncode


def measure(run: Path) -> str | None:
    """Write what every layer of a finished run is like, after training and before; return why that can't be.

    Of a run that ended with a loss that is not finite there is nothing to measure after training.
    """
    try:
        sound = json.loads((run / "summary.json").read_text())["loss"] is not None
        with redirect_stderr(io.StringIO()):  # it would say what it prepares
            began = build_trainer(build(("run.toml", read_toml(run / "run.toml"))), make_console(as_json=True)).task
        chosen = subsample(began.source.splits[began.source.final_split], IMAGES)
        images = torch.cat([batch.images for batch in eval_batches(chosen, began.loader)])
        models = {"after": load_model(resolve_checkpoint(run)).model.to(began.device)} if sound else {}
        parts = []
        for when, model in (models | {"before": began.module.inside}).items():
            table = analyze(model, images, ["similarity", "rank"]).table
            wide = table.pivot(index=["depth", "layer"], columns="metric", values="mean").reset_index()
            parts.append(wide[["layer", "depth", *NUMBERS]].assign(when=when))
        write_file(run / LAYERS, pd.concat(parts).to_csv(index=False))
    except UserError as error:
        return error.what
    return None


def measure_all(runs: Sequence[Path], count: int, stop: StopRequest) -> bool:
    """Measure so many runs at a time; tell whether all could be."""
    done = True
    ignore = (signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the workers too
    with ProcessPoolExecutor(count, get_context("spawn"), signal.signal, ignore) as pool:
        for number, (run, trouble) in enumerate(zip(runs, pool.map(measure, runs), strict=True), 1):
            print(f"layers {number} of {len(runs)}: {run.name}{': not measured: ' if trouble else ''}{trouble or ''}")
            done &= trouble is None
            if stop:
                pool.shutdown(cancel_futures=True)
                return False
    return done


def run(kind: str, folder: Path, words: Sequence[str], stop: StopRequest) -> int:
    """Train, measure and write the tables of one sweep; return the exit status."""
    line = [sys.executable, "-m", "pdvit", "train", "--config", str(folder / f"{kind}.toml"), *words]
    if {"list", "--help"} & {*words}:
        return subprocess.run(line).returncode
    listed = subprocess.run([*line, "--cells", "list", "--json"], stdout=subprocess.PIPE, text=True)
    if listed.returncode:
        return listed.returncode
    sweep, given = Path(json.loads(listed.stdout)["sweep"]), dict(pairwise(words))
    at_once = int(given.get("--parallel", 1))
    if not visible_gpus() and "--launcher" not in given:
        os.environ["OMP_NUM_THREADS"] = "1"
        at_once = int(given.get("--parallel", len(os.sched_getaffinity(0))))
        line += ["--parallel", str(at_once)]
    status = train(line, stop)
    if stop or status not in (0, 1, EXIT_STOPPED):
        return status or EXIT_STOPPED
    states = Folder(sweep).write_table(Jobs(sweep).states())
    finished = [cell for cell, state in states if state.status == "finished"]
    # Of pixels mIoU is the measure: the backbones' layers are in the tables of the runs that made them.
    measured = [sweep / cell.name for cell in finished if "tuning" not in kind and cell.config.segment.head is None]
    todo = [run for run in measured if not (run / LAYERS).is_file()]
    if todo and not measure_all(todo, at_once, stop):
        status = EXIT_STOPPED if stop else status or 1
    whole = all(state.status in ENDED for _, state in states)
    write(kind, folder if whole and same(words) else sweep, sweep)
    return status


def same(words: Sequence[str]) -> bool:
    """Tell whether the recipe was run as it is: where the images are and where it runs changes nothing of it."""
    flags = {flag for key in KEYS.values() if key.section == "launch" for flag in key.flags}
    pairs = zip(["", *words], [*words, ""], strict=True)
    rest = [word for before, word in pairs if word and not {before, word} & {*flags, "--follow"}]
    return not rest or (len(rest) == 2 and rest[1].startswith("data.source="))


def write(kind: str, folder: Path, sweep: Path) -> None:
    """Write the tables, or of a tuning the one table, into a folder, and print what it chose."""
    cells, end = cells_of(sweep), "" if kind == "cpu" else f"-{kind}"
    if "tuning" not in kind:
        write_table(folder / f"results{end}.csv", cells)
        if layers := list(layers_of(sweep, cells)):
            write_table(folder / f"layers{end}.csv", layers)
        return
    write_table(folder / f"{kind}.csv", cells)
    for setting, (rate, score, edge) in best_rates(cells).items():
        print(f'"optim.lr" = {rate:g}  # {setting}: {score:.4f} on validation{", at the edge" if edge else ""}')


def understand(words: Sequence[str]) -> tuple[str, str, list[str]]:
    """Return folder, file and the words for pdvit train; ValueError where there is no folder."""
    folder, *rest = words
    if folder.startswith("-"):
        raise ValueError(folder)
    kind = rest.pop(0) if rest and not rest[0].startswith("-") else "cpu"
    return folder, kind, rest


def main() -> int:
    try:
        folder, kind, words = understand(sys.argv[1:])
    except ValueError:
        print(__doc__)
        return 2
    if not (HERE / folder / f"{kind}.toml").is_file():
        there = ", ".join(file.stem for file in sorted((HERE / folder).glob("*.toml")))
        folders = ", ".join(sorted({file.parent.name for file in HERE.glob("*/cpu.toml")}))
        print(f"{folder} has no {kind}.toml: {f'it has {there}' if there else f'folders are for example {folders}'}")
        return 2
    with stop_on_signals() as stop:
        try:
            return run(kind, HERE / folder, words, stop)
        except UserError as error:
            print(error, file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
