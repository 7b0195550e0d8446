import pandas as pd
import pytest
import torch
from effects import HERE, NOTHING

from pdvit.similarity import patch_similarity

RIGHT, UP = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
SHARES = HERE / "ablation" / "shares.py"


def tokens(say):
    """Four images of two patches each, of the classes 0, 0, 1, 1."""
    return torch.stack([torch.stack([say(image, place) for place in range(2)]) for image in range(4)])


@pytest.mark.parametrize(
    ("what", "say"),
    [
        ("all", lambda image, place: 3 * RIGHT),
        ("class", lambda image, place: UP if image < 2 else -UP),
        ("image", lambda image, place: UP if image % 2 else -2 * UP),
        ("place", lambda image, place: UP if place else -UP),
        ("rest", lambda image, place: UP if (image + place) % 2 else -UP),
    ],
)
def test_each_share_is_found_alone(load, what, say):
    found = load(SHARES).shares(tokens(say), torch.tensor([0, 0, 1, 1]))
    assert found == pytest.approx({**dict.fromkeys(("all", "class", "image", "place", "rest"), 0), what: 1})


def test_the_first_three_make_up_the_mean_cosine(load):
    drawn = torch.randn(12, 7, 5, generator=torch.Generator().manual_seed(0))
    found = load(SHARES).shares(drawn, torch.arange(12) % 3)
    alike = found["all"] + found["class"] + found["image"]
    assert (7 * alike - 1) / 6 == pytest.approx(float(patch_similarity(drawn, signed=True).mean()), abs=1e-6)
    assert sum(found.values()) == pytest.approx(1)
    assert min(found.values()) > 0


@pytest.mark.parametrize("kind", ["", "-long"])
def test_the_page_has_the_numbers(kind):
    table = pd.read_csv(HERE / "ablation" / f"shares{kind}.csv")
    page = (HERE / "ablation" / "README.md").read_text("utf-8")
    for variant, rows in table.groupby("variant"):
        cells = [told(rows[name]) for name in table.columns[2:]]
        assert f"| {variant} | {' | '.join(cells)} |" in page


def told(values: pd.Series) -> str:
    return NOTHING if values.isna().all() else f"{values.mean():.2f} ± {values.std():.2f}"
