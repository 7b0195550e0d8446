import pytest

from pdvit.config import build, resolve
from pdvit.config.idle import idle_settings
from pdvit.config.presets import PRESETS


def idle(**sections):
    return idle_settings(resolve(build(("test", sections))))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_by_itself_has_no_idle_setting(preset):
    assert idle(diversity={"preset": preset}) == []


@pytest.mark.parametrize(
    ("diversity", "augment", "said"),
    [
        ({"preset": "none", "cosine": 1.0, "mixing_schedule": "until:50%"}, {}, "diversity.mixing_schedule"),
        ({"preset": "none", "variant": "v1"}, {}, "diversity.variant"),
        ({"preset": "koleo", "variant": "v1"}, {}, "diversity.variant"),
        ({"preset": "none", "cosine_layers": "2"}, {}, "diversity.cosine_layers"),
        ({"preset": "none", "patch_head": "class"}, {}, "diversity.patch_head"),
        ({"preset": "none"}, {"mixup_mode": "elem"}, "augment.mixup_mode"),
        ({"preset": "none"}, {"mixup_prob": 1.0}, "augment.mixup_prob"),
        ({}, {"mixup_switch_prob": 0.1}, "augment.mixup_switch_prob"),
        ({}, {"color_jitter": 0.4, "auto_augment": "rand-m9-mstd0.5-inc1"}, "augment.color_jitter"),
        ({}, {"ratio": (1.0, 1.0)}, "augment.ratio"),
    ],
)
def test_a_setting_in_vain_is_named_with_the_reason(diversity, augment, said):
    (sentence,) = idle(diversity=diversity, augment=augment)
    assert sentence.startswith(f"{said} = ")
    assert "has no effect: " in sentence


def test_settings_that_act_are_not_named():
    diversity = {"mixing_schedule": "warmup:1ep", "variant": "v1", "cosine_layers": "2", "patch_head": "class"}
    assert idle(diversity=diversity, augment={"mixup": 0.8, "mixup_switch_prob": 0.2, "mixup_mode": "pair"}) == []


@pytest.mark.parametrize(("name", "value"), [("resident", "off"), ("crop_pct", 0.5)])
def test_what_is_for_image_files_does_nothing_for_digits(name, value):
    assert idle(data={name: value}) == [f"data.{name} = {value} has no effect: the digits lie in memory"]
    assert idle(data={name: value, "source": "photographs"}) == []


@pytest.mark.parametrize("preset", ["none", "paper"])
def test_a_segmentation_by_itself_has_no_idle_setting(preset):
    assert idle(segment={"head": "upernet"}, diversity={"preset": preset}) == []


@pytest.mark.parametrize(
    ("segment", "augment", "said"),
    [
        ({"width": 64}, {}, "segment.width"),
        ({"head": "linear", "width": 64}, {}, "segment.width"),
        ({"head": "linear", "norm": "group"}, {}, "segment.norm"),
        ({"stride": 8}, {}, "segment.stride"),
        ({"head": "upernet"}, {"shift": 2}, "augment.shift"),
        ({"head": "upernet"}, {"smoothing": 0.1}, "augment.smoothing"),
    ],
)
def test_what_only_another_task_or_head_has_is_named(segment, augment, said):
    (sentence,) = idle(segment=segment, augment=augment, diversity={"preset": "none"}, data={"source": "photographs"})
    assert sentence.startswith(f"{said} = ")


@pytest.mark.parametrize(("name", "value"), [("crop_pct", 0.5), ("crop_mode", "squash")])
def test_the_centre_crop_of_evaluation_does_nothing_for_images_with_masks(name, value):
    segment, data = {"head": "upernet"}, {name: value, "source": "photographs"}
    (sentence,) = idle(segment=segment, data=data, diversity={"preset": "none"})
    assert sentence.startswith(f"data.{name} = {value} has no effect: ")
    assert "the probe" in sentence


def test_flips_of_images_with_masks_act():
    assert idle(segment={"head": "upernet"}, augment={"hflip": 0.0}, diversity={"preset": "none"}) == []
