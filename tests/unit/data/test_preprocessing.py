from dataclasses import replace

import pytest
import timm
import torch
from PIL import Image

from pdvit.config.schema import DataConfig
from pdvit.data.preprocessing import Preprocessing
from pdvit.errors import UserError


def test_preprocessing_is_the_models_except_for_what_the_configuration_sets():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, patch_size=8)
    expected = timm.data.resolve_model_data_config(model)
    found = Preprocessing.for_model(model)
    assert found.size == 32
    assert (found.mean, found.std) == (tuple(expected["mean"]), tuple(expected["std"]))
    assert (found.crop_pct, found.interpolation) == (expected["crop_pct"], expected["interpolation"])
    assert found.as_timm()["input_size"] == (3, 32, 32)
    assert Preprocessing.for_model(model, DataConfig()) == found
    changed = Preprocessing.for_model(model, DataConfig(mean=(0.1, 0.2, 0.3), crop_mode="squash"))
    assert changed == replace(found, mean=(0.1, 0.2, 0.3), crop_mode="squash")


def test_evaluation_images_are_those_of_timm():
    image = Image.effect_noise((50, 30), 90).convert("RGB")
    preprocessing = Preprocessing(32, 0.75, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "squash")
    theirs = timm.data.create_transform(**preprocessing.as_timm())
    found = preprocessing.normalise(preprocessing.evaluation()(image)[None])[0]
    assert torch.allclose(found, theirs(image), atol=1e-5)


@pytest.mark.parametrize(("name", "value"), [("crop_mode", "border"), ("interpolation", "nearest")])
def test_what_pdvit_can_not_do_is_refused(name, value):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, pretrained_cfg_overlay={name: value})
    with pytest.raises(UserError, match=rf"(?s)'{value}' is not a choice.*data.{name} \(of the model\)"):
        Preprocessing.for_model(model)
    with pytest.raises(UserError, match="32x16"):
        Preprocessing.for_model(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=(32, 16), patch_size=8))
