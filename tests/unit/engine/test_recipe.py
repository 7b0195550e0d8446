from itertools import product

import pytest

from pdvit.config import build, resolve, to_dict
from pdvit.config.schema import KEYS
from pdvit.engine.recipe import FIXED, check_changes, check_data, check_recipe
from pdvit.errors import UserError

RECIPE = {"optim": {"lr": 0.1, "min_lr": 0.0, "opt": "adamw"}, "run": {"seed": 3}}


def test_another_recipe_is_refused_by_its_keys():
    other = to_dict(resolve(build(("here", {"optim": {"lr": 0.2, "min_lr": 0.0, "opt": "lion"}, "run": {"seed": 3}}))))
    with pytest.raises(UserError, match=r"optim\.lr was 0\.1, is 0\.2; optim\.opt was 'adamw', is 'lion'"):
        check_recipe(RECIPE, other, {}, "here")
    with pytest.raises(UserError, match=r"optim\.opt"):
        check_recipe(RECIPE, other, {"optim.lr": 0.2}, "here")
    check_recipe(RECIPE, other, {"optim.lr": 0.2, "optim.opt": "lion"}, "here")


def test_what_is_fixed_exists_and_is_refused():
    assert KEYS.keys() >= FIXED
    for key in FIXED:
        with pytest.raises(UserError, match=key):
            check_changes({key: (1, 2)}, "--change")
    free = ["optim.lr", "run.device", "data.workers", "data.source", "model.drop_path", "diversity.mixing"]
    check_changes(dict.fromkeys(free, (1, 2)), "--change")
    for key, values in product(("diversity.mixing", "diversity.gram", "segment.aux"), ((0.0, 1.0), (1.0, 0.0))):
        with pytest.raises(UserError, match=key):
            check_changes({key: values}, "--change")


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"classes": 3, "train": {"images": 9, "hash": "a"}}, "train has 9 images, and had 10"),
        ({"classes": 3, "train": {"images": 10, "hash": "b"}}, "train has changed"),
        ({"classes": 2, "train": {"images": 10, "hash": "a"}}, "classes: there were 3, now 2"),
        ({"classes": 3, "train": {"images": 10, "hash": "a"}, "test": {"images": 1, "hash": "c"}}, "test"),
    ],
)
def test_other_data_are_refused(data, named):
    saved = {"classes": 3, "train": {"images": 10, "hash": "a"}}
    check_data(saved, dict(saved), "here")
    with pytest.raises(UserError, match=named):
        check_data(saved, data, "here")
