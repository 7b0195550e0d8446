import html
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from pdvit.cli import run as pdvit
from pdvit.plots.style import DARK
from tests.cli.conftest import CPU

LAYERS, P = ["embed", "block 1", "norm"], [0.2, 0.4, 0.6]


@pytest.fixture
def analyses(workplace, analysis_table):
    """Return a function that makes run directories with an analysis each."""

    def make(**runs: list[float]) -> list[str]:
        for age, (name, values) in enumerate(runs.items()):
            folder = workplace / "runs" / name
            folder.mkdir(parents=True)
            analysis_table(values).to_csv(folder / "analysis.csv", index=False)
            os.utime(folder / "analysis.csv", (1e9 - age, 1e9 - age))
        return [f"runs/{name}" for name in runs]

    return make


@pytest.fixture
def trainings(workplace, digits_run):
    """Return a function that makes run directories with the records of a training each."""

    def make(*names: str) -> list[str]:
        for name in names:
            (workplace / "runs" / name).mkdir(parents=True)
            shutil.copy(digits_run / "metrics.jsonl", workplace / "runs" / name)
        return [f"runs/{name}" for name in names]

    return make


def draw(capsys, *arguments: object) -> str:
    """Draw figure.svg and return its text."""
    assert pdvit(["plot", *map(str, arguments), "--out", "figure.svg"]) == 0
    assert capsys.readouterr() == ("figure.svg\n", "")
    return html.unescape(Path("figure.svg").read_text(encoding="utf-8"))


def test_a_real_run_is_drawn(run_copy, workplace, capsys):
    assert pdvit(["analyze", str(run_copy), "--limit", "8", "--device", "cpu"]) == 0
    capsys.readouterr()
    for figure in ("similarity", "training"):
        assert pdvit(["plot", figure, str(run_copy)]) == 0
        assert capsys.readouterr().out == f"figures/{figure}-copied.png\n"
        with Image.open(f"figures/{figure}-copied.png") as image:
            assert image.width > 1000


def test_without_arguments_the_newest_runs_are_drawn(analyses, trainings, capsys):
    analyses(**{f"run-{number}": P for number in range(8)})
    shown = draw(capsys, "similarity")
    assert [number for number in range(8) if f"run-{number}" in shown] == [0, 1, 2, 3, 4, 5]
    for age, run in enumerate(trainings("new", "old")):
        os.utime(f"{run}/metrics.jsonl", (1e9 - age, 1e9 - age))
    assert pdvit(["plot", "training"]) == 0
    assert capsys.readouterr().out == "figures/training-new.png\n"


def test_many_runs_of_different_depths_and_long_names_are_drawn(analyses, capsys):
    folders = analyses(**{f"run-{'very-' * 24}long-{depth}": [0.3] * depth for depth in range(3, 15)})
    assert pdvit(["plot", "similarity", *folders]) == 0
    file = Path(capsys.readouterr().out.rstrip("\n"))
    assert pd.read_csv(file.with_suffix(".csv"))["run"].nunique() == 12


def test_figures_of_long_names_that_differ_at_the_end_do_not_replace_one_another(analyses, capsys):
    folders = analyses(**{f"{'very-' * 24}long-{depth}": [0.3] * depth for depth in (3, 4)})
    assert [pdvit(["plot", "similarity", folder]) for folder in folders] == [0, 0]
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [pd.read_csv(file.with_suffix(".csv"))["run"].nunique() for file in {*files}] == [1, 1]


def test_maps_are_drawn_for_the_patches_that_are_named(workplace, analysis_folder, capsys):
    analysis_folder(workplace / "runs" / "one")
    assert "dog.png" in draw(capsys, "maps", "--image", "1", "--patch", "0,3", "--patch", "2,2")
    assert set(pd.read_csv("figure.csv")["patch"]) == {"0,3", "2,2"}


SWEEP = """cell,variant,diversity.preset,run.seed,status,seconds,accuracy,similarity_last
0,,none,0,finished,9,0.50,0.9
1,,none,1,finished,9,0.60,0.8
2,,paper,0,finished,9,0.70,0.3
3,,paper,1,failed,,,
"""


@pytest.fixture
def sweep(workplace) -> str:
    (workplace / "sweep").mkdir()
    (workplace / "sweep" / "cells.csv").write_text(SWEEP)
    return "sweep"


def test_a_sweep_is_a_table_in_the_terminal_and_in_three_files(sweep, capsys):
    assert pdvit(["plot", "sweep", sweep, "--out", "ablation.pdf"]) == 0
    shown = capsys.readouterr().out
    assert "55.0 ± 7.1" in shown
    assert "+20.0" in shown
    assert "1 of 4 cells are not in these numbers: cell 3 (failed)" in shown
    assert shown.endswith("ablation.pdf\n")
    assert Path("ablation.pdf").read_bytes().startswith(b"%PDF")
    assert pd.read_csv("ablation.csv")["mean"].tolist() == pytest.approx([0.55, 0.7])
    assert Path("ablation.md").read_text(encoding="utf-8").startswith("| diversity.preset | n |")
    named = ["--metric", "similarity_last", "--baseline", "diversity.preset=paper"]
    assert pdvit(["plot", "sweep", sweep, *named]) == 0
    table = pd.read_csv("figures/sweep-sweep.csv").set_index("setting")
    assert table.loc["none", "difference"] == pytest.approx(0.6)


def test_a_file_of_cells_is_a_sweep_too_and_its_figure_is_named_after_the_folder(sweep, capsys):
    file = Path(sweep, "cells.csv").rename(Path(sweep, "results.csv"))
    for heading in ("diversity.preset", "model.name"):  # a page with another heading is replaced
        file.write_text(SWEEP.replace("diversity.preset", heading))
        assert pdvit(["plot", "sweep", str(file)]) == 0
        assert capsys.readouterr().out.endswith("figures/sweep-sweep-results.png\n")
    Path("figures", "sweep-sweep-results.md").write_text("# Mine")
    assert pdvit(["plot", "sweep", str(file)]) == 2
    assert "sweep-sweep-results.md exists" in capsys.readouterr().err


def test_labels_replace_names_and_no_title_leaves_what_tells_panels_apart(analyses, trainings, capsys, refusal):
    runs = analyses(one=P, two=P)
    assert "P by layer" in draw(capsys, "similarity", *runs, "--labels", "$x$,plain model")
    assert set(pd.read_csv("figure.csv")["run"]) == {"$x$", "plain model"}
    for figure, title, shown in (("similarity", "P by layer", False), ("compare", "P of two", True)):
        assert (title in draw(capsys, figure, *runs, "--no-title")) == shown
    assert "mine" in draw(capsys, "training", *trainings("three"), "--labels", "mine")
    assert "1 and 2" in refusal("plot", "similarity", *runs, "--labels", "one").what


def test_runs_of_one_name_are_told_apart_by_their_folders(workplace, analysis_table, capsys):
    for place in ("a", "b"):
        Path(place, "run").mkdir(parents=True)
        analysis_table(P).to_csv(f"{place}/run/analysis.csv", index=False)
    shown = draw(capsys, "similarity", "a/run", "b/run", "a/run")
    names = {"a/run", "b/run", "a/run (2)"}
    assert all(name in shown for name in names)
    assert set(pd.read_csv("figure.csv")["run"]) == names


def test_the_numbers_of_a_figure_go_beside_it_and_both_replace_those_before(analyses, capsys):
    (run,), before = analyses(one=P), plt.get_fignums()
    Path("figure.svg").write_text("old")
    for flags in ([], ["--dark"]):
        assert (DARK.paper in draw(capsys, "similarity", run, *flags)) == bool(flags)
    assert plt.get_fignums() == before
    table = pd.read_csv("figure.csv")
    assert table["mean"].tolist() == P
    assert table["layer"].tolist() == LAYERS
    assert table["run"].unique().tolist() == ["one"]


def test_names_are_drawn_as_they_are(analyses, capsys):
    names = ["$price_1^2$", "a&b<c>", "münchen_run", "100%_{x}", "_hidden", "caf\udce9"]
    shown = draw(capsys, "similarity", *analyses(**dict.fromkeys(names, P)))
    assert all(name.replace("\udce9", "?") in shown for name in names)


class TestRefused:
    @pytest.mark.parametrize("patch", ["3", "a,b", "1,2,3", "99,0"])
    def test_a_patch_that_is_none(self, refusal, workplace, analysis_folder, patch):
        analysis_folder(workplace / "runs" / "one")
        assert refusal("plot", "maps", "--patch", patch).where == "--patch"
        for figure in ("maps", "cka"):  # incomplete arrays
            np.savez(f"runs/one/analysis/{figure}.npz", names=["ant.png"], layers=["embed"], matrix=np.ones((2, 3)))
            assert "do not fit the figure" in refusal("plot", figure).what

    def test_a_sweep_without_cells_and_a_comparison_of_one(self, refusal, workplace):
        Path("empty").mkdir()
        assert "cells.csv" in refusal("plot", "sweep", "empty").tip
        assert "absent" in refusal("plot", "sweep", "absent").where
        assert "two run directories" in refusal("plot", "compare", "one").tip

    def test_data_never_replace_another_table(self, refusal, analyses):
        (run,) = analyses(one=P)
        before = Path(run, "analysis.csv").read_bytes()
        assert "analysis.csv" in refusal("plot", "similarity", run, "--out", f"{run}/analysis.png").where
        assert Path(run, "analysis.csv").read_bytes() == before
        assert not Path(run, "analysis.png").exists()
        refusal("plot", "similarity", run, "--out", f"{run}/analysis.csv/figure.png")  # below a file

    def test_a_run_that_is_not_there(self, refusal, workplace):
        assert "pdvit train" in refusal("plot", "training").tip
        assert "absent" in refusal("plot", "similarity", "absent").where
        (workplace / "weights").mkdir()
        for figure in ("training", "confusion", "segmentation", "similarity", "maps"):
            refusal("plot", figure, "weights", what="is no run", tip="train one")
        (workplace / "weights" / "config.json").touch()  # of a checkpoint, which has no training
        refusal("plot", "similarity", "weights", tip="pdvit analyze weights")

    @pytest.mark.parametrize("out", ["figure.gif", "figure", "figure.pn"])
    def test_an_unknown_suffix(self, refusal, workplace, out):
        assert ".png" in refusal("plot", "similarity", "--out", out).tip


def test_the_tip_for_a_missing_figure_measures_the_same_images_and_keeps_the_other_figures(
    workplace, run_copy, image_folder, capsys, refusal
):
    images = image_folder / "train" / "blue"
    (images / "a broken one.png").write_bytes(b"no image")
    some = ["--images", str(images), "--limit", "8", "--on-bad-image", "skip"]
    some += ["--batch-size", "4", "--metrics", "similarity,norms,cka"]  # cka depends on the batch
    assert pdvit(["analyze", str(run_copy), *some, "--explore", *CPU]) == 0
    before = pd.read_csv(run_copy / "analysis.csv")
    tip = refusal("plot", "pairs", str(run_copy)).tip
    assert pdvit([*shlex.split(tip)[3:], *CPU]) == 0
    after = pd.read_csv(run_copy / "analysis.csv")
    pd.testing.assert_frame_equal(after[after["metric"].isin(before["metric"])].reset_index(drop=True), before)
    capsys.readouterr()
    assert [pdvit(["plot", figure, str(run_copy)]) for figure in ("pairs", "similarity", "maps")] == [0, 0, 0]
