import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pdvit.config import build, resolve
from pdvit.config.schema import Config, DataConfig, SegmentConfig
from pdvit.data.loader import LoaderConfig
from pdvit.data.masks.folders import MaskFiles, open_masks
from pdvit.data.masks.table import ClassTable
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.sources.split import Source
from pdvit.errors import UserError
from pdvit.tasks.segmentation import SegmentationTask, overlay, prediction_pngs
from pdvit.tasks.windows import SlidingWindowConfig
from tests.unit.models.segmentation.models import FAMILIES

CPU = torch.device("cpu")
SCENES = open_masks(DataConfig(source="scenes"), SegmentConfig())
PLAIN = {"depth": 2, "width": 16, "heads": 2, "patch_size": 8}
SWIN, HIERA = ({"name": name} | FAMILIES[name] for name in ("swin_tiny_patch4_window7_224", "hiera_tiny_224"))


def task_of(model: dict, crop: int = 32, diversity: str = "paper", first: str = "block", **segment) -> SegmentationTask:
    sections = {"model": model | {"drop_path": 0.0}, "data": {"source": "scenes", "batch_size": 2, "workers": 0}}
    sections |= {"segment": {"head": "upernet", "width": 8, "crop": crop} | segment, "optim": {"epochs": "2st"}}
    config = resolve(build(("flags", sections | {"diversity": {"preset": diversity, "first": first}})))
    return SegmentationTask(config, SCENES, CPU)


@pytest.mark.parametrize(
    ("model", "segment", "mode"),
    [
        (PLAIN, {"stride": 8}, "slide"),
        (PLAIN, {"mode": "whole"}, "whole"),
        (SWIN, {"stride": 8}, "whole"),
        (HIERA, {}, "slide"),  # it takes the crop's size alone
    ],
)
def test_plain_models_and_those_of_one_size_are_evaluated_in_windows(model, segment, mode):
    task = task_of(model, 64, **segment)
    stride = segment.get("stride", 42)
    assert (task.windows.mode, task.windows.window, task.windows.stride) == (mode, 64, stride)
    note = f"note: segment.stride = {stride} has no effect: images are evaluated whole"
    assert (note in task.describe().splitlines()) == (mode == "whole" and "stride" in segment)


def test_models_that_do_not_fit_the_settings_are_refused():
    with pytest.raises(UserError, match="images of 64x64 pixels alone"):
        task_of(HIERA, 64, mode="whole")


def test_the_closing_numbers_are_p_of_first_and_last_without_terms_too(monkeypatch):
    task = task_of(PLAIN, diversity="none", first="patches")
    monkeypatch.setattr(task, "source", replace(SCENES, splits={"val": SCENES.splits["val"].take(torch.arange(2))}))
    summary, backbone = task.finish(task.module, "raw"), task.module.backbone
    similarity = task.evaluate(task.module)[0]["similarity"]
    with torch.no_grad():
        patches = backbone.patch_embed(task.probe).reshape(len(task.probe), -1, PLAIN["width"])
    patches = torch.nn.functional.normalize(patches, dim=-1)
    cosines, count = (patches @ patches.mT).abs(), patches.shape[1]
    expected = float((cosines.sum((1, 2)) - count).mean()) / (count * (count - 1))
    assert summary["similarity_first"] == pytest.approx(expected, abs=1e-6)
    assert summary["similarity_last"] == pytest.approx(similarity["similarity"][-1], abs=1e-6)


def test_an_overlay_blends_the_colours_of_classes_and_leaves_the_rest():
    grey = Image.fromarray(np.full((2, 3, 3), 100, np.uint8))
    found = np.array(overlay(grey, torch.tensor([[0, 1, 255]] * 2, dtype=torch.uint8), [(10, 20, 30), (200, 0, 0)]))
    assert tuple(found[0, 2]) == (100, 100, 100)
    assert abs(found[0, 1] - (0.4 * 100 + 0.6 * np.array((200, 0, 0)))).max() <= 1


def test_pictures_have_the_class_of_the_largest_score_and_are_made_small(tmp_path):
    """The network returns the colours as scores, so the prediction is the brightest of red, green and blue."""
    levels = np.random.default_rng(0).permuted(np.tile(np.array([0, 100, 200], np.uint8), (600, 1024, 1)), axis=2)
    parts = {"image": (levels[:20, :30], levels), "mask": (levels[:20, :30].argmax(2), levels.argmax(2))}
    files = {name: [tmp_path / f"{name}-{number}.png" for number in range(2)] for name in parts}
    for name, arrays in parts.items():
        for path, array in zip(files[name], arrays, strict=True):
            Image.fromarray(array.astype(np.uint8)).save(path)
    labels, table = torch.zeros(2, dtype=torch.long), ClassTable.of_ids({0: "red", 1: "green", 2: "blue"})
    split = MaskFiles(files["image"], labels, files["mask"], table)
    preprocessing = Preprocessing(32, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3)
    loader, windows = LoaderConfig(1, 0, 0, torch.device("cpu"), preprocessing), SlidingWindowConfig("slide", 512, 400)
    found = prediction_pngs(lambda seen: seen, split, Source("", table.names, {}), loader, Config(), windows)
    pictures = {name: Image.open(io.BytesIO(content)) for name, content in found.items()}
    names = ("image", "truth", "prediction")
    assert [*pictures] == [f"predictions/{number}-{name}.png" for number in ("01", "02") for name in names]
    assert [picture.size for picture in pictures.values()] == [(30, 20)] * 3 + [(512, 300)] * 3
    for number in ("01", "02"):
        truth, prediction = (np.array(pictures[f"predictions/{number}-{name}.png"]) for name in names[1:])
        assert np.array_equal(truth, prediction)
    assert np.array_equal(np.array(pictures["predictions/01-truth.png"]), parts["mask"][0])
