import html
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from pdvit.cli import run as pdvit
from pdvit.cli.plot import FIGURES

SIGNATURES = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
LAYERS, P = ["embed", "block 1", "norm"], [0.2, 0.4, 0.6]
HEAD = b"model,layer,depth,metric,mean,std,ci95,images,tokens\n"


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
def trainings(workplace):
    """Return a function that makes run directories with the records of a training each."""

    def make(*names: str, epochs: int = 3, terms: tuple[str, ...] = ("cosine", "mixing")) -> list[str]:
        for name in names:
            folder = workplace / "runs" / name
            folder.mkdir(parents=True)
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines(epochs, terms)))
        return [f"runs/{name}" for name in names]

    return make


def lines(epochs: int, terms: tuple[str, ...]):
    for epoch in range(1, epochs + 1):
        at = {"step": 5 * epoch, "epoch": epoch}
        yield {"kind": "train", **at, "loss": 3 / epoch, "class": 2 / epoch, **dict.fromkeys(terms, 1 / epoch)}
        yield {"kind": "eval", **at, "accuracy": 1 - 1 / (epoch + 1), "loss": 1.0}
        yield {"kind": "similarity", **at, "layers": LAYERS, "similarity": [0.1 * epoch, 0.2, 0.3]}


def drawn(capsys) -> Path:
    """Return the file whose name is the only thing that was printed."""
    shown = capsys.readouterr()
    assert shown.err == ""
    return Path(shown.out.removesuffix("\n"))


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@pytest.mark.parametrize(("figure", "suffix"), [("similarity", "svg"), ("similarity", "pdf"), ("training", "png")])
def test_the_suffix_decides_the_format(analyses, trainings, capsys, figure, suffix):
    run = analyses(one=P)[0] if figure == "similarity" else trainings("one")[0]
    assert pdvit(["plot", figure, run, "--out", f"deep/figure.{suffix}"]) == 0
    file = drawn(capsys)
    assert file == Path(f"deep/figure.{suffix}")
    assert file.read_bytes().startswith(SIGNATURES[suffix])
    assert sorted(path.name for path in file.parent.iterdir()) == sorted(["figure.csv", file.name])


def test_a_real_run_is_drawn(run_copy, workplace, capsys):
    assert pdvit(["analyze", str(run_copy), "--limit", "8", "--device", "cpu"]) == 0
    capsys.readouterr()
    for figure in ("similarity", "training"):
        assert pdvit(["plot", figure, str(run_copy)]) == 0
        file = drawn(capsys)
        assert file == Path(f"figures/{figure}-copied.png")
        with Image.open(file) as image:
            assert image.width > 1000


def test_without_arguments_the_newest_runs_are_drawn(analyses, trainings, capsys):
    analyses(**{f"run-{number}": P for number in range(8)})
    assert pdvit(["plot", "similarity", "--out", "figure.svg"]) == 0
    shown = text_of(drawn(capsys))
    assert [number for number in range(8) if f"run-{number}" in shown] == [0, 1, 2, 3, 4, 5]
    for age, run in enumerate(trainings("new", "old")):
        os.utime(f"{run}/metrics.jsonl", (1e9 - age, 1e9 - age))
    assert pdvit(["plot", "training"]) == 0
    assert drawn(capsys) == Path("figures/training-new.png")


def test_terms_that_were_off_unfinished_lines_and_losses_without_a_number_are_left_out(trainings, capsys):
    (run,) = trainings("one", terms=("cosine",))
    with Path(run, "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 16, "epoch": 3.2, "loss": null, "class": null, "cosine": 0.1}\n')
        file.write('{"kind": "train", "st')
    assert pdvit(["plot", "training", run, "--out", "figure.svg"]) == 0
    shown = text_of(drawn(capsys))
    assert "cosine" in shown
    assert "mixing" not in shown


def test_many_runs_of_different_depths_and_long_names_are_drawn(analyses, capsys):
    folders = analyses(**{f"run-{'very-' * 24}long-{depth}": [0.3] * depth for depth in range(3, 15)})
    assert pdvit(["plot", "similarity", *folders, "--out", "figure.svg"]) == 0
    shown = text_of(drawn(capsys))
    assert all(f"-{depth}" in shown and "…" in shown for depth in range(3, 15))
    assert pdvit(["plot", "similarity", *folders]) == 0  # the name of the file is not too long
    assert drawn(capsys).is_file()


@pytest.mark.parametrize("figure", [name for name in FIGURES if name not in ("similarity", "compare")])
def test_a_figure_is_drawn_from_an_analysis(workplace, analysis_folder, capsys, figure):
    """All runs by name; without names, the newest that have the data."""
    for name in ("one", "two"):
        analysis_folder(workplace / "runs" / name)
    assert pdvit(["plot", figure, "runs/one", "runs/two", "--out", "figure.svg"]) == 0
    shown = text_of(drawn(capsys))
    assert all(name in shown for name in ("one", "two"))
    if figure == "cka":
        assert pdvit(["plot", figure, "--dark"]) == 0
        assert drawn(capsys).name in (f"{figure}-one-two.png", f"{figure}-two-one.png")


def test_maps_are_drawn_for_the_patches_that_are_named(workplace, analysis_folder, capsys):
    analysis_folder(workplace / "runs" / "one")
    arguments = ["plot", "maps", "--image", "1", "--patch", "0,3", "--patch", "2,2", "--out", "figure.svg"]
    assert pdvit(arguments) == 0
    assert "dog.png" in text_of(drawn(capsys))
    assert set(pd.read_csv("figure.csv")["patch"]) == {"0,3", "2,2"}


def test_two_checkpoints_are_compared(analyses, capsys):
    assert pdvit(["plot", "compare", *analyses(one=P, two=[0.1, 0.2, 0.2])]) == 0
    file = drawn(capsys)
    assert file == Path("figures/compare-one-two.png")
    apart = pd.read_csv(file.with_suffix(".csv")).query("run == 'difference'")
    assert apart["mean"].tolist() == pytest.approx([-0.1, -0.2, -0.4])


def test_cka_between_models_is_drawn_where_it_was_measured(workplace, analysis_folder, capsys):
    folder = analysis_folder(workplace / "runs" / "one")
    layers = np.array(["embed", "block 1"])
    arrays = {"matrix/other": np.eye(2), "layers/other": layers, "layers": layers}
    np.savez(folder / "analysis" / "cka_between.npz", **arrays)
    assert pdvit(["plot", "cka", "--out", "figure.svg"]) == 0
    assert "one (up), other" in text_of(drawn(capsys))


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
    table = pd.read_csv("ablation.csv")
    assert table["mean"].tolist() == pytest.approx([0.55, 0.7])
    assert table["left_out"].tolist() == [0, 1]
    assert text_of(Path("ablation.md")).startswith("| diversity.preset | n |")


def test_a_file_of_cells_is_a_sweep_too(sweep, capsys):
    Path(sweep, "cells.csv").rename("results.csv")
    assert pdvit(["plot", "sweep", "results.csv", "--out", "ablation.png"]) == 0
    assert "paper" in capsys.readouterr().out
    assert pdvit(["plot", "sweep", "nothing.csv"]) == 2
    assert "there is no such folder or file" in capsys.readouterr().err


def test_sweeps_whose_tables_have_one_name_have_figures_of_their_own(sweep, capsys):
    for place in ("one", "two"):
        Path(place).mkdir()
        Path(place, "results.csv").write_text(SWEEP)
    assert pdvit(["plot", "sweep", "one/results.csv"]) == 0
    assert pdvit(["plot", "sweep", "two/results.csv"]) == 0
    Path("two", "results.csv").write_text(SWEEP.replace("diversity.preset", "model.name"))
    assert pdvit(["plot", "sweep", "two/results.csv"]) == 0  # a page with another heading is replaced
    assert [path.name for path in sorted(Path("figures").glob("*.md"))] == [
        "sweep-one-results.md",
        "sweep-two-results.md",
    ]
    Path("figures", "sweep-one-results.md").write_text("# Mine")
    assert pdvit(["plot", "sweep", "one/results.csv"]) == 2
    assert "sweep-one-results.md is there" in capsys.readouterr().err


def test_the_metric_and_the_baseline_of_a_sweep_can_be_named(sweep, capsys):
    arguments = ["plot", "sweep", sweep, "--metric", "similarity_last", "--baseline", "diversity.preset=paper"]
    assert pdvit(arguments) == 0
    assert Path(capsys.readouterr().out.splitlines()[-1]) == Path("figures/sweep-sweep.png")
    table = pd.read_csv("figures/sweep-sweep.csv").set_index("setting")
    assert table.loc["none", "difference"] == pytest.approx(0.6)


def test_runs_of_one_name_are_told_apart_by_their_folders(workplace, analysis_table, capsys):
    for place in ("a", "b"):
        Path(place, "run").mkdir(parents=True)
        analysis_table(P).to_csv(f"{place}/run/analysis.csv", index=False)
    assert pdvit(["plot", "similarity", "a/run", "b/run", "a/run", "--out", "figure.svg"]) == 0
    shown = text_of(drawn(capsys))
    names = {"a/run", "b/run", "a/run (2)"}
    assert all(name in shown for name in names)
    assert set(pd.read_csv("figure.csv")["run"]) == names


def test_the_numbers_of_a_figure_go_beside_it_and_both_replace_those_before(analyses, capsys):
    (run,) = analyses(one=P)
    Path("figure.svg").write_text("old")
    for _ in range(2):
        assert pdvit(["plot", "similarity", run, "--out", "figure.svg"]) == 0
    assert text_of(Path("figure.svg")).startswith("<?xml")
    table = pd.read_csv("figure.csv")
    assert table["mean"].tolist() == P
    assert table["layer"].tolist() == ["embed", "block 1", "norm"]
    assert table["run"].unique().tolist() == ["one"]


def test_dark_is_dark_and_no_figure_stays_open(analyses, capsys):
    (run,) = analyses(one=P)
    corners, before = [], plt.get_fignums()
    for flags in ([], ["--dark"]):
        assert pdvit(["plot", "similarity", run, *flags]) == 0
        with Image.open(drawn(capsys)) as image:
            corners.append(sum(image.convert("RGB").getpixel((0, 0))))
    assert corners[0] == 3 * 255
    assert corners[1] < 100
    assert plt.get_fignums() == before


def test_names_are_drawn_as_they_are(analyses, capsys):
    names = ["$price_1^2$", "a&b<c>", "münchen_run", "100%_{x}", "_hidden", "caf\udce9"]
    assert pdvit(["plot", "similarity", *analyses(**dict.fromkeys(names, P)), "--out", "figure.svg"]) == 0
    shown = html.unescape(text_of(drawn(capsys)))
    assert all(name.replace("\udce9", "?") in shown for name in names)


class TestRefused:
    @pytest.mark.parametrize(
        ("figure", "command"),
        [
            ("similarity", ""),
            ("norms", " --metrics norms"),
            ("maps", " --explore"),
            *((name, f" --metrics {name}") for name in ("pairs", "spectrum", "attention", "cka")),
        ],
    )
    def test_what_was_not_measured_names_the_command(self, refusal, workplace, analysis_table, figure, command):
        assert "pdvit analyze RUN" in refusal("plot", figure).tip
        folder = Path("runs/one")
        (folder / "analysis").mkdir(parents=True)
        Path(folder, "analysis", "analysis.json").write_text('{"checkpoint": "one.safetensors"}')
        if figure == "norms":
            analysis_table(P).to_csv(folder / "analysis.csv", index=False)
        assert f"pdvit analyze one.safetensors{command}" in refusal("plot", figure, folder).tip

    @pytest.mark.parametrize("patch", ["3", "a,b", "1,2,3", "99,0"])
    def test_a_patch_that_is_none(self, refusal, workplace, analysis_folder, patch):
        analysis_folder(workplace / "runs" / "one")
        assert refusal("plot", "maps", "--patch", patch).where == "--patch"

    def test_a_sweep_without_cells(self, refusal, workplace):
        Path("empty").mkdir()
        assert "cells.csv" in refusal("plot", "sweep", "empty").tip
        assert "absent" in refusal("plot", "sweep", "absent").where

    def test_data_never_replace_another_table(self, refusal, analyses):
        (run,) = analyses(one=P)
        before = Path(run, "analysis.csv").read_bytes()
        assert "analysis.csv" in refusal("plot", "similarity", run, "--out", f"{run}/analysis.png").where
        assert Path(run, "analysis.csv").read_bytes() == before
        assert not Path(run, "analysis.png").exists()

    def test_the_confusion_of_a_run_that_labels_pixels_names_its_own_figure(self, refusal, workplace):
        Path("runs/pixels").mkdir(parents=True)
        Path("runs/pixels/iou.csv").write_text("class,iou\n")
        assert "pdvit plot segmentation runs/pixels" in refusal("plot", "confusion", "runs/pixels").tip

    def test_a_run_that_is_not_there(self, refusal, workplace):
        assert "pdvit train" in refusal("plot", "training").tip
        for figure in ("similarity", "training"):
            assert "absent" in refusal("plot", figure, "absent").where

    @pytest.mark.parametrize("out", ["figure.gif", "figure", "figure.pn"])
    def test_an_unknown_suffix(self, refusal, workplace, out):
        assert ".png" in refusal("plot", "similarity", "--out", out).tip

    def test_a_place_below_a_file(self, refusal, analyses):
        Path("file").touch()
        refusal("plot", "similarity", *analyses(one=P), "--out", "file/figure.png")

    @pytest.mark.parametrize(
        "content",
        [
            *(b"", b"no,table\n1,2\n", b"a\nb,c\nd,e,f\n", b"\xff\xfe\x00", HEAD),
            *(HEAD + b"r,embed,0,similarity,high,0,0,1,4\n", HEAD + b"r,embed,,similarity,0.5,0,0,1,4\n"),
        ],
    )
    def test_a_damaged_analysis(self, refusal, analyses, content):
        (run,) = analyses(one=P)
        Path(run, "analysis.csv").write_bytes(content)
        assert f"pdvit analyze {run}" in refusal("plot", "similarity", run).tip
