import pytest
import torch

from pdvit.config.schema import Config, DataConfig, SegmentConfig
from pdvit.data.images import BadImages
from pdvit.data.masks.folders import open_masks
from pdvit.data.opening import ImageSet, held_out_images, open_images, open_source, sample_photographs
from pdvit.data.sources.split import ArraySplit
from tests.errors import refused
from tests.unit.data.batches import PREPROCESSING, opened, write_tree


@pytest.mark.parametrize(
    ("source", "what"),
    [
        *((name, "no source, folder or table") for name in ("no/such/folder", "FOLDER", "x" * 400, "{}.rar", "wds/a")),
        *((name, "there is no file") for name in ("no/such.tar", "no/such.CSV")),
        ("scenes", "'scenes' has classes of pixels"),
    ],
)
def test_a_source_that_is_not_there_is_refused(tmp_path, source, what):
    (tmp_path / "images.rar").touch()
    with refused(what, where="--data"):
        opened(source.format(tmp_path / "images"))


@pytest.mark.parametrize("typed", ["twoo/", "two.tar"])
def test_the_tip_for_a_path_that_is_not_there_is_the_closest_beside_it(tmp_path, typed):
    (tmp_path / "two").mkdir()
    data = DataConfig(source=f"{tmp_path}/{typed}")
    for read in (open_source, lambda it: open_masks(it, SegmentConfig()), lambda it: open_images([it.source])):
        with refused(tip=f"did you mean '{tmp_path}/two'?"):
            read(data)


@pytest.mark.parametrize("limit", [1, 2, 5, 99])
def test_a_selection_has_the_asked_size_and_no_image_twice(limit):
    images = ArraySplit(torch.zeros(100, 3, 2, 2, dtype=torch.uint8), torch.arange(100))
    labels = ImageSet("some", images).subsample(limit).split.labels
    assert len(labels.unique()) == len(labels) == limit


def test_held_out_images_are_validation_where_there_is_no_test_split(tmp_path):
    write_tree(tmp_path, ["train/a/1.png", "val/a/2.png"])
    images = held_out_images(Config(data=DataConfig(source=str(tmp_path))))
    assert [path.name for path in images.split.paths] == ["2.png"]
    assert images.description.endswith(", val split")


def test_held_out_images_of_a_segmentation_are_its_images_without_the_masks(tmp_path):
    files = ("train/1.png", "val/2.png", "test/3.png")
    write_tree(tmp_path, [f"{folder}/{file}" for folder in ("images", "masks") for file in files])
    (tmp_path / "classes.tsv").write_text("0\tground\n1\tdisc\n")
    images = held_out_images(Config(data=DataConfig(source=str(tmp_path)), segment=SegmentConfig(head="linear")))
    assert [images.split.name(index) for index in range(len(images.split))] == [str(tmp_path / "images/test/3.png")]
    assert images.description.endswith(", test split")


def test_a_source_or_folders_and_files_together_can_be_named(tmp_path):
    assert [len(open_images([source]).split) for source in ("digits", "scenes")] == [360, 256]
    write_tree(tmp_path, ["many/b.png", "many/deep/a.jpg", "one.png"])
    found = open_images([str(tmp_path / "many"), str(tmp_path / "one.png")])
    assert [path.name for path in found.split.paths] == ["b.png", "a.jpg", "one.png"]
    assert len(found.split.labels) == 3


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["."], "has no images"),
        ([".", "digits"], "can't be mixed"),
        *(([name], "no such image") for name in ("digit", "no/such/place", "x" * 400)),
    ],
)
def test_names_without_images_are_refused(tmp_path, monkeypatch, names, what):
    monkeypatch.chdir(tmp_path)
    with refused(what):
        open_images(names)


def test_the_sample_photographs_have_pixels_and_names():
    found = {name: pixels.shape for name, pixels in sample_photographs().pixels(PREPROCESSING, BadImages())}
    assert found == dict.fromkeys(["china.jpg", "flower.jpg"], (3, 8, 8))
