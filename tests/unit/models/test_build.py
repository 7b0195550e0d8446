import pytest
import timm
import torch

from pdvit.config.schema import ModelConfig
from pdvit.models import build
from pdvit.models.build import build_model, model_arguments, sketch_model
from pdvit.models.layers import image_size_of
from pdvit.models.segmentation.segmenter import build_segmenter
from pdvit.models.tokens import DiverseModel
from tests.errors import refused
from tests.unit.models.segmentation.models import config
from tests.unit.models.support import SMALL, SWIN, VIT, on_meta_only

STAGES = {"depths": [1, 1, 1, 2], "embed_dim": 12, "num_heads": [1, 2, 2, 2]}


def test_names_and_arguments_that_read_or_fetch_files_are_refused(tmp_path):
    for name in ("", "../vit", "hf-hub:timm/vit_tiny_patch16_224", "local-dir:."):
        with refused(f"no model named '{name}'"):
            build_model(name, {})
    for argument in ("pretrained", "pretrained_cfg", "checkpoint_path", "cache_dir"):
        with refused(f"'{argument}'"):
            build_model(VIT, SMALL | {argument: str(tmp_path / "weights.pth")})


def test_arguments_hold_only_what_is_set():
    assert model_arguments(ModelConfig(name=VIT), None) == {}
    config = ModelConfig(name=VIT, depth=3, width=24, heads=2, patch_size=8, drop_path=0.1, args={"qk_norm": True})
    sizes = {"img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 2, "patch_size": 8, "drop_path_rate": 0.1}
    assert model_arguments(config, 32) == sizes | {"qk_norm": True}
    assert model_arguments(ModelConfig(name=SWIN, args=STAGES), 64) == STAGES | {"img_size": 64}


# DeiT-S is 384 wide with 6 heads, ViT-Ti 192 with 3: both have 64 channels per head.
@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [
        ("deit_small_patch16_224", {"width": 128}, (128, 2)),
        ("deit_small_patch16_224", {"heads": 12}, (384, 12)),
        ("vit_tiny_patch16_224", {"width": 48}, (48, 1)),
    ],
)
def test_a_width_alone_keeps_the_width_per_head_and_heads_alone_the_width(name, sizes, expected):
    arguments = model_arguments(ModelConfig(name=name, **sizes), None)
    assert (arguments["embed_dim"], arguments["num_heads"]) == expected


@pytest.mark.parametrize(
    ("config", "what", "tip"),
    [
        *((ModelConfig(name=VIT, **sizes), "do not divide", "") for sizes in ({"heads": 5}, {"width": 50, "heads": 3})),
        *(
            (ModelConfig(name=SWIN, **{key: 2}), "stages of different sizes", "--model-kwargs")
            for key in ("depth", "patch_size")
        ),
        (ModelConfig(name=VIT, args={"embed_dim": 64}), "can't be given here", "--width"),
        (ModelConfig(name=VIT, args={"num_classes": 64}), "can't be given here", "data"),
        *(
            (ModelConfig(name="mixer_s32_224", **{key: 96}), "fixed width and no attention heads", "")
            for key in ("width", "heads")
        ),
    ],
)
def test_sizes_that_do_not_fit_or_have_another_place_are_refused(config, what, tip):
    with refused(what, tip=tip):
        model_arguments(config, None)


@pytest.mark.parametrize(
    ("name", "arguments", "what", "tip"),
    [
        (VIT, SMALL | {"img_size": 36}, "patches of 8 pixels do not fit images of 36x36", "32 or 40"),
        (VIT, {"img_size": 16}, "single patch", "32"),
        ("convnext_atto", {"img_size": 100}, "patches of 32 pixels do not fit images of 100x100", "96 or 128"),
        ("convnext_atto", {"img_size": 56}, "patches of 32 pixels do not fit images of 56x56", "such as 64"),
        ("mixer_s32_224", {"patch_size": 8}, "has a fixed 'patch_size'", "--patch-size"),
        (VIT, {"depth": 10**10}, "too large: 10000000000", "smaller"),
        (VIT, {"depth": 10**5, "embed_dim": 8, "num_heads": 1}, "more than 500 modules", ""),
    ],
)
def test_sizes_that_make_no_model_are_refused_with_those_that_do(monkeypatch, name, arguments, what, tip):
    monkeypatch.setattr(build, "MAX_MODULES", 500)
    with refused(what, tip=tip):
        sketch_model(name, arguments)


@pytest.mark.parametrize("name", [SWIN, "pvt_v2_b0"])
def test_a_model_that_pads_its_maps_takes_other_sizes(name):
    model = DiverseModel(build_model(name, {"img_size": 56, "depths": (1, 1, 1, 2)}), False)
    assert model(torch.rand(1, 3, 56, 56)).last.shape[1] == 4
    assert image_size_of(sketch_model("convnext_atto", {"img_size": 96})) == (96, 96)  # timm has no such argument


@pytest.mark.parametrize(("drop_path", "rate"), [(0.0, 0.0), (0.3, 0.3), (None, 0.1)])
def test_drop_path_of_zero_is_not_timms_default(drop_path, rate):
    arguments = model_arguments(ModelConfig(name=SWIN, drop_path=drop_path, args=STAGES), None)
    block = sketch_model(SWIN, arguments).layers[3].blocks[-1]  # timm's default is 0.1
    assert getattr(block.drop_path1, "drop_prob", 0.0) == pytest.approx(rate)


@pytest.mark.parametrize("build_it", [lambda: build_model(VIT, SMALL), lambda: build_segmenter(config(), 3)])
def test_a_model_that_does_not_fit_is_refused_before_it_takes_memory(monkeypatch, build_it):
    monkeypatch.setattr(build, "available_memory", lambda: 1000)
    monkeypatch.setattr(timm, "create_model", on_meta_only(timm.create_model))
    with refused("too big for memory"):
        build_it()


def test_the_limit_of_a_control_group_bounds_the_available_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "CGROUPS", tmp_path)
    unlimited = build.available_memory()
    limits = {"max": "9000000", "current": "5000000", "stat": "anon 4000000\ninactive_file 1000000\n"}
    for name, text in limits.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert build.available_memory() == 5_000_000 < unlimited  # cached files are given back
    (tmp_path / "memory.max").write_text("max\n")
    assert build.available_memory() > 9_000_000
