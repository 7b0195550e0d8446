import pandas as pd
import pytest
import torch
from effects import HERE

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


def test_a_token_is_nearer_to_the_class_that_it_resembles(load):
    known = tokens(lambda image, place: RIGHT if image < 2 else UP)
    seen = torch.stack([torch.stack([2 * RIGHT, UP]), torch.stack([RIGHT + UP, 3 * RIGHT])])
    own, other = torch.tensor([[0, 0], [0, 1]]), torch.tensor([[1, 1], [1, 0]])
    found = load(SHARES).margins(known, torch.tensor([0, 0, 1, 1]), seen, own, other)
    assert found.sign().tolist() == [[1, -1], [0, -1]]


def test_the_page_has_the_numbers():
    table, page = pd.read_csv(HERE / "ablation" / "shares.csv"), (HERE / "ablation" / "README.md").read_text("utf-8")
    for variant, rows in table.groupby("variant"):
        cells = [f"{rows[name].mean():.2f} ± {rows[name].std():.2f}" for name in table.columns[2:]]
        assert f"| {variant} | {' | '.join(cells)} |" in page
