import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file

from pdvit.errors import UserError
from pdvit.models.build import build_model
from pdvit.models.matching import match_state_dict as match
from pdvit.models.matching import select_weights as choose

VIT = "vit_tiny_patch16_224"
TINY = {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
SMALL_SWIN = {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 1, 2, 2)}
NAMES = ["a.weight", "a.bias", "b.0.weight", "b.1.weight"]


def tensors(*prefixes, names=NAMES):
    return {prefix + name: torch.full((1,), float(number)) for number, prefix in enumerate(prefixes) for name in names}


@pytest.mark.parametrize(
    ("prefix", "weights"),
    [
        ("", "unknown"),
        ("any.thing.", "unknown"),
        ("state_dict.module.", "raw"),
        ("model.", "raw"),
        ("student.module.backbone.", "raw"),
        ("teacher.backbone.", "ema"),
        ("model_ema.", "ema"),
        ("state_dict_ema._orig_mod.", "ema"),
    ],
)
def test_the_prefix_says_which_weights_these_are(prefix, weights):
    found = choose(tensors(prefix) | {"optimizer.lr": torch.zeros(1)}, NAMES, None, "file")
    assert (found.prefix, found.weights, found.rivals) == (prefix, weights, ())
    assert sorted(name for name in found.tensors if not name.startswith("optimizer")) == sorted(NAMES)
    assert len(found.outside) == (1 if prefix else 0)


@pytest.mark.parametrize(("asked", "number"), [(None, 1), ("ema", 1), ("raw", 0)])
def test_of_two_the_moving_average_is_taken_unless_asked_otherwise(asked, number):
    found = choose(tensors("net.", "ema_net."), NAMES, asked, "file")
    assert found.tensors["a.weight"] == number
    assert len(found.rivals) == 1


@pytest.mark.parametrize("told", ["raw", "ema"])
def test_what_the_file_says_counts_where_its_weights_stand_alone(told):
    assert choose(tensors(""), NAMES, told, "file", told).weights == told
    assert choose(tensors("teacher."), NAMES, None, "file", told).weights == "ema"
    assert choose(tensors("net.", "ema_net."), NAMES, "raw", "file", told).prefix == "net."
    with pytest.raises(UserError, match=f"holds {told}, not"):
        choose(tensors(""), NAMES, {"raw": "ema", "ema": "raw"}[told], "file", told)


def test_a_word_that_only_holds_ema_is_none():
    assert choose(tensors("schema.", names=NAMES), NAMES, None, "file").weights == "unknown"


def test_a_few_names_in_common_are_no_rival():
    found = choose(tensors("model.") | tensors("decoder.", names=NAMES[:1]), NAMES, None, "file")
    assert (found.prefix, len(found.outside)) == ("model.", 1)


def test_another_layout_is_left_to_the_models_filter():
    found = choose(tensors("state_dict.", names=["x.weight", "y.z.bias"]), NAMES, None, "file")
    assert sorted(found.tensors) == ["x.weight", "y.z.bias"]


def test_what_differs_is_named():
    model = timm.create_model(VIT, **TINY, img_size=32, num_classes=3)
    state = model.state_dict()
    state["head.bias"], state["more"] = torch.zeros(4), torch.zeros(1)
    del state["norm.weight"]
    found = match(state, model, "file")
    assert (found.missing, found.mismatched, found.unexpected) == (["norm.weight"], ["head.bias"], ["more"])
    assert found.resampled == []
    assert set(found.tensors) == set(model.state_dict()) - {"norm.weight", "head.bias"}


@pytest.mark.parametrize(
    ("name", "before", "after", "resampled"),
    [
        (VIT, TINY | {"img_size": 32}, TINY | {"img_size": 64}, {"pos_embed"}),
        (VIT, TINY | {"img_size": 32}, TINY | {"img_size": 32, "patch_size": 4}, {"patch_embed", "pos_embed"}),
        ("beit_base_patch16_224", TINY | {"img_size": 32}, TINY | {"img_size": 64}, {"relative_position_bias_table"}),
        ("eva02_tiny_patch14_224", TINY | {"img_size": 32}, TINY | {"img_size": 64}, {"pos_embed"}),
        (
            "swin_tiny_patch4_window7_224",
            SMALL_SWIN | {"img_size": 64, "window_size": 2},
            SMALL_SWIN | {"img_size": 128, "window_size": 4},
            {"relative_position_bias_table"},
        ),
    ],
)
def test_another_resolution_is_what_timm_makes_of_it(tmp_path, name, before, after, resampled):
    torch.manual_seed(0)
    source = timm.create_model(name, num_classes=3, **before)
    with torch.no_grad():
        for weight in source.parameters():
            weight.normal_()
    save_file(source.state_dict(), tmp_path / "source.safetensors")
    overlay = {"file": str(tmp_path / "source.safetensors"), "num_classes": 3, "custom_load": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how timm interpolates
        theirs = timm.create_model(name, pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay, **after)
    ours = build_model(name, after | {"num_classes": 3})
    found = match(source.state_dict(), ours, "file")
    assert (found.missing, found.mismatched, found.unexpected) == ([], [], [])
    assert found.resampled
    assert all(any(part in name for part in resampled) for name in found.resampled)
    ours.load_state_dict(found.tensors)
    expected = theirs.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())


def test_what_timms_filter_chokes_on_is_refused():
    model = timm.create_model(VIT, **TINY, img_size=32, num_classes=3)
    with pytest.raises(UserError, match="can't be converted to a VisionTransformer"):
        match(model.state_dict() | {"patch_embed.proj.weight": torch.zeros(5)}, model, "file")


def test_a_prefix_is_found_for_a_model_of_fewer_blocks_beside_other_tensors():
    """The named model may be deeper than the file's: its depth is only known afterwards."""
    names = [f"blocks.{block}.weight" for block in range(12)]
    tensors = {f"state_dict.model.{name}": torch.zeros(1) for name in names[:2]} | {"state_dict.extra": torch.zeros(1)}
    chosen = choose(tensors, names, None, "file")
    assert (chosen.prefix, len(chosen.outside)) == ("state_dict.model.", 1)
