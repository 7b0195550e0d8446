import random

import pytest
import torch
from timm.data.random_erasing import RandomErasing

from pdvit.data.augment.erase import DRAWS, erase, erase_boxes, normal
from pdvit.data.randomness import uniform


def boxes(count, probability, height=32, width=32):
    return erase_boxes(uniform(5, torch.arange(count), DRAWS), probability, height, width)


def test_rectangles_are_those_of_timm_in_number_size_and_shape():
    """Compared as distributions: timm draws from Python's generator."""
    count, side = 6000, 32
    found = boxes(count, 0.4, side, side)
    random.seed(0)
    erasing, theirs = RandomErasing(0.4, mode="const", device="cpu"), []
    for _ in range(count):
        rows, columns = (erasing(torch.ones(1, side, side))[0] == 0).nonzero(as_tuple=True)
        spans = [(int(at.min()), int(at.max() - at.min()) + 1) if len(at) else (0, 0) for at in (rows, columns)]
        theirs.append([spans[0][0], spans[1][0], spans[0][1], spans[1][1]])
    expected = torch.tensor(theirs)
    assert ((found[:, 2] > 0).double().mean() - (expected[:, 2] > 0).double().mean()).abs() < 0.03
    ours, theirs = (rows[rows[:, 2] > 0].double() for rows in (found, expected))
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.6, rtol=0)
    torch.testing.assert_close(ours.std(0), theirs.std(0), atol=0.6, rtol=0)
    assert (ours[:, :2] >= 0).all()
    assert ((ours[:, :2] + ours[:, 2:]) <= side).all()


def test_only_the_rectangle_becomes_noise():
    images = torch.full((50, 3, 20, 24), 9.0)
    chosen = boxes(50, 0.5, 20, 24)
    erased = erase(images.clone(), chosen, 1, torch.arange(50))
    inside = torch.zeros(50, 20, 24, dtype=torch.bool)
    for row, (top, left, tall, wide) in enumerate(chosen.tolist()):
        inside[row, top : top + tall, left : left + (wide if tall else 0)] = True
    assert torch.equal((erased != images).all(1), inside)
    assert torch.equal((erased != images).any(1), inside)
    values = erased.movedim(1, -1)[inside]
    assert float(values.mean()) == pytest.approx(0, abs=0.05)
    assert float(values.std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_the_probability_has_its_ends(probability, share):
    assert (boxes(500, probability)[:, 2] > 0).double().mean() == share


def test_noise_is_normal_and_a_function_of_seed_and_sample():
    noise = normal(1, torch.arange(200), 501)
    assert noise.shape == (200, 501)
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float((noise**2).mean()) == pytest.approx(1, abs=0.02)
    assert float((noise**4).mean()) == pytest.approx(3, abs=0.15)
    assert torch.isfinite(noise).all()
    assert torch.equal(normal(1, torch.tensor([7]), 501)[0], noise[7])
    assert not torch.equal(normal(2, torch.tensor([7]), 501)[0], noise[7])
