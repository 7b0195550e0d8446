"""What the paper's rows cost, against the multiplications that the models' own repositories state."""

import pandas as pd
import pytest
from costs import HERE, cost_of, forward_operations

from pdvit.config import build, read_toml, resolve

# Thousand millions of multiplications of a forward pass: README_deit.md of DeiT, README of Swin, for one image.
PUBLISHED = {"deit-s12-224": 4.6, "swin-t-224": 4.5}
LARGE = {"swin-s-224": 8.7, "swin-b-224": 15.4, "swin-l-384": 103.9}


@pytest.mark.parametrize(
    ("recipe", "published"),
    [*PUBLISHED.items(), *(pytest.param(*row, marks=pytest.mark.slow) for row in LARGE.items())],
)
def test_a_forward_pass_takes_what_is_published(recipe, published):
    config = resolve(build(("recipe", read_toml(HERE / "recipes" / f"{recipe}.toml"))))
    assert forward_operations(config, 1000) / 2e9 == pytest.approx(published, abs=0.06)


def test_a_row_has_the_images_of_all_its_epochs_and_the_table_is_of_this_code():
    row = cost_of(HERE / "recipes" / "deit-b12-224.toml")
    assert row is not None
    assert row["images"] == 400 * (1_281_167 // 576) * 576
    assert row["operations"] == 3 * row["forward"] * row["images"]
    table = pd.read_csv(HERE / "costs.csv", index_col="recipe")
    assert row["operations"] == int(table.loc["deit-b12-224", "operations"])


def test_recipes_of_other_data_have_no_row():
    assert cost_of(HERE / "recipes" / "digits.toml") is None
