import tomllib
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_origin

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pdvit.config import Config, build, parse_set, read_toml, resolve, to_dict, to_toml
from pdvit.config.duration import SECONDS
from pdvit.config.schema import KEYS, SECTIONS, LaunchConfig
from tests.errors import refused

WORDS = st.text(max_size=8)
LEAVES = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | WORDS
TABLES = st.dictionaries(WORDS, LEAVES.filter(lambda value: value is not None) | st.lists(st.integers(), max_size=2))


def values_of(key):
    """Draw a legal value of a key."""
    if key.choices:
        return st.sampled_from(key.choices)
    if key.unit:
        texts = ["3", "90min", "20s"] if key.unit in SECONDS else ["3", "3ep", "200st", "1e3im"]
        return st.sampled_from(texts) | st.integers(1, 100)
    if key.name.endswith("_schedule"):
        return st.sampled_from(["constant", "warmup:3", "decay:10%,until:1e6im"])
    if key.name == "auto_augment":
        return st.sampled_from(["", "rand-m9-mstd0.5-inc1"])
    if get_origin(key.type) is tuple:
        count = len(get_args(key.type))
        return st.lists(st.floats(0.01, 1), min_size=count, max_size=count).map(sorted).map(tuple)
    floats = st.floats(max(0.001, key.above or 0), 0.9, exclude_min=True)
    by_type = {bool: st.booleans(), int: st.integers(8, 1000), float: floats, str: WORDS, dict: TABLES}
    return by_type[get_origin(key.type) or key.type]


def layers():
    values = {name: {key.name: values_of(key) for key in KEYS.values() if key.section == name} for name in SECTIONS}
    sections = {name: st.fixed_dictionaries({}, optional=section) for name, section in values.items()}
    return st.fixed_dictionaries({}, optional=sections)


def without_places(config):
    return replace(config, run=replace(config.run, out=None, name=None), launch=LaunchConfig())


def test_later_layers_win_key_by_key():
    assert build() == Config()
    file, flags = {"lr": 1.0, "opt": "sgd", "weight_decay": 0.5}, {"lr": 2.0, "opt": "lion"}
    optim = build(("file", {"optim": file}), ("flags", {"optim": flags}), ("--set", {"optim": {"lr": 3.0}})).optim
    assert (optim.lr, optim.opt, optim.weight_decay, optim.min_lr) == (3.0, "lion", 0.5, Config().optim.min_lr)


@pytest.mark.parametrize(
    ("layer", "what", "tip"),
    [
        ({"optmi": {"lr": 1.0}}, "'optmi'", "'optim'"),
        ({"optim": {"weight_decai": 1.0}}, "'optim.weight_decai'", "'optim.weight_decay'"),
        ({"optim": {"schedule": "cosin"}}, "'cosin'", "'cosine'"),
        ({"lr": 1}, "'lr'", "optim.lr"),
        ({"swep": {"run.seed": [1]}}, "'swep'", "'sweep'"),
        ({"sweep": {"run.seed": [1]}}, "'sweep'", "--config"),
        ({"optim": 3}, "is a section", "optim.KEY"),
        ({"data": {"batch_size": "64"}}, "not a whole number", ""),
        ({"data": {"batch_size": True}}, "not a whole number", ""),
        ({"data": {"source": [3]}}, "not a text", ""),
        ({"optim": {"lr": "fast"}}, "not a number", ""),
        ({"optim": {"epochs": True}}, "not a text", ""),
        ({"augment": {"scale": [0.1]}}, "not a list of 2 numbers", ""),
        ({"augment": {"scale": [0.1, "x"]}}, "not a number", ""),
        ({"model": {"args": 3}}, "not a table", ""),
        ({"model": {"depth": None}}, "not a whole number", ""),
        ({"augment": {"mixup_prob": 2}}, "out of range", "at least 0 and at most 1"),
        ({"data": {"batch_size": 0}}, "out of range", "at least 1"),
        ({"optim": {"lr": 0.0}}, "out of range", "above 0"),
        ({"optim": {"lr": float("nan")}}, "out of range", ""),
        ({"optim": {"epochs": "0ep"}}, "out of range", ""),
        # torch.manual_seed and scikit-learn's random_state fail on larger seeds
        ({"run": {"seed": 2**64}}, "out of range", ""),
        *(({name: {key: 10**400}}, "out of range", "") for name, key in (("optim", "lr"), ("data", "source"))),
        *(({"data": {"workers": 10**5}}, "out of range", ""), ({"model": {"depth": 10**6}}, "out of range", "")),
        ({"data": {"split_seed": 2**32}}, "out of range", ""),
        ({"augment": {"scale": [0.5, 1.5]}}, "out of range", ""),
        ({"augment": {"scale": [0.9, 0.1]}}, "above the maximum", "swap"),
    ],
)
def test_an_error_names_the_mistake_and_the_closest_name(layer, what, tip):
    with refused(what, "the file", tip):
        build(("the file", layer))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [("optim.lr", 1, 1.0), ("optim.epochs", 36, "36"), ("diversity.first", 3, "3"), ("data.batch_size", "auto", 0)],
)
def test_values_are_converted_to_the_type_of_the_key(key, value, expected):
    section, _, item = key.partition(".")
    config = build(("file", {section: {item: value}}))
    assert build(("again", to_dict(config))) == config
    found = getattr(getattr(config, section), item)
    assert found == expected
    assert type(found) is type(expected)


def test_set_reads_toml_or_plain_text_and_needs_section_key_and_value():
    values = {"optim.lr=1e-3": 1e-3, "optim.opt = adamw": "adamw", "augment.scale=[0.1, 1.0]": [0.1, 1.0]}
    values |= {"model.args={qk_norm = true}": {"qk_norm": True}, "data.source=a=b": "a=b"}
    for text, value in values.items():
        section, item = text.partition("=")[0].strip().split(".")
        assert parse_set(text) == {section: {item: value}}
    for text in ("", "lr=1", "optim.lr", ".lr=1", "optim.=1"):
        with refused(where="--set"):
            parse_set(text)


@pytest.mark.parametrize("content", [None, b"[optim", b"\xff\xfe", b"[optim]\nlr = 1\nlr = 2\n", b"a = " + b"[" * 9999])
def test_a_file_that_is_missing_or_not_toml_is_an_error(tmp_path, content):
    with refused("larger than"):
        read_toml(Path("/dev/zero"))
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_bytes(content)
    with refused("can't be read") as caught:
        read_toml(file)
    assert caught.value.where == str(file)


def mixes(layer) -> bool:
    """Whether images would be mixed, which a segmentation refuses."""
    diversity, augment = layer.get("diversity", {}), layer.get("augment", {})
    by_preset = diversity.get("preset") == "cutmix" and "cutmix" not in augment
    return bool(diversity.get("mixing") or augment.get("cutmix") or augment.get("mixup") or by_preset)


@settings(max_examples=50, deadline=None)
@given(layers())
def test_toml_goes_round_and_resolving_twice_changes_nothing(layer):
    config = build(("made", layer))
    assert build(("written", tomllib.loads(to_toml(config, "pdvit train")))) == without_places(config)
    assume("init" in layer.get("model", {}) or not {"freeze", "weights"} & set(layer.get("model", {})))
    assume("init" in layer.get("model", {}) or not layer.get("diversity", {}).get("gram"))
    assume("head" not in layer.get("segment", {}) or not mixes(layer))
    config = resolve(build(("made", layer), ("any peak is above it", {"optim": {"min_lr": 0.0}})))
    assert resolve(config) == config
    written = build(("written", tomllib.loads(to_toml(config, "pdvit train"))))
    assert resolve(written) == without_places(config)


# A command line can hold any character but NUL.
@settings(max_examples=30)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_any_command_stays_in_its_comment(command):
    assert tomllib.loads(to_toml(Config(), command)) == to_dict(Config())
