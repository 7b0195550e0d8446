"""Train every recipe of this folder: `python run.py tune`, then `python run.py`. Finished cells are skipped.

`tune` chooses the learning rate of each recipe on the validation split, with a seed that the results don't use, and
writes tuning.csv; `knn` prints what nearest neighbours reach. Without an argument, every recipe is trained with its own
best learning rate and three other seeds, and results.csv holds the test numbers. Run directories go to
runs/digits-experiment/.
"""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).parent
RUNS = Path("runs/digits-experiment")
RECIPES = ("none", "cutmix", "cosine", "paper")
LEARNING_RATES = ("5e-4", "1e-3", "2e-3", "4e-3")
TUNING_SEED, SEEDS = 0, (1, 2, 3)
COLUMNS = ["recipe", "lr", "seed", "accuracy_val", "accuracy_test", "loss_test", "similarity_first",
           "similarity_last", "seconds", "cores", "processor", "torch", "commit"]  # fmt: skip


def train(cell: tuple[str, str, int]) -> dict[str, object]:
    recipe, lr, seed = cell
    out = RUNS / f"{recipe}-lr{lr}-seed{seed}"
    if not (out / "summary.json").exists():
        start = ["--resume", str(out)]
        if not out.exists():
            start = ["--config", str(HERE / f"{recipe}.toml"), "--lr", lr, "--seed", str(seed), "--out", str(out)]
        # One thread each, as many at a time as there are cores: cells don't disturb one another.
        subprocess.run(
            [sys.executable, "-m", "pdvit", "train", "--json", *start],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    summary = json.loads((out / "summary.json").read_text())
    machine = json.loads((out / "environment.json").read_text())
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["kind"] == "eval"][-1]
    numbers = [last["accuracy"], summary["accuracy"], summary["loss"]]
    numbers += [summary["similarity_first"], summary["similarity_last"], summary["seconds"]]
    facts = [1, machine["processor"], machine["packages"]["torch"], machine["commit"]]
    rounded = [float(f"{number:.6g}") for number in numbers]
    return dict(zip(COLUMNS, [recipe, lr, seed, *rounded, *facts], strict=True))


def run_all(cells: list[tuple[str, str, int]], file: Path) -> list[dict[str, object]]:
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        rows = list(pool.map(train, cells))
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return rows


def best_rates() -> dict[str, str]:
    best: dict[str, tuple[float, float, str]] = {}
    with (HERE / "tuning.csv").open() as opened:
        for row in csv.DictReader(opened):
            found = (float(row["accuracy_val"]), -float(row["lr"]), row["lr"])  # of equals, the lower rate
            best[row["recipe"]] = max(best.get(row["recipe"], found), found)
    return {recipe: lr for recipe, (_, _, lr) in best.items()}


def nearest_neighbours() -> float:
    """Return the test accuracy of k-nearest neighbours (k = 3) on the same split: what is easy here."""
    from sklearn.neighbors import KNeighborsClassifier

    from pdvit.config.schema import DataConfig
    from pdvit.data.sources import open_source

    splits = open_source(DataConfig()).splits
    flat = {name: (split.images[:, 0].flatten(1).numpy(), split.labels.numpy()) for name, split in splits.items()}
    return float(KNeighborsClassifier(3).fit(*flat["train"]).score(*flat["test"]))


def main() -> None:
    if sys.argv[1:] == ["knn"]:
        print(f"3 nearest neighbours: test accuracy {nearest_neighbours():.1%}")
        return
    if sys.argv[1:] == ["tune"]:
        cells = [(recipe, lr, TUNING_SEED) for recipe in RECIPES for lr in LEARNING_RATES]
        for row in run_all(cells, HERE / "tuning.csv"):
            print(f"{row['recipe']:8} lr {row['lr']}  validation accuracy {row['accuracy_val']:.1%}")
        return
    rates = best_rates()
    rows = run_all([(recipe, rates[recipe], seed) for recipe in RECIPES for seed in SEEDS], HERE / "results.csv")
    for recipe in RECIPES:
        of = [row for row in rows if row["recipe"] == recipe]
        accuracy = [100 * float(row["accuracy_test"]) for row in of]
        last = [float(row["similarity_last"]) for row in of]
        print(
            f"| {recipe} | {rates[recipe]} | {mean(accuracy):.1f} ± {stdev(accuracy):.1f} "
            f"| {mean(last):.2f} ± {stdev(last):.2f} |"
        )


if __name__ == "__main__":
    main()
