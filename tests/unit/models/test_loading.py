"""A checkpoint as the beginning of a run: what it sets in the configuration, and which weights it gives."""

import argparse
import math
import re
from dataclasses import replace

import pytest
import timm
import torch
from timm.models import save_for_hf

from pdvit.config import build, resolve, to_dict
from pdvit.config.resolve import with_crop
from pdvit.errors import UserError
from pdvit.models.build import build_model, model_arguments
from pdvit.models.checkpoints import export
from pdvit.models.loading import apply_checkpoint_defaults, fingerprint, load_pretrained
from pdvit.models.resolved_checkpoint import resolve_checkpoint
from pdvit.models.segmentation.segmenter import build_segmenter
from pdvit.models.tokens import DiverseModel
from tests.unit.models.support import CLASSES, TINY, VIT, equal, make, on_meta_only, write


def saved(folder, model, classes=None, data=None, **arguments):
    """Save a model as timm does, with the configuration of its images, and other arguments of the model."""
    more = {"label_names": classes} if classes else {}
    save_for_hf(model, str(folder), more, data_config=data, model_args=arguments or None, safe_serialization=True)
    return folder


def configured(path, **sections):
    return with_defaults(build(("here", {"model": {"init": str(path)}}), ("here", sections)))


def with_defaults(config):
    model = config.model
    return apply_checkpoint_defaults(config, resolve_checkpoint(model.init, model.name, model.weights))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of a model with three classes that have no names."""
    return saved(tmp_path_factory.mktemp("source"), make())


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """The folder of the same model with names of classes."""
    return saved(tmp_path_factory.mktemp("named"), make(), CLASSES)


def test_model_and_images_come_from_the_checkpoint(tmp_path):
    images = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.8, "crop_mode": "squash"}
    path = saved(tmp_path, make(global_pool="avg"), data=images)
    config = resolve(configured(path))
    assert (config.model.name, config.model.depth, config.model.width, config.model.heads) == (VIT, 2, 24, 2)
    assert (config.model.patch_size, config.data.img_size, config.model.drop_path) == (8, 32, 0.0)
    assert config.model.args["global_pool"] == "avg"
    assert {name: getattr(config.data, name) for name in images} == images
    assert config.optim.lr == 1e-3  # as for any narrow model
    data = configured(path, segment={"head": "linear"}).data  # without a centre crop
    assert (data.mean, data.crop_pct, data.crop_mode) == (images["mean"], None, None)


def test_settings_of_the_user_win(source):
    model = {"drop_path": 0.2, "patch_size": 4, "args": {"drop_rate": 0.2}}
    config = resolve(configured(source, data={"img_size": 64, "mean": [0.0, 0.0, 0.0]}, model=model))
    assert (config.data.img_size, config.data.mean) == (64, (0.0, 0.0, 0.0))
    assert (config.model.drop_path, config.model.patch_size, config.model.width) == (0.2, 4, 24)
    assert config.model.args == {"global_pool": "token", "drop_rate": 0.2}


@pytest.mark.parametrize("weights", ["ema", None])
def test_a_resolved_configuration_finds_its_weights_again(source, tmp_path, weights):
    path = source if weights is None else write(tmp_path, export(make(), CLASSES, {}, weights))
    config = resolve(configured(path))
    assert config.model.weights == weights
    assert with_defaults(build(("run.toml", to_dict(config)))) == config  # as --config and --resume do


def test_the_hash_is_of_the_weights_alone_and_others_are_refused(source, named, tmp_path):
    other = resolve_checkpoint(saved(tmp_path, make(seed=1)))
    hashes = [fingerprint(found) for found in (resolve_checkpoint(source), resolve_checkpoint(named), other)]
    assert hashes[0] == hashes[1] != hashes[2]
    with pytest.raises(UserError, match="not that of the configuration"):
        apply_checkpoint_defaults(configured(source), other)


def test_a_path_is_kept_whole_and_the_model_unset_until_it_is_read(source, monkeypatch):
    monkeypatch.chdir(source.parent)
    assert configured(f"local-dir:{source.name}").model.init == str(source)
    config = resolve(build(("here", {"model": {"init": source.name}})))
    assert (config.model.name, config.optim.lr) == (None, None)


def test_images_that_are_not_square_need_a_size(tmp_path):
    path = saved(tmp_path, make(img_size=(16, 32)))
    with pytest.raises(UserError, match="16x32"):
        configured(path)
    assert configured(path, data={"img_size": 32}).data.img_size == 32


def test_positions_of_a_grid_that_is_not_square_are_resampled_from_it_or_refused(tmp_path):
    model = make(img_size=(16, 64))  # as many patches as 32x32
    path = saved(tmp_path / "wide", model)
    ours, notes = begin(path, data={"img_size": 32})
    grid = model.pos_embed[:, 1:].reshape(1, 2, 8, 24).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True)
    assert torch.allclose(ours.pos_embed[:, 1:], grid.flatten(2).transpose(1, 2), atol=1e-6)
    assert torch.equal(ours.pos_embed[:, :1], model.pos_embed[:, :1])
    assert "resampled: 1 (pos_embed)" in notes
    torch.save(make(img_size=(16, 32)).state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match="those of 8 patches, which are no square"):
        resolve_checkpoint(tmp_path / "x.pth", VIT)


def test_a_crop_need_not_be_a_multiple_of_the_patches(source):
    config = build(("here", {"segment": {"head": "linear", "crop": 33}, "diversity": {"preset": "none"}}))
    config = resolve(with_defaults(with_crop(replace(config, model=replace(config.model, init=str(source))))))
    assert (config.segment.crop, config.model.width) == (33, 24)
    segmenter = build_segmenter(config, 3)
    assert segmenter.inside.patch_embed.img_size == (40, 40)
    assert "resampled: 1 (pos_embed)" in load_pretrained(segmenter, resolve_checkpoint(source), CLASSES)


def training_file(folder, state):
    """Write weights as timm's training script does."""
    args = argparse.Namespace(model=VIT, drop_path=0.1, model_kwargs=TINY, img_size=32)
    torch.save({"state_dict": state, "args": args}, folder / "last.pth.tar")
    return folder / "last.pth.tar"


def test_the_drop_path_of_a_training_file_is_kept(tmp_path):
    assert resolve(configured(training_file(tmp_path, make().state_dict()))).model.drop_path == 0.1


def begin(path, classes=CLASSES, **sections):
    """Return a model with the weights of a checkpoint, and the notes."""
    torch.manual_seed(1)
    config = resolve(configured(path, **sections))
    arguments = model_arguments(config.model, config.data.img_size) | {"num_classes": len(classes)}
    model = build_model(config.model.name, arguments)
    return model, load_pretrained(DiverseModel(model, patch_head=False), resolve_checkpoint(path), classes)


def test_the_same_classes_keep_the_classifier(source, named):
    for path in (source, named):
        model, notes = begin(path)
        assert equal(model, make())
        assert len(notes) == 1


@pytest.mark.parametrize(
    ("name", "classes", "heads"),
    [
        *((VIT, classes, ["head"]) for classes in (["ant", "bee", "cat", "dog"], CLASSES[::-1])),
        ("deit_tiny_distilled_patch16_224", CLASSES[::-1], ["head", "head_dist"]),
    ],
)
def test_other_classes_make_the_classifier_fresh(tmp_path, name, classes, heads):
    model, notes = begin(saved(tmp_path, make(name), CLASSES), classes)
    fresh = sorted(f"{head}.{part}" for head in heads for part in ("bias", "weight"))
    ours, theirs = model.state_dict(), make(name).state_dict()
    assert [key for key in sorted(ours) if not torch.equal(ours[key], theirs[key])] == fresh
    more = f" and {len(fresh) - 2} more" if len(fresh) > 2 else ""
    assert f"fresh: {len(fresh)} ({', '.join(fresh[:2])}{more})" in notes


@pytest.mark.parametrize(
    ("model", "what"), [({"depth": 3}, "missing"), ({"depth": 1}, "unexpected"), ({"width": 32}, "of another shape")]
)
def test_too_little_in_common_is_refused_with_counts(source, model, what):
    with pytest.raises(UserError) as caught:
        begin(source, model=model)
    assert re.search(rf"of the backbone's \d+ weights are in the file \(.*{what}: \d+", caught.value.what)


def test_fresh_weights_of_the_backbone_may_not_be_frozen(tmp_path):
    state = {name: value for name, value in make().state_dict().items() if name != "blocks.1.norm1.weight"}
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    model = make(seed=1).requires_grad_(False)
    with pytest.raises(UserError, match=r"blocks\.1\.norm1\.weight is not in the file"):
        load_pretrained(DiverseModel(model, patch_head=False), resolve_checkpoint(tmp_path / "x.pth", VIT), CLASSES)


def test_a_norm_after_the_pooling_is_fresh_and_may_be_frozen(tmp_path):
    model = make(global_pool="avg")
    model.requires_grad_(False).head.requires_grad_(True)
    path = saved(tmp_path, make(num_classes=0))
    notes = load_pretrained(DiverseModel(model, patch_head=False), resolve_checkpoint(path), CLASSES)
    assert "fresh: 4 (fc_norm.bias, fc_norm.weight and 2 more)" in notes
    assert "unexpected: 2 (norm.bias, norm.weight)" in notes


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    state = make().state_dict()
    state["blocks.0.attn.qkv.weight"][0, 0] = math.nan
    with pytest.raises(UserError, match=r"1 \(blocks\.0\.attn\.qkv\.weight\)"):
        begin(training_file(tmp_path, state))


@pytest.mark.parametrize(
    ("changes", "what"), [({"mlp_ratio": 4000}, "of another shape"), ({"drop_path_rate": 1.5}, "drop_path")]
)
def test_a_configuration_that_does_not_fit_is_refused_before_a_model_is_built(tmp_path, monkeypatch, changes, what):
    """test_export has those of which no model can be built."""
    path = saved(tmp_path, make(), **changes)
    monkeypatch.setattr(timm, "create_model", on_meta_only(timm.create_model))
    with pytest.raises(UserError, match=what) as caught:
        configured(path)
    assert str(path) in caught.value.where
