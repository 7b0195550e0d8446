import pytest

from pdvit.config import build, resolve
from pdvit.config.presets import PRESETS
from pdvit.errors import UserError


def resolved(**sections):
    return resolve(build(("flags", sections)))


@pytest.mark.parametrize(
    ("diversity", "weights", "cutmix"),
    [
        ({}, (1, 1, 1), 1),
        ({"preset": "paper"}, (1, 1, 1), 1),
        ({"preset": "none"}, (0, 0, 0), 0),
        ({"preset": "cutmix"}, (0, 0, 0), 1),
        ({"preset": "none", "cosine": 0.5}, (0.5, 0, 0), 0),
        ({"preset": "none", "mixing": 2.0}, (0, 0, 2), 1),
        ({"mixing": 0.0}, (1, 1, 0), 0),
        ({"preset": "cutmix", "contrastive": 3.0}, (0, 3, 0), 1),
    ],
)
def test_a_preset_becomes_weights_and_explicit_weights_win(diversity, weights, cutmix):
    config = resolved(diversity=diversity)
    assert (config.diversity.cosine, config.diversity.contrastive, config.diversity.mixing) == weights
    assert config.augment.cutmix == cutmix


@pytest.mark.parametrize(
    ("preset", "variant", "weights", "cutmix"),
    [
        ("paper", "paper", (1, 1, 1, 0, 0), 1),
        ("v1", "v1", (1, 1, 1, 0, 0), 1),
        ("released", "released", (0, 1, 1, 0, 0), 1),
        ("diverse-vit", "diverse-vit", (0.5, 0.5, 1, 0, 0), 1),
        ("koleo", "paper", (0, 0, 0, 1, 0), 0),
        ("spectral", "paper", (0, 0, 0, 0, 1), 0),
        ("cutmix", "paper", (0, 0, 0, 0, 0), 1),
        ("none", "paper", (0, 0, 0, 0, 0), 0),
    ],
)
def test_every_preset_spells_out_the_form_and_the_weights(preset, variant, weights, cutmix):
    config = resolved(diversity={"preset": preset})
    found = config.diversity
    assert (found.cosine, found.contrastive, found.mixing, found.koleo, found.spectral) == weights
    assert (found.variant, config.augment.cutmix) == (variant, cutmix)


def test_an_explicit_variant_wins_over_the_preset():
    found = resolved(diversity={"preset": "paper", "variant": "v1"}).diversity
    assert (found.variant, found.cosine) == ("v1", 1)


def test_an_explicit_cutmix_wins_over_the_preset():
    assert resolved(augment={"cutmix": 0.0}).augment.cutmix == 0
    assert resolved(diversity={"preset": "none"}, augment={"cutmix": 0.3}).augment.cutmix == 0.3


def test_the_small_model_stands_in_where_none_is_named():
    config = resolved()
    model = config.model
    assert (model.name, model.depth, model.width, model.heads, model.patch_size) == (
        "vit_tiny_patch16_224",
        8,
        48,
        3,
        4,
    )
    assert config.data.img_size == 32
    assert config.optim.lr == 1e-3


@pytest.mark.parametrize(("width", "heads"), [(96, 6), (16, 1), (8, 1)])
def test_heads_of_the_small_model_keep_16_channels_each(width, heads):
    assert resolved(model={"width": width}).model.heads == heads


def test_what_is_given_for_the_small_model_stays():
    config = resolved(model={"depth": 2, "heads": 4, "patch_size": 8}, data={"img_size": 64}, optim={"lr": 0.5})
    assert (config.model.depth, config.model.heads, config.model.patch_size) == (2, 4, 8)
    assert (config.data.img_size, config.optim.lr) == (64, 0.5)


def test_a_named_model_keeps_its_own_shape():
    config = resolved(model={"name": "deit_small_patch16_224"})
    assert (config.model.depth, config.model.width, config.model.heads, config.data.img_size) == (None,) * 4


@pytest.mark.parametrize(("batch", "lr"), [(512, 5e-4), (1024, 1e-3), (64, 6.25e-5)])
def test_the_learning_rate_of_a_named_model_grows_with_the_batch(batch, lr):
    config = resolved(model={"name": "deit_small_patch16_224"}, data={"batch_size": batch})
    assert config.optim.lr == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize(("batch", "lr"), [(16, 6e-5), (8, 3e-5), (64, 2.4e-4)])
@pytest.mark.parametrize("init", [{}, {"init": "deit_base_patch16_224.fb_in1k"}])
def test_a_named_model_with_a_head_for_pixels_has_the_papers_rate(init, batch, lr):
    sections = {"model": {"name": "deit_base_patch16_224"} | init, "data": {"batch_size": batch}}
    config = resolved(**sections, segment={"head": "upernet"}, diversity={"preset": "none"})
    assert config.optim.lr == pytest.approx(lr, rel=1e-12)


def test_small_models_with_a_head_for_pixels_keep_their_rate():
    segment, diversity = {"head": "upernet"}, {"preset": "none"}
    assert resolved(segment=segment, diversity=diversity).optim.lr == 1e-3
    small = {"name": "vit_tiny_patch16_224", "width": 48, "init": "runs/small"}
    assert resolved(segment=segment, diversity=diversity, model=small).optim.lr == 1e-3


def test_a_rate_that_would_rise_to_its_end_is_refused():
    with pytest.raises(UserError, match="above the peak"):
        resolve(build(("flags", {"optim": {"lr": 1e-5, "min_lr": 1e-4}})))


def test_the_released_form_alone_has_no_cosine_term():
    diversity = resolve(build(("here", {"diversity": {"variant": "released"}}))).diversity
    assert (diversity.cosine, diversity.contrastive, diversity.mixing) == (0.0, 1.0, 1.0)


def test_the_preset_says_which_tokens_are_read():
    of = {name: resolve(build(("here", {"diversity": {"preset": name}}))).diversity for name in PRESETS}
    assert (of["released"].first, of["released"].last, of["released"].patch_head) == ("patches", "norm", "own")
    assert (of["diverse-vit"].first, of["diverse-vit"].last, of["diverse-vit"].patch_head) == (
        "embed",
        "block",
        "class",
    )
    assert (of["paper"].first, of["paper"].last, of["paper"].patch_head) == ("block", "norm", "own")


def test_a_layer_may_be_given_as_a_number():
    diversity = build(("here", {"diversity": {"first": 3, "cosine_layers": 6}})).diversity
    assert (diversity.first, diversity.cosine_layers) == ("3", "6")


@pytest.mark.parametrize(
    ("sections", "side"),
    [
        ({"data": {"source": "scenes"}}, 64),
        ({"data": {"source": "scenes", "img_size": 48}}, 48),
        ({"segment": {"crop": 40}, "data": {"img_size": 48}}, 40),
        ({"data": {"source": "masks/"}}, 64),
        ({"model": {"name": "vit_small_patch16_224"}, "data": {"source": "masks/"}}, None),
    ],
)
def test_crop_and_image_size_are_one_in_a_segmentation(sections, side):
    sections = {**sections, "segment": {"head": "linear", **sections.get("segment", {})}}
    config = resolved(**sections, diversity={"preset": "none"})
    assert (config.segment.crop, config.data.img_size) == (side, side)
    assert resolve(config) == config


@pytest.mark.parametrize(
    "sections", [{"diversity": {"preset": "cutmix"}}, {"augment": {"mixup": 0.2}}, {"augment": {"cutmix": 1.0}}]
)
def test_images_with_masks_are_not_mixed(sections):
    with pytest.raises(UserError, match="not mixed"):
        resolved(segment={"head": "upernet"}, **sections)


def test_segmentation_takes_a_presets_terms_but_mixing():
    config = resolve(build(("here", {"segment": {"head": "linear"}, "diversity": {"preset": "paper"}})))
    assert (config.diversity.cosine, config.diversity.contrastive, config.diversity.mixing) == (1, 1, 0)
    assert config.augment.cutmix == 0
    assert resolve(config) == config
    with pytest.raises(UserError, match="mixing term needs whole patches"):
        resolve(build(("here", {"segment": {"head": "linear"}, "diversity": {"mixing": 0.5}})))
