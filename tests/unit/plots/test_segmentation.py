import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from PIL import Image

from pdvit.errors import UserError
from pdvit.plots.segmentation import BARS, NAMED, SHOWN, plot_segmentation, read_segmentation


def write(run, classes=3, pictures=2):
    (run / "predictions").mkdir(parents=True)
    rows = [f'"class {n}",{10 * n},{n / (classes + 1) if n else ""}' for n in range(classes)]
    (run / "iou.csv").write_text("\n".join(['"class","pixels","iou"', *rows]) + "\n")
    for number in range(1, pictures + 1):
        Image.fromarray(np.full((6, 8, 3), 90, np.uint8)).save(run / "predictions" / f"{number:02}-image.png")
        for name in ("truth", "prediction"):
            mask = np.zeros((6, 8), np.uint8)
            mask[0] = 255 if name == "truth" else 1
            mask[1] = 1 if name == "truth" else 2
            image = Image.fromarray(mask)
            image.putpalette([value for colour in range(256) for value in (colour, 0, 255 - colour)])
            image.save(run / "predictions" / f"{number:02}-{name}.png")
    return run


def test_errors_are_where_truth_and_prediction_differ_and_a_class_is_known(tmp_path):
    table, pictures = read_segmentation(write(tmp_path / "run"))
    assert table["class"].tolist() == ["class 0", "class 1", "class 2"]
    assert np.isnan(table["iou"][0])
    errors = plot_segmentation(table, pictures, "run").axes[3]
    assert errors.images[0].get_array()[:3, 0].tolist() == [2, 1, 0]
    assert errors.get_xlabel() == "20.0 % wrong"


def test_a_row_of_four_for_each_picture_a_bar_for_each_class_and_a_legend_of_the_classes_that_are_drawn(tmp_path):
    table, pictures = read_segmentation(write(tmp_path / "run", classes=4, pictures=SHOWN + 1))
    figure = plot_segmentation(table, pictures, "run")
    assert len(figure.axes) == 4 * SHOWN + 1
    bars = figure.axes[-1]
    assert [bar.get_width() for bar in bars.patches] == [0.6, 0.4, 0.2]
    assert [text.get_text() for text in bars.texts] == ["0.60", "0.40", "0.20"]
    assert "mIoU 0.400" in bars.get_title(loc="right")
    assert "3 of 4 classes" in bars.get_xlabel()
    (legend,) = figure.legends
    patches = zip(legend.texts, legend.get_patches(), strict=True)
    found = {text.get_text(): to_hex(patch.get_facecolor()) for text, patch in patches}
    assert found == {"class 0": "#0000ff", "class 1": "#0100fe", "class 2": "#0200fd", "no class": "#ff0000"}


def test_of_many_classes_the_legend_has_the_most_frequent(tmp_path):
    table, (picture, _) = read_segmentation(write(tmp_path / "run", classes=150))
    mask = np.repeat(np.arange(0, 60, dtype=np.uint8), np.arange(60))[None]  # 59 is the most frequent
    (legend,) = plot_segmentation(table, [picture._replace(truth=mask, prediction=mask)], "run").legends
    assert [text.get_text() for text in legend.texts] == [f"class {n}" for n in range(60 - NAMED, 60)]


@pytest.mark.parametrize("classes", [3, 150])
def test_nothing_leaves_the_figure_and_no_number_lies_under_the_line_of_the_mean(tmp_path, classes):
    run = write(tmp_path / "run", classes=classes, pictures=SHOWN)
    table, pictures = read_segmentation(run)
    table["class"] = [f"{name} with a name that does not end here" for name in table["class"]]
    figure = plot_segmentation(table, pictures, "a-run-whose-name-is-long-enough-for-two")
    FigureCanvasAgg(figure).draw()
    drawn = figure.get_tightbbox()
    assert min(drawn.x0, drawn.y0) >= 0
    assert (drawn.max <= figure.get_size_inches()).all()
    bars = figure.axes[-1]
    assert all(text.get_zorder() > bars.lines[0].get_zorder() and text.get_bbox_patch() for text in bars.texts)


def test_of_many_classes_the_best_and_the_worst(tmp_path):
    table, _ = read_segmentation(write(tmp_path / "run", classes=150, pictures=0))
    bars = plot_segmentation(table, [], "run").axes[-1].patches
    widths = [bar.get_width() for bar in bars]
    assert len(widths) == BARS
    assert (max(widths), min(widths)) == (table["iou"].max(), table["iou"].min())


@pytest.mark.parametrize("damage", ["missing", "no palette"])
def test_a_damaged_mask_is_an_error(tmp_path, damage):
    file = write(tmp_path / "run") / "predictions" / "01-truth.png"
    file.unlink()
    if damage == "no palette":
        Image.fromarray(np.zeros((6, 8), np.uint8)).save(file)
    with pytest.raises(UserError, match=damage):
        read_segmentation(tmp_path / "run")
