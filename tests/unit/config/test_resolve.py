import pytest
from timm.data.auto_augment import rand_augment_transform

from pdvit.config import build, resolve
from pdvit.config.schema import TERMS
from pdvit.errors import UserError

PAPER = {"cosine": 1, "contrastive": 1, "mixing": 1}
TWO = {"contrastive": 1, "mixing": 1}
DEIT = "deit_small_patch16_224"
LAYERS = {"released": ("patches", "norm", "own"), "diverse-vit": ("embed", "block", "class")}


def resolved(**sections):
    return resolve(build(("flags", sections)))


@pytest.mark.parametrize(
    ("diversity", "variant", "weights", "cutmix"),
    [
        ({}, "paper", PAPER, 1),
        ({"preset": "v1"}, "v1", PAPER, 1),
        ({"preset": "released"}, "released", TWO, 1),
        ({"preset": "diverse-vit"}, "diverse-vit", {"cosine": 0.5, "contrastive": 0.5, "mixing": 1}, 1),
        ({"preset": "koleo"}, "paper", {"koleo": 1}, 0),
        ({"preset": "cutmix"}, "paper", {}, 1),
        ({"preset": "none"}, "paper", {}, 0),
        ({"preset": "none", "mixing": 2.0}, "paper", {"mixing": 2}, 1),
        ({"mixing": 0.0}, "paper", {"cosine": 1, "contrastive": 1}, 0),
        ({"preset": "cutmix", "contrastive": 3.0}, "paper", {"contrastive": 3}, 1),
        ({"variant": "v1"}, "v1", PAPER, 1),
        ({"variant": "released"}, "released", TWO, 1),
    ],
)
def test_a_preset_gives_weights_and_explicit_settings_win(diversity, variant, weights, cutmix):
    config = resolved(diversity=diversity)
    assert {term: getattr(config.diversity, term) for term in TERMS} == dict.fromkeys(TERMS, 0) | weights
    assert (config.diversity.variant, config.augment.cutmix) == (variant, cutmix)
    layers = (config.diversity.first, config.diversity.last, config.diversity.patch_head)
    assert layers == LAYERS.get(diversity.get("preset"), ("block", "norm", "own"))
    assert resolved(diversity=diversity, augment={"cutmix": 0.0}).augment.cutmix == 0


@pytest.mark.parametrize(
    ("model", "shape", "side"),
    [
        ({}, (8, 48, 3, 4), 32),
        ({"width": 96}, (8, 96, 6, 4), 32),
        ({"width": 8}, (8, 8, 1, 4), 32),
        ({"depth": 2, "heads": 4, "patch_size": 8}, (2, 48, 4, 8), 32),
        ({"name": DEIT}, (None,) * 4, None),
    ],
)
def test_the_small_model_is_the_default(model, shape, side):
    config = resolved(model=model)
    found = config.model
    assert (found.depth, found.width, found.heads, found.patch_size) == shape
    assert (found.name, config.data.img_size) == (model.get("name", "vit_tiny_patch16_224"), side)


SMALL_CHECKPOINT = {"name": "vit_tiny_patch16_224", "width": 48, "init": "runs/small"}


@pytest.mark.parametrize(
    ("model", "head", "batch", "lr"),
    [
        ({}, None, 64, 2e-3),
        ({"name": DEIT}, None, 512, 5e-4),
        ({"name": DEIT}, None, 128, 2.5e-4),
        ({"name": DEIT, "init": DEIT}, None, 8, 6.25e-6),
        (SMALL_CHECKPOINT, None, 64, 1e-3),
        ({}, "upernet", 64, 2e-3),
        (SMALL_CHECKPOINT, "upernet", 64, 1e-3),
        ({"name": DEIT}, "upernet", 4, 3e-5),
        ({"name": DEIT, "init": DEIT}, "upernet", 64, 1.2e-4),
    ],
)
def test_the_default_learning_rate(model, head, batch, lr):
    segment = {"segment": {"head": head}} if head else {}
    config = resolved(model=model, data={"batch_size": batch}, diversity={"preset": "none"}, **segment)
    assert config.optim.lr == pytest.approx(lr, rel=1e-12)
    assert config.optim.min_lr == pytest.approx(lr / 1000, rel=1e-12)
    assert config.optim.head_lr == (1e-3 if lr == 6.25e-6 else None)  # a fresh classifier on published weights
    sgd = resolved(model={"name": DEIT}, data={"batch_size": 128}, optim={"opt": "sgd"})
    given = resolved(model={"name": DEIT, "init": DEIT}, optim={"lr": 1e-4})
    assert given.optim.head_lr is None
    assert sgd.optim.lr == pytest.approx(1.25e-4)  # it does not adapt, so its rate scales with the batch


@pytest.mark.parametrize(
    ("sections", "side"),
    [
        ({"data": {"source": "scenes"}}, 64),
        ({"data": {"source": "scenes", "img_size": 48}}, 48),
        ({"segment": {"crop": 40}, "data": {"img_size": 48}}, 40),
        ({"data": {"source": "masks/"}}, 64),
        ({"model": {"name": DEIT}, "data": {"source": "masks/"}}, None),
    ],
)
def test_crop_and_image_size_of_a_segmentation_are_equal(sections, side):
    sections = {**sections, "segment": {"head": "linear", **sections.get("segment", {})}}
    config = resolved(**sections, diversity={"preset": "none"})
    assert (config.segment.crop, config.data.img_size) == (side, side)
    assert resolve(config) == config


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"segment": {"head": "upernet"}, "diversity": {"preset": "cutmix"}}, "not mixed"),
        ({"segment": {"head": "upernet"}, "augment": {"mixup": 0.2}}, "not mixed"),
        ({"segment": {"head": "upernet"}, "augment": {"cutmix": 1.0}}, "not mixed"),
        ({"segment": {"head": "upernet"}, "diversity": {"mixing": 0.5}}, "needs patches of one class"),
        ({"optim": {"lr": 1e-5, "min_lr": 1e-4}}, "above the peak"),
        ({"model": {"freeze": "backbone"}}, "needs initial weights"),
        ({"model": {"weights": "raw"}}, "needs initial weights"),
        ({"diversity": {"gram": 0.5}}, "begins from random weights"),
    ],
)
def test_settings_that_contradict_one_another_are_errors(sections, what):
    with pytest.raises(UserError, match=what):
        resolved(**sections)


def test_policies_of_timm_are_accepted_and_others_are_errors():
    assert resolved(augment={"auto_augment": ""}).augment.auto_augment == ""
    for text in ("rand", "rand-m9-mstd0.5-inc1", "rand-n3-p0.7-m5", "rand-m12-mmax20", "rand-mstd101"):
        resolved(augment={"auto_augment": text})
        rand_augment_transform(text)
    for text in ("augmix-m3", "original", "9", "rand-", "rand-mx", "rand-m9.5", "rand-q1", "rand-m11", "rand-p2"):
        with pytest.raises(UserError, match="--aa"):
            resolved(augment={"auto_augment": text})
