import pytest
import torch
from PIL import Image

from pdvit.config.schema import Config, DataConfig, SegmentConfig
from pdvit.data.image_sets import ImageSet, held_out_images, open_images, sample_photographs
from pdvit.data.images import BadImages
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.sources.split import ArraySplit
from pdvit.errors import UserError


def numbered(count):
    return ArraySplit(torch.zeros(count, 3, 2, 2, dtype=torch.uint8), torch.arange(count))


def pictures_in(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    return folder


@pytest.mark.parametrize("limit", [1, 2, 5, 99])
def test_a_selection_has_the_asked_size_and_no_picture_twice(limit):
    labels = ImageSet("some", numbered(100)).subsample(limit).split.labels
    assert len(labels.unique()) == len(labels) == limit


def test_held_out_pictures_are_validation_where_there_is_no_test_split(tmp_path):
    pictures_in(tmp_path, ["train/a/1.png", "val/a/2.png"])
    pictures = held_out_images(Config(data=DataConfig(source=str(tmp_path))))
    assert [path.name for path in pictures.split.paths] == ["2.png"]
    assert "val split" in pictures.description


def test_held_out_pictures_of_a_segmentation_are_its_images_without_the_masks(tmp_path):
    pictures_in(
        tmp_path, [f"{kind}/{name}.png" for kind in ("images", "masks") for name in ("train/1", "val/2", "test/3")]
    )
    (tmp_path / "classes.tsv").write_text("0\tground\n1\tdisc\n")
    pictures = held_out_images(Config(data=DataConfig(source=str(tmp_path)), segment=SegmentConfig(head="linear")))
    assert [pictures.split.name(index) for index in range(len(pictures.split))] == [str(tmp_path / "images/test/3.png")]
    assert pictures.description.endswith(", test split")


@pytest.mark.parametrize(("source", "images"), [("digits", 360), ("scenes", 256)])
def test_a_source_can_be_named(source, images):
    assert len(open_images([source]).split) == images


def test_folders_and_files_can_be_named_together(tmp_path):
    pictures_in(tmp_path, ["many/b.png", "many/deep/a.jpg", "one.png"])
    found = open_images([str(tmp_path / "many"), str(tmp_path / "one.png")])
    assert [path.name for path in found.split.paths] == ["b.png", "a.jpg", "one.png"]
    assert len(found.split.labels) == 3


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["."], "has no images"),
        ([".", "digits"], "can't be mixed"),
        (["digit"], "no such image"),
        (["no/such/place"], "no such image"),
        (["x" * 400], "no such image"),
    ],
)
def test_names_without_images_are_refused(tmp_path, monkeypatch, names, what):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=what):
        open_images(names)


def test_the_sample_photographs_have_pixels_and_names():
    found = dict(sample_photographs().pixels(Preprocessing(32, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3), BadImages()))
    assert {name: tuple(pixels.shape) for name, pixels in found.items()} == dict.fromkeys(
        ["china.jpg", "flower.jpg"], (3, 32, 32)
    )
