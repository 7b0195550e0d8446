import tomllib
from pathlib import Path

import pytest

from pdvit.config import build, to_toml
from pdvit.config.upgrade import as_today

OLD = tomllib.loads((Path(__file__).parents[2] / "golden" / "checkpoint-v1" / "run.toml").read_text())


def test_an_old_recipe_on_digits_goes_on_without_flip_and_crop():
    config = build(("old", OLD))
    assert (config.augment.hflip, config.augment.scale, config.augment.shift) == (None, None, 1)
    assert "hflip" in OLD["augment"]


def test_an_old_recipe_on_files_keeps_them():
    config = build(("old", {**OLD, "data": {**OLD["data"], "source": "photographs"}}))
    assert (config.augment.hflip, config.augment.scale) == (0.5, (0.35, 1.0))


@pytest.mark.parametrize("written", [{"augment": {"hflip": 0.5, "scale": [0.5, 1.0]}}, {"data": {"source": "digits"}}])
def test_what_a_user_writes_stays(written):
    assert as_today(written) == written
    today = build(("new", {"augment": {"hflip": 0.5, "scale": [0.5, 1.0]}}))
    assert build(("again", tomllib.loads(to_toml(today, "")))) == today


def test_a_file_of_a_user_with_some_of_the_keys_stays():
    written = {"data": {"source": "digits", "split_seed": 3}, "augment": {"hflip": 0.5, "scale": [0.5, 1.0]}}
    config = build(("mine", written))
    assert (config.augment.hflip, config.augment.scale) == (0.5, (0.5, 1.0))
