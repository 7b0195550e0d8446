import numpy as np
import pytest
import timm
import torch
from PIL import Image

from pdvit.config.schema import DataConfig
from pdvit.data.preprocessing import Preprocessing
from pdvit.errors import UserError

PLAIN = Preprocessing(size=8, crop_pct=1.0, interpolation="bilinear", mean=(0.0,) * 3, std=(1.0,) * 3)


def test_evaluation_scales_the_short_side_and_crops_the_centre():
    # White in the middle half only: scaled to 16x32, the central 8x8 lies wholly inside it.
    array = np.zeros((32, 64, 3), dtype=np.uint8)
    array[:, 16:48] = 255
    image = Preprocessing(8, 0.5, "bilinear", (0.0,) * 3, (1.0,) * 3).evaluation()(Image.fromarray(array))
    assert image.dtype == torch.uint8
    assert image.shape == (3, 8, 8)
    assert (image == 255).all()


def test_normalising_is_subtracting_the_mean_and_dividing_by_the_deviation():
    how = Preprocessing(8, 1.0, "bilinear", (0.5, 0.25, 0.0), (0.5, 1.0, 2.0))
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    assert how.normalise(images).flatten().tolist() == pytest.approx([-1.0, 0.2 - 0.25, 0.5])


def test_images_in_memory_are_resized_only_where_needed():
    images = torch.full((2, 3, 8, 8), 7, dtype=torch.uint8)
    assert PLAIN.fit(images) is images
    small = PLAIN.fit(torch.full((2, 3, 4, 4), 7, dtype=torch.uint8))
    assert torch.equal(small, images)


def test_preprocessing_is_what_the_model_says():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, patch_size=8)
    expected = timm.data.resolve_model_data_config(model)
    found = Preprocessing.for_model(model)
    assert found.size == 32
    assert (found.mean, found.std) == (tuple(expected["mean"]), tuple(expected["std"]))
    assert (found.crop_pct, found.interpolation) == (expected["crop_pct"], expected["interpolation"])
    assert found.as_timm()["input_size"] == (3, 32, 32)


def test_images_that_are_not_square_are_refused():
    with pytest.raises(UserError, match="32x16"):
        Preprocessing.for_model(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=(32, 16), patch_size=8))


def test_what_the_configuration_sets_wins_over_the_model():
    model = Preprocessing(32, 0.9, "bicubic", (0.5,) * 3, (0.5,) * 3)
    changed = model.changed(DataConfig(mean=(0.1, 0.2, 0.3), crop_mode="squash"))
    assert changed == Preprocessing(32, 0.9, "bicubic", (0.1, 0.2, 0.3), (0.5,) * 3, "squash")
    assert model.changed(DataConfig()) == model


@pytest.mark.parametrize("crop_pct", [1.0, 0.75])
def test_squashed_images_are_those_of_timm(crop_pct):
    image = Image.effect_noise((50, 30), 90).convert("RGB")
    how = Preprocessing(32, crop_pct, "bicubic", (0.5,) * 3, (0.5,) * 3, "squash")
    theirs = timm.data.create_transform(
        (3, 32, 32), interpolation="bicubic", crop_pct=crop_pct, crop_mode="squash", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    assert torch.allclose(how.normalise(how.evaluation()(image)[None])[0], theirs(image), atol=1e-6)


@pytest.mark.parametrize(("name", "value"), [("crop_mode", "border"), ("interpolation", "nearest")])
def test_what_pdvit_can_not_do_is_refused(name, value):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, pretrained_cfg_overlay={name: value})
    with pytest.raises(UserError, match=f"the {name} '{value}'"):
        Preprocessing.for_model(model)
