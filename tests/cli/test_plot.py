import json
import math
import os
from pathlib import Path

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
    assert [path.name for path in file.parent.iterdir()] == [file.name]


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


@pytest.mark.parametrize("name", ["$price_1^2$", "a&b<c>", "münchen_run", "100%_{x}", "_hidden"])
def test_a_name_is_drawn_as_it_is(analyses, trainings, capsys, name):
    assert pdvit(["plot", "similarity", *analyses(**{name: [0.2, 0.4, 0.6]}), "--out", "figure.svg"]) == 0
    shown = text_of(drawn(capsys))
    assert name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in shown


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
    @pytest.mark.parametrize(("kind", "command"), [("similarity", "pdvit analyze"), ("training", "pdvit train")])
    def test_nothing_to_draw_names_the_command(self, refusal, workplace, kind, command):
        assert command in refusal("plot", kind).tip

    def test_a_run_without_an_analysis_names_the_command(self, refusal, run_copy):
        assert f"pdvit analyze {run_copy}" in refusal("plot", "similarity", run_copy).tip

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
