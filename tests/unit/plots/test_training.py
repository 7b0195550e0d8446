import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from pdvit.plots.training import plot_training, read_records
from tests.errors import refused

LAYERS = ["embed", "block 1", "block 2", "norm"]
TRAIN = [{"step": 2, "epoch": 0.5, "loss": 4.0, "class": 2.0, "cosine": 0.5, "mixing": 1.5},
         {"step": 4, "epoch": 1.0, "loss": 3.0, "class": 1.5, "cosine": 0.4, "mixing": 1.1},
         {"step": 8, "epoch": 2.0, "loss": 2.0, "class": 1.0, "cosine": 0.3, "mixing": 0.7}]  # fmt: skip
EVAL = [{"step": 4, "epoch": 1.0, "accuracy": 0.75}, {"step": 8, "epoch": 2.0, "accuracy": 0.5}]
SIMILARITY = [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]


@pytest.fixture
def run(tmp_path):
    """A run directory with the records of two epochs."""
    probe = [{**at, "layers": LAYERS, "similarity": values} for at, values in zip(EVAL, SIMILARITY, strict=True)]
    kinds = [("train", TRAIN), ("eval", EVAL), ("similarity", probe)]
    lines = [json.dumps({"kind": kind, **record}) for kind, records in kinds for record in records]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def panels(run):
    """The three panels of one run: loss, accuracy, P."""
    figure = plot_training({"mine": read_records(run)})
    FigureCanvasAgg(figure).draw()
    return figure.axes[:3]


def test_every_term_has_its_line_and_accuracy_is_in_percent(panels):
    lines = {line.get_label(): line for line in panels[0].lines}
    assert set(lines) == {"class", "cosine", "mixing"}
    dashes = {(line.get_linestyle(), tuple(np.atleast_1d(line._dash_pattern[1]))) for line in panels[0].lines}
    assert len(dashes) == 3
    (legend,) = panels[0].figure.legends  # above the panels, where it covers no line
    assert [text.get_text() for text in legend.get_texts()] == list(lines)
    assert panels[0].get_legend() is None
    for name, line in lines.items():
        assert line.get_xdata().tolist() == [0.5, 1.0, 2.0]
        assert line.get_ydata().tolist() == [record[name] for record in TRAIN]
    (line,) = panels[1].lines
    assert line.get_xdata().tolist() == [1, 2]
    assert line.get_ydata().tolist() == [75, 50]
    assert panels[1].get_ylim() == (0, 100)
    assert "75.0" in panels[1].get_title(loc="left")


def test_a_term_looks_the_same_in_every_run_and_all_differ_without_colour(run):
    terms = ("class", "cosine", "contrastive", "mixing", "koleo", "spectral", "gram", "aux", "a new term")

    def looks(*shown: str) -> dict[str, tuple]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines += [{"kind": "train", "step": 9, "epoch": 2.25, **dict.fromkeys(shown, 0.5)}]
        records = read_records(run) | {"train": pd.DataFrame([line for line in lines if line["kind"] == "train"])}
        drawn = plot_training({"mine": records}).axes[0].lines
        return {line.get_label(): (line.get_color(), line.get_marker(), str(line._dash_pattern)) for line in drawn}

    every = looks(*terms)
    assert set(every) == set(terms)
    assert len({look[1:] for look in every.values()}) == len(terms)
    assert len({every[term][0] for term in terms[:8]}) == 8
    some = looks("koleo")
    assert some.items() <= every.items()
    assert "koleo" in some


def test_of_a_segmentation_it_is_the_miou(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"eval": {"miou": line.get("accuracy", 0) / 2}, "train": {"a new term": 0.9}}.get(line["kind"], {})
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    figure = plot_training({"other": read_records(run), "mine": read_records(run)})
    assert figure.axes[3].get_title(loc="left").startswith("mine")  # a row for each run
    (line,) = figure.axes[1].lines
    assert line.get_ydata().tolist() == [37.5, 25]
    assert "mIoU, % (best 37.5)" in figure.axes[1].get_title(loc="left")
    assert "a new term" in {line.get_label() for line in figure.axes[0].lines}
    table = figure.data.query("panel == 'mIoU' and run == 'mine'")
    assert table["value"].tolist() == [0.375, 0.25]


def test_the_heat_map_is_p_over_epoch_and_layer(panels):
    (mesh,) = panels[2].collections
    assert np.asarray(mesh.get_array()).tolist() == np.transpose(SIMILARITY).tolist()
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0, 1)
    assert panels[2].get_ylim() == (-0.5, 3.5)  # the first layer at the bottom
    assert [label.get_text() for label in panels[2].get_yticklabels()] == ["embed", "1", "2", "norm"]
    shades = mesh.cmap(np.linspace(0, 1, 20))[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(shades) > 0).all()  # brighter with P


def test_an_evaluation_stands_at_its_epoch(run):
    """A run whose last evaluation comes early, as with --epochs 9st: columns are as wide as the time between them."""
    with (run / "metrics.jsonl").open("a") as file:
        for kind, more in (("eval", {"accuracy": 0.6}), ("similarity", {"layers": LAYERS, "similarity": [0.9] * 4})):
            file.write(json.dumps({"kind": kind, "step": 9, "epoch": 2.25, **more}) + "\n")
    (mesh,) = plot_training({"mine": read_records(run)}).axes[2].collections
    columns = np.searchsorted(mesh.get_coordinates()[0, :, 0], (0.9, 1.9, 2.2)) - 1
    assert np.asarray(mesh.get_array())[0, columns].tolist() == [0.1, 0.5, 0.9]


def test_a_half_written_last_line_is_left_out_and_a_loss_without_a_number_is_a_gap(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 9, "epoch": 2.2, "loss": null, "class": null, "cosine": 0.1}\n')
        file.write('{"kind": "train", "ste')
    lines = plot_training({"mine": read_records(run)}).axes[0].lines
    assert np.isfinite([line.get_ydata()[3] for line in lines]).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing"),
        (b"\xff\xfe\x00", "damaged"),
        (b"", "no train records"),
        (b"no json\n{}\n", "damaged"),
        (b'{"kind": "train"}\n[1]\n{"kind": "train"}\n', "damaged"),
        (b'{"kind": "train", "epoch": 1}\n', "no train records with 'class'"),
        (b'{"kind": "train", "epoch": 1, "class": 1}\n{"kind": "eval", "epoch": 1}\n', "no eval records"),
    ],
)
def test_damaged_or_missing_records_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    with refused(message, where="metrics.jsonl"):
        read_records(tmp_path)
