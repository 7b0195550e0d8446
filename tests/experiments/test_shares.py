import pytest
import torch
from regions import parts
from shares import shares

from pdvit.similarity import patch_similarity

RIGHT, UP = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


def tokens(token_of):
    """Four images of two patches each, of the classes 0, 0, 1, 1."""
    return torch.stack([torch.stack([token_of(image, place) for place in range(2)]) for image in range(4)])


ALONE = {
    "all": lambda image, place: 3 * RIGHT,
    "class": lambda image, place: UP if image < 2 else -UP,
    "image": lambda image, place: UP if image % 2 else -2 * UP,
    "place": lambda image, place: UP if place else -UP,
    "rest": lambda image, place: UP if (image + place) % 2 else -UP,
}


@pytest.mark.parametrize("name", ALONE)
def test_each_share_is_found_alone(name):
    found = shares(tokens(ALONE[name]), torch.tensor([0, 0, 1, 1]))
    assert found == pytest.approx(dict.fromkeys(ALONE, 0) | {name: 1})


def test_the_first_three_make_up_the_mean_cosine():
    drawn = torch.randn(12, 7, 5, generator=torch.Generator().manual_seed(0))
    found = shares(drawn, torch.arange(12) % 3)
    alike = found["all"] + found["class"] + found["image"]
    assert (7 * alike - 1) / 6 == pytest.approx(float(patch_similarity(drawn, signed=True).mean()), abs=1e-6)
    assert sum(found.values()) == pytest.approx(1)
    assert min(found.values()) > 0


def test_pairs_in_the_same_half_and_across_are_separate():
    right, up, both = [1.0, 0.0], [0.0, 2.0], [-3.0, -3.0]
    tokens = torch.tensor([[right, both, up, up]])
    same, across = parts(tokens, torch.tensor([True, True, False, False]))
    assert same == pytest.approx((0.5**0.5 + 1) / 2)
    assert across == pytest.approx((0 + 0 + 0.5**0.5 + 0.5**0.5) / 4)
