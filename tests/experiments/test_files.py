"""Every sweep of experiments holds; those for a GPU are tried at a tiny size. unit/test_recipes has the recipes."""

import shutil
import tomllib
from collections import defaultdict
from itertools import chain
from pathlib import Path

import pytest

from pdvit.cli import run as pdvit
from pdvit.sweep import make_cells
from tests.files import read_csv

FOLDER = Path(__file__).parents[2] / "experiments"
FILES = [file for file in sorted(FOLDER.glob("*/*.toml")) if file.parent.name != "recipes"]  # of one run each
# Sweeps of which each variant has the rate, or one of its rates, that a table of tuning says.
RATES = {f"{name}/cpu": f"{name}/tuning" for name in ("ablation", "digits", "remedies")}
RATES |= {"transfer/pretrain": "ablation/tuning"}
RATES |= {f"lasting/{name}": f"lasting/{name}-tuning" for name in ("deep", "complete")}
# The recipes for a GPU, in the order of their chains, and what makes them small.
CHAINS = (["ablation/gpu-tuning"], ["depth/gpu"], ["remedies/gpu"], ["ablation/gpu", "transfer/gpu"])
CHAINS += (["segmentation/gpu-backbones", "segmentation/gpu"],)
SHORT = ["--epochs", "2st", "--warmup-epochs", "1st", "--batch-size", "4", "--workers", "0", "--device", "cpu"]
SMALL = ["--set", "segment.crop=64", "--set", "segment.short_side=72"]


def cells_of(file: Path):
    base = tomllib.loads(file.read_text(encoding="utf-8"))
    return make_cells(base, base.pop("sweep"), str(file))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_file_can_be_run(file):
    cells = cells_of(file)  # checks every configuration
    assert all("run.seed" in cell.values for cell in cells)


def test_no_tuning_and_no_recipe_for_a_gpu_is_forgotten():
    assert {f"{file.parent.name}/{file.stem}" for file in FOLDER.glob("*/*tuning.csv")} <= set(RATES.values())
    assert {f"{file.parent.name}/{file.stem}" for file in FOLDER.glob("*/gpu*.toml")} == {*chain(*CHAINS)}


def best_of(file: Path) -> dict[str, set[float]]:
    """The rates of each variant with the highest validation accuracy."""
    found = defaultdict(lambda: defaultdict(set))
    for row in read_csv(file):
        if row["status"] == "finished":
            found[row["variant"]][float(row["accuracy_val"])].add(float(row["optim.lr"]))
    return {variant: rates[max(rates)] for variant, rates in found.items()}


@pytest.mark.parametrize(("file", "tuning"), RATES.items())
def test_every_variant_has_its_best_rate_on_validation(file, tuning):
    rates = defaultdict(set)
    for cell in cells_of(FOLDER / f"{file}.toml"):
        rates[cell.variant].add(cell.config.optim.lr)
    best = best_of(FOLDER / f"{tuning}.csv")
    assert not {variant for variant in rates if not rates[variant] & best[variant]}


def first_cells(file: Path) -> list[int]:
    """Numbers of the cells with the first seed and the first learning rate."""
    cells = cells_of(file)
    values = [{key: cell.values[key] for key in ("run.seed", "optim.lr") if key in cell.values} for cell in cells]
    return [number for number, found in enumerate(values, 1) if found == values[0]]


@pytest.mark.slow
@pytest.mark.parametrize("files", CHAINS, ids=lambda files: files[0].replace("/", "-"))
def test_every_setting_for_a_gpu_takes_two_steps(workplace, image_folder, mask_folder, files):
    for name in ("cifar100", "tiny-imagenet-50"):
        shutil.copytree(image_folder, workplace / "data" / name)
    shutil.copytree(mask_folder, workplace / "data" / "camvid")
    for name in files:
        file = FOLDER / f"{name}.toml"
        cells = ",".join(map(str, first_cells(file)))
        more = SMALL if name == "segmentation/gpu" else []
        assert pdvit(["train", "--config", str(file), "--cells", cells, *SHORT, *more]) == 0, name
        rows = read_csv(workplace / "runs" / name.replace("/", "-") / "cells.csv")
        assert {row["variant"] for row in rows if row["status"] == "finished"} == {row["variant"] for row in rows}
