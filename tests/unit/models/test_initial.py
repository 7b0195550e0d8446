import argparse
import json
import math
import re
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

from pdvit.config import Config, build, resolve, to_dict
from pdvit.config.resolve import with_crop
from pdvit.errors import UserError
from pdvit.models.build import build_model, model_arguments
from pdvit.models.checkpoints import export
from pdvit.models.loading import apply_checkpoint_defaults as settle
from pdvit.models.loading import fingerprint
from pdvit.models.loading import load_pretrained as begin
from pdvit.models.resolved_checkpoint import resolve_checkpoint as describe
from pdvit.models.segmentation.segmenter import build_segmenter
from pdvit.models.tokens import DiverseModel

VIT = "vit_tiny_patch16_224"
TINY = {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
CLASSES = ["ant", "bee", "cat"]


def make(name=VIT, seed=0, **more):
    torch.manual_seed(seed)
    model = timm.create_model(name, **TINY | {"img_size": 32, "num_classes": 3} | more)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2)
    return model


def saved(folder, model, classes=None, **data):
    more = {"label_names": classes} if classes else {}
    save_for_hf(model, str(folder), safe_serialization=True, model_config=more, data_config=data)
    return folder


def configured(path, **sections):
    config = build(("here", {"model": {"init": str(path)}}), ("here", sections))
    return settle(config, describe(config.model.init, config.model.name, config.model.weights))


def fresh(config, classes=3):
    return build_model(
        config.model.name, model_arguments(config.model, config.data.img_size) | {"num_classes": classes}
    )


# The configuration


def test_model_and_images_come_from_the_checkpoint(tmp_path):
    model = make(global_pool="avg", drop_rate=0.1)
    path = saved(tmp_path, model, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.8)
    config = resolve(configured(path))
    assert (config.model.name, config.model.depth, config.model.width, config.model.heads) == (VIT, 2, 24, 2)
    assert (config.model.patch_size, config.data.img_size, config.model.drop_path) == (8, 32, 0.0)
    assert config.model.args["global_pool"] == "avg"
    assert (config.data.mean, config.data.std, config.data.crop_pct) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.8)
    assert config.optim.lr == 1e-3  # as for any narrow model
    assert {name: value.shape for name, value in fresh(config).state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }


def test_a_segmentation_takes_no_centre_crop_from_the_checkpoint(tmp_path):
    path = saved(tmp_path, make(), mean=(0.1, 0.2, 0.3), crop_pct=0.8, crop_mode="squash", interpolation="bilinear")
    data = configured(path, segment={"head": "linear"}).data
    assert (data.mean, data.interpolation, data.crop_pct, data.crop_mode) == ((0.1, 0.2, 0.3), "bilinear", None, None)


def test_what_the_user_gives_wins(tmp_path):
    path = saved(tmp_path, make())
    data, model = (
        {"img_size": 64, "mean": [0.0, 0.0, 0.0]},
        {"drop_path": 0.2, "patch_size": 4, "args": {"drop_rate": 0.2}},
    )
    config = resolve(configured(path, data=data, model=model))
    assert (config.data.img_size, config.data.mean) == (64, (0.0, 0.0, 0.0))
    assert (config.model.drop_path, config.model.patch_size, config.model.width) == (0.2, 4, 24)
    assert config.model.args == {"global_pool": "token", "drop_rate": 0.2}


def test_a_settled_configuration_stays_as_it_is(tmp_path):
    path = saved(tmp_path / "here", make())
    config = resolve(configured(path))
    again = build(("run.toml", to_dict(config)))
    assert settle(again, describe(path)) == again == config


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_a_run_finds_its_weights_again(tmp_path, weights):
    for name, content in export(make(), CLASSES, {}, weights).items():
        (tmp_path / name).write_bytes(content)
    config = resolve(configured(tmp_path))
    assert config.model.weights == weights
    again = build(("run.toml", to_dict(config)))  # as --config and --resume do
    assert settle(again, describe(again.model.init, again.model.name, again.model.weights)) == config


def test_other_weights_than_those_of_the_configuration_are_refused(tmp_path):
    config = configured(saved(tmp_path / "a", make()))
    other = describe(saved(tmp_path / "b", make(seed=1)))
    with pytest.raises(UserError, match="not that of the configuration"):
        settle(config, other)


def test_the_hash_is_of_the_weights_alone(tmp_path):
    a, b, c = (saved(tmp_path / name, make(seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert fingerprint(describe(a)) == fingerprint(describe(b)) != fingerprint(describe(c))


def test_the_path_is_kept_whole_and_a_name_as_it_is(tmp_path, monkeypatch):
    path = saved(tmp_path / "here", make())
    monkeypatch.chdir(tmp_path)
    assert configured("here").model.init == configured("local-dir:here").model.init == str(path)


def test_a_wide_model_learns_a_tenth_of_its_rate(tmp_path):
    config = configured(saved(tmp_path, make(embed_dim=192)), data={"batch_size": 128})
    assert resolve(config).optim.lr == pytest.approx(5e-5 * 128 / 512)


def test_the_model_is_open_until_the_weights_are_read():
    config = resolve(build(("here", {"model": {"init": "somewhere"}})))
    assert (config.model.name, config.optim.lr) == (None, None)


@pytest.mark.parametrize("key", ["freeze", "weights"])
def test_what_needs_initial_weights_is_refused_without(key):
    config = replace(Config(), model=replace(Config().model, **{key: "raw"}))
    with pytest.raises(UserError, match="needs initial weights"):
        resolve(config)


def test_images_that_are_not_square_need_a_size(tmp_path):
    path = saved(tmp_path, make(img_size=(16, 32)))
    with pytest.raises(UserError, match="16x32"):
        configured(path)
    assert configured(path, data={"img_size": 32}).data.img_size == 32


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_a_crop_needs_to_be_no_multiple_of_the_patches(tmp_path, head):
    config = build(("here", {"segment": {"head": head, "crop": 33}, "diversity": {"preset": "none"}}))
    path = saved(tmp_path, make())
    config = resolve(settle(with_crop(replace(config, model=replace(config.model, init=str(path)))), describe(path)))
    assert (config.segment.crop, config.model.width) == (33, 24)
    segmenter = build_segmenter(config, 3)
    assert segmenter.inside.patch_embed.img_size == (40, 40)
    assert "resampled: 1 (pos_embed)" in begin(segmenter, describe(path), CLASSES)


# The weights


def begun(path, classes, **sections):
    """Return the model that begins with a checkpoint, and what is said of it."""
    config = resolve(configured(path, **sections))
    torch.manual_seed(1)
    model = fresh(config, len(classes))
    return model, begin(DiverseModel(model, patch_head=False), describe(path), classes)


def differing(a, b):
    a, b = a.state_dict(), b.state_dict()
    return {name for name in a if a[name].shape != b[name].shape or not torch.equal(a[name], b[name])}


def test_the_same_classes_keep_the_classifier(tmp_path):
    source = make()
    for number, known in enumerate((CLASSES, None)):
        model, notes = begun(saved(tmp_path / str(number), source, known), CLASSES)
        assert differing(model, source) == set()
        assert len(notes) == 1


@pytest.mark.parametrize("classes", [["dog", "eel", "fox"], ["ant", "bee", "cat", "dog"], CLASSES[::-1]])
def test_other_classes_make_the_classifier_fresh(tmp_path, classes):
    source = make()
    model, notes = begun(saved(tmp_path, source, CLASSES), classes)
    assert differing(model, source) == {"head.weight", "head.bias"}
    assert "fresh: 2 (head.bias, head.weight)" in notes


def test_both_classifiers_of_a_distilled_model_are_fresh(tmp_path):
    source = make("deit_tiny_distilled_patch16_224")
    model, _ = begun(saved(tmp_path, source), ["a", "b"])
    assert differing(model, source) == {
        f"{head}.{part}" for head in ("head", "head_dist") for part in ("weight", "bias")
    }


def test_another_resolution_is_said(tmp_path):
    _, notes = begun(saved(tmp_path, make(), CLASSES), CLASSES, data={"img_size": 64})
    assert notes[1:] == ["resampled: 1 (pos_embed)"]


def test_a_norm_behind_the_pooling_is_fresh_and_the_old_one_left_over(tmp_path):
    source = make(num_classes=0)
    _, notes = begun(saved(tmp_path, source), CLASSES, model={"args": {"global_pool": "avg"}})
    assert "fresh: 4 (fc_norm.bias, fc_norm.weight, head.bias, head.weight)" in notes
    assert "unexpected: 2 (norm.bias, norm.weight)" in notes


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ({"depth": 3}, "missing"),
        ({"depth": 1}, "unexpected"),
        ({"width": 32}, "of another shape"),
        ({"args": {"qk_norm": True, "init_values": 0.1}}, "missing"),
    ],
)
def test_too_little_in_common_is_refused_and_counted(tmp_path, model, what):
    path = saved(tmp_path, make())
    with pytest.raises(UserError) as caught:
        begun(path, CLASSES, model=model)
    assert re.search(rf"of the backbone's \d+ weights are in the file \(.*{what}: \d+", caught.value.what)


def test_weights_that_would_stay_fresh_for_good_are_refused(tmp_path):
    state = make().state_dict()
    del state["pos_embed"]
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    model = make(seed=1)
    model.pos_embed.requires_grad_(False)
    with pytest.raises(UserError, match="pos_embed is not in the file"):
        begin(DiverseModel(model, patch_head=False), describe(tmp_path / "x.pth", VIT), CLASSES)


@pytest.mark.parametrize("name", ["blocks.1.norm1.weight", "norm.bias"])
def test_a_fresh_norm_of_the_backbone_is_refused_where_it_is_frozen(tmp_path, name):
    state = make().state_dict()
    del state[name]
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    model = make(seed=1).requires_grad_(False)
    with pytest.raises(UserError, match=f"{name} is not in the file"):
        begin(DiverseModel(model, patch_head=False), describe(tmp_path / "x.pth", VIT), CLASSES)


def test_a_fresh_norm_behind_the_pooling_may_be_frozen(tmp_path):
    model = make(global_pool="avg")
    model.requires_grad_(False).head.requires_grad_(True)
    notes = begin(DiverseModel(model, patch_head=False), describe(saved(tmp_path, make(num_classes=0))), CLASSES)
    assert "fresh: 4 (fc_norm.bias, fc_norm.weight, head.bias, head.weight)" in notes


# What a file says is only a claim


def claiming(folder, **changes):
    """Return a checkpoint whose config.json is changed: what lies in its tables, and at its top."""
    path = saved(folder, make()) / "config.json"
    config = json.loads(path.read_text())
    config["model_args"] |= changes.pop("model_args", {})
    config["pretrained_cfg"] |= changes.pop("pretrained_cfg", {})
    path.write_text(json.dumps(config | changes))
    return folder


def test_a_model_larger_than_its_weights_is_refused_before_it_is_built(tmp_path, monkeypatch):
    path = claiming(tmp_path, model_args={"mlp_ratio": 4000})
    create = timm.create_model

    def on_meta(*given, **more):
        model = create(*given, **more)
        assert next(model.parameters()).is_meta
        return model

    monkeypatch.setattr(timm, "create_model", on_meta)
    with pytest.raises(UserError, match="of another shape") as caught:
        configured(path)
    assert str(path) in caught.value.where


@pytest.mark.parametrize(
    "changes",
    [
        *({"pretrained_cfg": {"input_size": size}} for size in (5, "abc", ["a"], [3, -4, -4], [3, 32], [3, True, 32])),
        *({"model_args": {"img_size": size}} for size in (["a"], [32], -4, -32, "32", True, 32.0)),
        *({"pretrained_cfg": {"mean": [value, 0.5, 0.5]}} for value in (math.nan, math.inf, True, "a")),
        {"pretrained_cfg": {"crop_pct": True}},
        {"model_args": {"drop_path_rate": 1.5}},
        {"label_names": ["ant", 2, "cat"]},
    ],
    ids=str,
)
def test_odd_claims_are_refused_by_the_name_of_the_file(tmp_path, changes):
    path = claiming(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        begin(DiverseModel(fresh(configured(path)), patch_head=False), describe(path), CLASSES)
    assert str(path) in caught.value.where


@pytest.mark.parametrize("size", [["a"], ["a", "b"], [32], "32"])
def test_odd_sizes_of_a_model_that_takes_any_are_refused(tmp_path, size):
    text = json.dumps({"architecture": "pvt_v2_b0", "model_args": {"img_size": size}})
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"config.json": text})
    with pytest.raises(UserError, match="its img_size is"):
        configured(tmp_path)


def test_odd_words_for_the_weights_are_no_claim(tmp_path):
    config = configured(claiming(tmp_path, pdvit={"weights": "foo"}))
    assert config.model.weights is None
    assert build(("run.toml", to_dict(config))) == config


def test_the_drop_path_of_a_training_file_is_kept(tmp_path):
    args = argparse.Namespace(model=VIT, drop_path=0.1, model_kwargs=TINY, img_size=32)
    torch.save({"state_dict": make().state_dict(), "args": args}, tmp_path / "last.pth.tar")
    assert resolve(configured(tmp_path / "last.pth.tar")).model.drop_path == 0.1


def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path):
    state = make().state_dict()
    state["blocks.0.attn.qkv.weight"][0, 0] = math.nan
    torch.save(
        {"state_dict": state, "args": argparse.Namespace(model=VIT, model_kwargs=TINY, img_size=32)}, tmp_path / "x.pth"
    )
    with pytest.raises(UserError, match=r"1 \(blocks\.0\.attn\.qkv\.weight\) of its weights"):
        begin(
            DiverseModel(fresh(configured(tmp_path / "x.pth")), patch_head=False), describe(tmp_path / "x.pth"), CLASSES
        )
