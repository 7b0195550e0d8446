import json
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from pdvit.cli import run as pdvit

SIGNATURES = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
LAYERS = ["embed", "block 1", "norm"]


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


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


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
@pytest.mark.parametrize("kind", ["similarity", "training"])
def test_the_suffix_decides_the_format(analyses, trainings, capsys, kind, suffix):
    run = analyses(one=[0.2, 0.4, 0.6])[0] if kind == "similarity" else trainings("one")[0]
    assert pdvit(["plot", kind, run, "--out", f"deep/figure.{suffix}"]) == 0
    file = drawn(capsys)
    assert file == Path(f"deep/figure.{suffix}")
    assert file.read_bytes().startswith(SIGNATURES[suffix])
    assert sorted(path.name for path in file.parent.iterdir()) == sorted(["figure.csv", file.name])


def test_a_real_run_is_drawn(run_copy, workplace, capsys):
    assert pdvit(["analyze", str(run_copy), "--limit", "8", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert pdvit(["plot", "similarity", str(run_copy)]) == 0
    assert drawn(capsys) == Path("figures/similarity-copied.png")
    assert pdvit(["plot", "training", str(run_copy)]) == 0
    file = drawn(capsys)
    assert file == Path("figures/training-copied.png")
    with Image.open(file) as image:
        assert image.width > 1000


def test_without_arguments_the_newest_analyses_are_drawn(analyses, capsys):
    analyses(**{f"run-{number}": [0.2, 0.4, 0.6] for number in range(8)})
    assert pdvit(["plot", "similarity", "--out", "figure.svg"]) == 0
    shown = text_of(drawn(capsys))
    assert all(f"run-{number}" in shown for number in range(6))
    assert not any(f"run-{number}" in shown for number in (6, 7))


def test_without_arguments_the_newest_training_is_drawn(trainings, capsys):
    for age, run in enumerate(trainings("new", "old")):
        os.utime(f"{run}/metrics.jsonl", (1e9 - age, 1e9 - age))
    assert pdvit(["plot", "training", "--out", "figure.svg"]) == 0
    shown = text_of(drawn(capsys))
    assert "new" in shown
    assert "old" not in shown


def test_a_term_that_was_off_is_not_drawn(trainings, capsys):
    assert pdvit(["plot", "training", *trainings("one", terms=("cosine",)), "--out", "figure.svg"]) == 0
    shown = text_of(drawn(capsys))
    assert "cosine" in shown
    assert "mixing" not in shown


def test_a_run_that_is_still_written_is_drawn(trainings, capsys):
    (run,) = trainings("one")
    with Path(run, "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert pdvit(["plot", "training", run]) == 0


def test_a_loss_that_was_no_number_is_drawn_as_a_gap(trainings, capsys):
    (run,) = trainings("one")
    with Path(run, "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 16, "epoch": 3.2, "loss": null, "class": null, "cosine": 0.1}\n')
    assert pdvit(["plot", "training", run]) == 0


def test_a_single_image_has_a_line_without_a_band(workplace, analysis_table, capsys):
    Path("runs/one").mkdir(parents=True)
    analysis_table([0.1, 0.5, 0.9], std=math.nan, images=1).to_csv("runs/one/analysis.csv", index=False)
    assert pdvit(["plot", "similarity", "runs/one", "--out", "figure.svg"]) == 0
    shown = text_of(drawn(capsys))
    assert "1 image" in shown
    assert "1 images" not in shown


def test_many_runs_of_different_depths_and_long_names_are_drawn(analyses, capsys):
    runs = {f"run-{'very-' * 12}long-{depth}": [0.3] * depth for depth in range(3, 15)}
    folders = analyses(**runs)
    assert pdvit(["plot", "similarity", *folders, "--out", "figure.svg"]) == 0
    shown = text_of(drawn(capsys))
    assert all(f"-{depth}" in shown and "…" in shown for depth in range(3, 15))


def test_the_default_name_of_a_figure_of_many_runs_stays_short(analyses, capsys):
    folders = analyses(**{f"{'n' * 120}-{number}": [0.2, 0.4, 0.6] for number in range(12)})
    assert pdvit(["plot", "similarity", *folders]) == 0
    assert drawn(capsys).is_file()


# Kinds that read what `pdvit analyze` wrote, with what they need: a file of their own, or metrics of a group.
CURVES = {"pairs": "histogram", "attention": "entropy", "spectrum": "by_frequency", "cka": "matrix"}


@pytest.mark.parametrize("kind", ["metrics", "norms", *CURVES])
def test_a_kind_is_drawn_from_an_analysis(workplace, analysis_folder, capsys, kind):
    """All runs by name, and without names the newest that have what is needed."""
    for name in ("one", "two"):
        analysis_folder(workplace / "runs" / name)
    assert pdvit(["plot", kind, "runs/one", "runs/two", "--out", "figure.svg"]) == 0
    shown = text_of(drawn(capsys))
    assert all(name in shown for name in ("one", "two"))
    assert pdvit(["plot", kind, "--dark"]) == 0
    assert drawn(capsys).name in (f"{kind}-one-two.png", f"{kind}-two-one.png")


def test_maps_are_drawn_for_the_patches_that_are_named(workplace, analysis_folder, capsys):
    analysis_folder(workplace / "runs" / "one")
    arguments = ["plot", "maps", "--image", "1", "--patch", "0,3", "--patch", "2,2", "--out", "figure.svg"]
    assert pdvit(arguments) == 0
    assert "dog.png" in text_of(drawn(capsys))
    assert set(pd.read_csv("figure.csv")["patch"]) == {"0,3", "2,2"}


def test_two_checkpoints_are_compared(analyses, capsys):
    assert pdvit(["plot", "compare", *analyses(one=[0.2, 0.4, 0.6], two=[0.1, 0.2, 0.2])]) == 0
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
        analysis_table([0.2, 0.4, 0.6]).to_csv(f"{place}/run/analysis.csv", index=False)
    assert pdvit(["plot", "similarity", "a/run", "b/run", "--out", "figure.svg"]) == 0
    shown = text_of(drawn(capsys))
    assert all(name in shown for name in ("a/run", "b/run"))
    assert set(pd.read_csv("figure.csv")["run"]) == {"a/run", "b/run"}


def test_the_numbers_of_a_figure_go_beside_it(analyses, capsys):
    assert pdvit(["plot", "similarity", *analyses(one=[0.2, 0.4, 0.6])]) == 0
    table = pd.read_csv(drawn(capsys).with_suffix(".csv"))
    assert table["mean"].tolist() == [0.2, 0.4, 0.6]
    assert table["layer"].tolist() == ["embed", "block 1", "norm"]
    assert table["run"].unique().tolist() == ["one"]


def test_dark_is_dark(analyses, capsys):
    (run,) = analyses(one=[0.2, 0.4, 0.6])
    corners = []
    for flags in ([], ["--dark"]):
        assert pdvit(["plot", "similarity", run, *flags]) == 0
        with Image.open(drawn(capsys)) as image:
            corners.append(sum(image.convert("RGB").getpixel((0, 0))))
    assert corners[0] == 3 * 255
    assert corners[1] < 100


@pytest.mark.parametrize("name", ["$price_1^2$", "a&b<c>", "münchen_run", "100%_{x}", "_hidden", "caf\udce9"])
def test_a_name_is_drawn_as_it_is(analyses, trainings, capsys, name):
    assert pdvit(["plot", "similarity", *analyses(**{name: [0.2, 0.4, 0.6]}), "--out", "figure.svg"]) == 0
    shown = text_of(drawn(capsys))
    assert name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\udce9", "?") in shown


def test_a_figure_replaces_the_one_before(analyses, capsys):
    (run,) = analyses(one=[0.2, 0.4, 0.6])
    Path("figure.svg").write_text("old")
    assert pdvit(["plot", "similarity", run, "--out", "figure.svg"]) == 0
    assert text_of(drawn(capsys)).startswith("<?xml")


def test_no_figure_stays_open(analyses):
    before = plt.get_fignums()
    assert pdvit(["plot", "similarity", *analyses(one=[0.2, 0.4, 0.6])]) == 0
    assert plt.get_fignums() == before


class TestRefused:
    @pytest.mark.parametrize("kind", CURVES)
    def test_curves_that_were_not_measured_name_the_command(self, refusal, workplace, analysis_folder, kind):
        folder = analysis_folder(workplace / "runs" / "one")
        (folder / "analysis" / f"{kind}.npz").unlink()
        command = f"pdvit analyze {folder}.safetensors --metrics {kind}"  # what was measured, not where it was written
        assert command in refusal("plot", kind, "runs/one").tip
        assert f"--metrics {kind}" in refusal("plot", kind).tip

    def test_metrics_that_were_not_measured_name_the_command(self, refusal, analyses):
        (run,) = analyses(one=[0.2, 0.4, 0.6])
        assert f"pdvit analyze {run} --metrics norms" in refusal("plot", "norms", run).tip

    def test_maps_that_were_not_made_name_the_command(self, refusal, analyses):
        (run,) = analyses(one=[0.2, 0.4, 0.6])
        assert f"pdvit analyze {run} --explore" in refusal("plot", "maps", run).tip

    @pytest.mark.parametrize("patch", ["3", "a,b", "1,2,3", "99,0"])
    def test_a_patch_that_is_none(self, refusal, workplace, analysis_folder, patch):
        analysis_folder(workplace / "runs" / "one")
        assert refusal("plot", "maps", "--patch", patch).where == "--patch"

    def test_a_sweep_without_cells(self, refusal, workplace):
        Path("empty").mkdir()
        assert "cells.csv" in refusal("plot", "sweep", "empty").tip
        assert "absent" in refusal("plot", "sweep", "absent").where

    @pytest.mark.parametrize("name", ["analysis.csv", "confusion.csv"])
    def test_data_never_replace_another_table(self, refusal, analyses, name):
        (run,) = analyses(one=[0.2, 0.4, 0.6])
        Path(run, name).write_bytes(before := Path(run, "analysis.csv").read_bytes())
        out = Path(run, name).with_suffix(".png")
        assert name in refusal("plot", "similarity", run, "--out", out).where
        assert Path(run, name).read_bytes() == before
        assert not out.exists()

    @pytest.mark.parametrize(("kind", "command"), [("similarity", "pdvit analyze"), ("training", "pdvit train")])
    def test_nothing_to_draw_names_the_command(self, refusal, workplace, kind, command):
        assert command in refusal("plot", kind).tip

    def test_a_run_without_an_analysis_names_the_command(self, refusal, run_copy):
        assert f"pdvit analyze {run_copy}" in refusal("plot", "similarity", run_copy).tip

    def test_the_confusion_of_a_run_that_labels_pixels_names_its_own_figure(self, refusal, workplace):
        Path("runs/pixels").mkdir(parents=True)
        Path("runs/pixels/iou.csv").write_text("class,iou\n")
        assert "pdvit plot segmentation runs/pixels" in refusal("plot", "confusion", "runs/pixels").tip

    def test_a_run_that_is_not_there(self, refusal, workplace):
        for kind in ("similarity", "training"):
            assert "absent" in refusal("plot", kind, "absent").where

    @pytest.mark.parametrize("out", ["figure.gif", "figure", "figure.pn"])
    def test_an_unknown_suffix(self, refusal, analyses, out):
        assert ".png" in refusal("plot", "similarity", *analyses(one=[0.2, 0.4, 0.6]), "--out", out).tip
        assert not Path(out).exists()

    def test_a_place_below_a_file(self, refusal, analyses):
        Path("file").touch()
        refusal("plot", "similarity", *analyses(one=[0.2, 0.4, 0.6]), "--out", "file/figure.png")

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"no,table\n1,2\n",
            b"a\nb,c\nd,e,f\n",
            b"\xff\xfe\x00",
            b"model,layer,depth,metric,mean,std,ci95,images,tokens\n",
            b"model,layer,depth,metric,mean,std,ci95,images,tokens\nr,embed,0,similarity,high,0,0,1,4\n",
            b"model,layer,depth,metric,mean,std,ci95,images,tokens\nr,embed,,similarity,0.5,0,0,1,4\n",
        ],
    )
    def test_a_damaged_analysis(self, refusal, analyses, content):
        (run,) = analyses(one=[0.2, 0.4, 0.6])
        Path(run, "analysis.csv").write_bytes(content)
        assert f"pdvit analyze {run}" in refusal("plot", "similarity", run).tip

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"no json\n{}\n",
            b"[1]\n[2]\n",
            b'{"kind": "train", "step": 1, "epoch": 1}\n',
            b"\xff\xfe\x00",
            b'{"kind": "train", "epoch": 1}\n{"kind": "eval", "epoch": 1}\n{"kind": "similarity", "epoch": 1}\n',
        ],
    )
    def test_damaged_records(self, refusal, trainings, content):
        (run,) = trainings("one")
        Path(run, "metrics.jsonl").write_bytes(content)
        assert "metrics.jsonl" in refusal("plot", "training", run).where

    def test_a_damaged_line_is_named_by_its_number(self, refusal, trainings):
        (run,) = trainings("one")
        file = Path(run, "metrics.jsonl")
        whole = file.read_text().splitlines()
        whole[3] = whole[3][:10]
        file.write_text("\n".join(whole))
        assert "line 4" in refusal("plot", "training", run).what
