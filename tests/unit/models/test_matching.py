"""Weights of a file against those of a model: prefixes, differences, other resolutions."""

import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file

from pdvit.errors import UserError
from pdvit.models.build import build_model
from pdvit.models.matching import match_state_dict, select_weights
from tests.unit.models.support import SMALL, SMALL_SWIN, SWIN, equal, make

VIT = "vit_tiny_patch16_224"
NAMES = ["a.weight", "a.bias", "b.0.weight", "b.1.weight"]


def tensors(*prefixes, names=NAMES):
    return {prefix + name: torch.full((1,), float(number)) for number, prefix in enumerate(prefixes) for name in names}


@pytest.mark.parametrize(
    ("prefix", "weights"),
    [
        # only a part of a word is "ema"
        *((prefix, "unknown whether raw or ema") for prefix in ("", "any.thing.", "schema.")),
        *((prefix, "raw") for prefix in ("state_dict.module.", "model.", "student.module.backbone.")),
        *((prefix, "ema") for prefix in ("teacher.backbone.", "model_ema.", "state_dict_ema._orig_mod.")),
    ],
)
def test_the_prefix_decides_which_weights_these_are(prefix, weights):
    found = select_weights(tensors(prefix) | {"optimizer.lr": torch.zeros(1)}, NAMES, None, "file")
    assert (found.prefix, found.weights, found.rivals) == (prefix, weights, ())
    assert sorted(name for name in found.tensors if not name.startswith("optimizer")) == sorted(NAMES)
    assert len(found.outside) == (1 if prefix else 0)


def test_few_others_are_no_rivals_and_a_model_may_be_deeper_or_of_another_layout():
    found = select_weights(tensors("model.") | tensors("decoder.", names=NAMES[:1]), NAMES, None, "file")
    assert (found.prefix, found.rivals, len(found.outside)) == ("model.", (), 1)
    names = [f"blocks.{block}.weight" for block in range(12)]
    found = select_weights(tensors("state_dict.model.", names=names[:2]) | {"more": torch.zeros(1)}, names, None, "x")
    assert (found.prefix, len(found.outside)) == ("state_dict.model.", 1)
    found = select_weights(tensors("state_dict.", names=["x.weight", "y.z.bias"]), NAMES, None, "file")
    assert sorted(found.tensors) == ["x.weight", "y.z.bias"]


def test_what_timms_filter_fails_on_is_refused():
    model = make(VIT)
    with pytest.raises(UserError, match="can't be converted to a VisionTransformer"):
        match_state_dict(model.state_dict() | {"patch_embed.proj.weight": torch.zeros(5)}, model, "file", model)


@pytest.mark.parametrize(
    ("name", "before", "after", "resampled"),
    [
        (VIT, SMALL, {"img_size": 64}, {"pos_embed"}),
        (VIT, SMALL, {"patch_size": 4}, {"patch_embed", "pos_embed"}),
        ("beit_base_patch16_224", SMALL, {"img_size": 64}, {"relative_position_bias_table"}),
        ("eva02_tiny_patch14_224", SMALL, {"img_size": 64}, {"pos_embed"}),
        (SWIN, SMALL_SWIN | {"num_classes": 3}, {"img_size": 128, "window_size": 4}, {"relative_position_bias_table"}),
    ],
)
def test_another_resolution_is_resampled_as_timm_does(tmp_path, name, before, after, resampled):
    source = make(name, **before)
    save_file(source.state_dict(), tmp_path / "source.safetensors")
    overlay = {"file": str(tmp_path / "source.safetensors"), "num_classes": 3, "custom_load": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how timm interpolates
        theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **before | after)
    ours = build_model(name, before | after)
    found = match_state_dict(source.state_dict(), ours, "file", source)
    assert (found.missing, found.mismatched, found.unexpected) == ([], [], [])
    assert found.resampled
    assert all(any(part in name for part in resampled) for name in found.resampled)
    ours.load_state_dict(found.tensors)
    assert equal(ours, theirs)
