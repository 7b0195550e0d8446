import pytest

from pdvit.config import build, resolve
from pdvit.config.schema import PRESETS
from pdvit.data.unused import unused_settings

NONE, UPERNET = {"preset": "none"}, {"head": "upernet"}


def unused(inherited=(), **sections):
    config = resolve(build(("test", sections)))
    return unused_settings(config, config.data.source == "digits", inherited)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_no_unused_setting(preset):
    assert unused(diversity={"preset": preset}) == []


@pytest.mark.parametrize(
    "sections",
    [
        {"diversity": {"mixing_schedule": "warmup:1ep", "variant": "v1", "cosine_layers": "2", "patch_head": "class"}},
        {"augment": {"mixup": 0.8, "mixup_switch_prob": 0.2, "mixup_mode": "pair"}},
        {"data": {"resident": "off", "crop_pct": 0.5, "source": "photographs"}},
        {"segment": UPERNET, "diversity": NONE, "augment": {"hflip": 0.0}},
        {"segment": UPERNET, "diversity": {"preset": "paper"}},
    ],
)
def test_settings_with_an_effect_are_not_named(sections):
    assert unused(**sections) == []


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("diversity.mixing_schedule", {"diversity": {**NONE, "cosine": 1.0, "mixing_schedule": "until:50%"}}),
        ("diversity.variant", {"diversity": {"preset": "koleo", "variant": "v1"}}),
        ("diversity.cosine_layers", {"diversity": {**NONE, "cosine_layers": "2"}}),
        ("diversity.patch_head", {"diversity": {**NONE, "patch_head": "class"}}),
        ("augment.mixup_mode", {"diversity": NONE, "augment": {"mixup_mode": "elem"}}),
        ("augment.color_jitter", {"augment": {"color_jitter": 0.4, "auto_augment": "rand-m9"}}),
        ("augment.ratio", {"augment": {"ratio": (1.0, 1.0)}}),
        ("data.crop_pct", {"data": {"crop_pct": 0.5}}),
        ("data.download", {"data": {"source": "a.tar", "download": True}}),
        ("data.input_key", {"data": {"source": "torch/cifar100", "input_key": "img"}}),
        ("segment.width", {"segment": {"width": 64}}),
        ("augment.smoothing", {"segment": {"head": "linear"}, "augment": {"smoothing": 0.1}, "diversity": NONE}),
    ],
)
def test_a_setting_without_effect_is_named_with_the_reason(name, sections):
    (note,) = unused(**sections)
    assert unused(inherited={name}, **sections) == []
    assert note.startswith(f"{name} = ")
    assert "has no effect: " in note
