"""Every file of experiments is a configuration or a sweep that holds; nothing is trained here."""

import csv
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

from pdvit.config import build, resolve
from pdvit.sweep import make_cells, split

FOLDER = Path(__file__).parents[2] / "experiments"
FILES = sorted(FOLDER.glob("*/*.toml"))
RECIPES = ("digits", "recipes")  # of one run each


def cells_of(file: Path):
    base, table = split(tomllib.loads(file.read_text(encoding="utf-8")), str(file))
    return make_cells(base, table, str(file))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_file_can_be_run(file):
    if file.parent.name in RECIPES:
        resolve(build((str(file), tomllib.loads(file.read_text(encoding="utf-8")))))
        return
    cells = cells_of(file)  # checks every configuration
    assert all("run.seed" in cell.values for cell in cells)


def test_no_two_sweeps_share_a_folder():
    sweeps = [tomllib.loads(file.read_text(encoding="utf-8")) for file in FILES if file.parent.name not in RECIPES]
    names = [sweep["run"]["name"] for sweep in sweeps]
    assert len(names) == len(set(names))


def best_of(file: Path) -> dict[str, float]:
    """The rate of each variant with the highest validation accuracy, the lower one of equals."""
    found = defaultdict(list)
    for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines()):
        if row["status"] == "finished":
            found[row["variant"]].append((-float(row["accuracy_val"]), float(row["optim.lr"])))
    return {variant: min(rows)[1] for variant, rows in found.items()}


def check_rates(folder: Path, shared: Path) -> int:
    """Compare the rates of cpu.toml with the folder's tuning.csv, or with a shared one what is trained alike."""
    own, checked = (folder / "tuning.csv").is_file(), 0
    tuning = folder / "tuning.csv" if own else shared
    best = best_of(tuning) if tuning.is_file() else {}
    for cell in cells_of(folder / "cpu.toml"):
        other = cell.config.model.init is not None or cell.config.segment.head is not None
        if cell.variant in best and "optim.lr" not in cell.values and (own or not other):
            assert cell.config.optim.lr == best[cell.variant], cell.name
            checked += 1
    return checked


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*/cpu.toml")), ids=lambda file: file.parent.name)
def test_every_variant_has_its_best_rate_on_validation(file):
    check_rates(file.parent, FOLDER / "ablation" / "tuning.csv")


@pytest.mark.parametrize(("rate", "sound"), [("1e-3", True), ("2e-3", False)])
def test_a_rate_that_is_not_the_best_is_found(tmp_path, rate, sound):
    (tmp_path / "cpu.toml").write_text(f'[sweep]\n"run.seed" = [1]\n[[sweep.variant]]\nname = "a"\n"optim.lr" = {rate}')
    lines = ["variant,optim.lr,status,accuracy_val", "a,0.002,finished,0.5", "a,0.001,finished,0.5", "a,0.004,failed,"]
    (tmp_path / "tuning.csv").write_text("\n".join(lines))
    if sound:
        assert check_rates(tmp_path, tmp_path / "none.csv") == 1
    else:
        with pytest.raises(AssertionError, match="a-seed=1"):
            check_rates(tmp_path, tmp_path / "none.csv")
