import pytest
import torch

from pdvit.config.schema import ModelConfig
from pdvit.errors import UserError
from pdvit.models.build import build_model, model_arguments, patch_size_of, sketch_model
from pdvit.models.layers import image_size_of

VIT = "vit_tiny_patch16_224"
SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 3}


def test_an_unknown_model_names_the_closest():
    with pytest.raises(UserError, match="deit_smal_patch16_224") as caught:
        build_model("deit_smal_patch16_224", {})
    assert "'deit_small_patch16_224'" in caught.value.tip


@pytest.mark.parametrize("name", ["", "hf-hub:timm/vit_tiny_patch16_224", "local-dir:.", "../vit"])
def test_a_name_that_timm_would_fetch_is_refused(name):
    with pytest.raises(UserError, match="no model named"):
        build_model(name, {})


@pytest.mark.parametrize(
    "arguments",
    [
        {"no_such_argument": 1},
        {"depth": "8"},
        {"depth": 0},
        {"embed_dim": 0},
        {"num_heads": 0},
        {"num_heads": 5},
        {"patch_size": 0},
        {"img_size": 0},
        {"img_size": [32]},
        {"norm_layer": "no_such_norm"},
        {"act_layer": "no_such_activation"},
        {"global_pool": "no_such_pool"},
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_an_argument_that_timm_refuses_is_a_user_error(arguments):
    with pytest.raises(UserError) as caught:
        build_model(VIT, SMALL | arguments, "model.args")
    assert caught.value.where == "model.args"


@pytest.mark.parametrize(
    "argument", ["pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable"]
)
def test_an_argument_that_reads_or_fetches_files_is_refused(argument, tmp_path):
    with pytest.raises(UserError, match=f"'{argument}'"):
        build_model(VIT, SMALL | {argument: str(tmp_path / "weights.pth")})


def test_arguments_carry_only_what_is_set():
    assert model_arguments(ModelConfig(name=VIT), None) == {}
    given = ModelConfig(name=VIT, depth=3, width=24, heads=2, patch_size=8, drop_path=0.1, args={"qk_norm": True})
    assert model_arguments(given, 32) == {
        "img_size": 32,
        "depth": 3,
        "embed_dim": 24,
        "num_heads": 2,
        "patch_size": 8,
        "drop_path_rate": 0.1,
        "qk_norm": True,
    }


# DeiT-S is 384 wide with 6 heads, ViT-B 768 with 12: both have 64 channels per head.
@pytest.mark.parametrize(
    ("name", "width", "heads"),
    [("deit_small_patch16_224", 128, 2), ("vit_base_patch16_224", 192, 3), ("vit_tiny_patch16_224", 48, 1)],
)
def test_a_width_alone_keeps_the_width_per_head(name, width, heads):
    arguments = model_arguments(ModelConfig(name=name, width=width), None)
    assert (arguments["embed_dim"], arguments["num_heads"]) == (width, heads)


def test_heads_alone_keep_the_width():
    arguments = model_arguments(ModelConfig(name="deit_small_patch16_224", heads=12), None)
    assert (arguments["embed_dim"], arguments["num_heads"]) == (384, 12)


@pytest.mark.parametrize("sizes", [{"heads": 5}, {"width": 50, "heads": 3}])
def test_heads_that_do_not_divide_the_width_are_refused(sizes):
    with pytest.raises(UserError, match="do not divide a width"):
        model_arguments(ModelConfig(name=VIT, **sizes), None)


def test_an_image_size_that_patches_do_not_divide_says_which_would_do():
    with pytest.raises(UserError, match="patches of 8 pixels do not fit images of 36x36") as caught:
        build_model(VIT, SMALL | {"img_size": 36})
    assert "32 or 40" in caught.value.tip


def test_a_sketch_takes_no_memory_and_the_model_does():
    assert {weight.device.type for weight in sketch_model(VIT, SMALL).parameters()} == {"meta"}
    assert {weight.device.type for weight in build_model(VIT, SMALL).parameters()} == {"cpu"}


def test_a_built_model_is_timms_own():
    torch.manual_seed(0)
    ours = build_model(VIT, SMALL).state_dict()
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model(VIT, **SMALL).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("name", "side"), [(VIT, 16), ("vit_small_patch14_dinov2", 14), ("beit_base_patch16_224", 16)])
def test_the_patch_size_is_the_named_one(name, side):
    assert patch_size_of(sketch_model(name, {"depth": 1})) == side


# A token of the last stage stands for 32 pixels in Swin, PVT and ConvNeXt (5 halvings), 16 in VOLO (4).
@pytest.mark.parametrize(
    ("name", "side"),
    [("swin_tiny_patch4_window7_224", 32), ("pvt_v2_b0", 32), ("convnext_atto", 32), ("volo_d1_224", 16)],
)
def test_the_patch_size_of_a_hierarchical_model_is_that_of_its_last_stage(name, side):
    assert patch_size_of(sketch_model(name, {})) == side


@pytest.mark.parametrize("name", ["pvt_v2_b0", "convnext_atto"])
def test_a_model_that_takes_any_image_size_is_told_it(name):
    model = sketch_model(name, {"img_size": 96})
    assert image_size_of(model) == (96, 96)
    with pytest.raises(UserError, match="patches of 32 pixels do not fit images of 100x100"):
        sketch_model(name, {"img_size": 100})


@pytest.mark.parametrize("sizes", [{"depth": 2}, {"width": 24}, {"heads": 2}, {"patch_size": 2}])
def test_one_size_for_all_stages_is_refused(sizes):
    with pytest.raises(UserError, match="stages of different sizes") as caught:
        model_arguments(ModelConfig(name="swin_tiny_patch4_window7_224", **sizes), None)
    assert "--model-kwargs" in caught.value.tip


@pytest.mark.parametrize(("asked", "rate"), [(0.0, 0.0), (0.3, 0.3), (None, 0.1)])
def test_drop_path_of_zero_is_not_timms_default(asked, rate):
    name = "swin_tiny_patch4_window7_224"  # timm gives it 0.1
    model = sketch_model(name, model_arguments(ModelConfig(name=name, drop_path=asked), None))
    assert getattr(model.layers[3].blocks[-1].drop_path1, "drop_prob", 0.0) == pytest.approx(rate)


def test_sizes_of_stages_go_through_timms_own_arguments():
    sizes = {"depths": [1, 1, 1, 2], "embed_dim": 12, "num_heads": [1, 2, 2, 2]}
    given = ModelConfig(name="swin_tiny_patch4_window7_224", args=sizes)
    assert model_arguments(given, 64) == {"img_size": 64} | sizes


def test_the_patch_size_can_be_changed():
    assert patch_size_of(sketch_model(VIT, SMALL)) == 8


@pytest.mark.parametrize(("argument", "flag"), [("embed_dim", "--width"), ("num_classes", "data")])
def test_an_argument_with_a_key_of_its_own_names_it(argument, flag):
    with pytest.raises(UserError, match=argument) as caught:
        model_arguments(ModelConfig(name="test_vit", args={argument: 64}), None)
    assert flag in caught.value.tip


def test_an_image_of_one_patch_is_refused():
    with pytest.raises(UserError, match="single patch") as caught:
        sketch_model("test_vit", {"img_size": 16, "patch_size": 16})
    assert "32" in caught.value.tip


def test_a_model_that_does_not_fit_is_refused_before_it_takes_memory(monkeypatch):
    monkeypatch.setattr("pdvit.models.build.available_memory", lambda: 1000)
    with pytest.raises(UserError, match="too big for memory") as refused:
        build_model(VIT, SMALL, "here")
    assert refused.value.where == "here"
