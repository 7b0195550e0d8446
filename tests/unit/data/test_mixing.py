import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from pdvit.config.schema import AugmentConfig
from pdvit.data.mixing import MODES, Mixing, draw_pasted, partners, patch_cutmix
from pdvit.errors import UserError

CLASSES, SIZE = 7, 6


def mixup(**options) -> Mixing:
    return Mixing(AugmentConfig(**{"mixup": 1.0, "mixup_prob": 1.0} | options), 2, CLASSES, labels=True)


def make(batch: int, rows: int, columns: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images in which every pixel value occurs once, and random classes."""
    shape = (batch, 2, rows * size, columns * size)
    images = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    return images, torch.randint(CLASSES, (batch,), generator=torch.Generator().manual_seed(seed))


def patches(images: Tensor, size: int) -> Tensor:
    """Cut images into patches `(B, N, values)`, row by row of the grid."""
    return F.unfold(images, size, stride=size).transpose(1, 2)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.2, 1.0, 5.0]),
)
def test_patches_are_pasted_whole_in_one_rectangle_with_their_classes(batch, rows, columns, size, seed, alpha):
    images, targets = make(batch, rows, columns, size, seed)
    copies = images.clone(), targets.clone()
    mixed = patch_cutmix(images, targets, size, CLASSES, alpha, random.Random(seed))
    assert torch.equal(images, copies[0])
    assert torch.equal(targets, copies[1])
    before, after = patches(images, size), patches(mixed.images, size)
    equal = (after[:, :, None] == before.transpose(0, 1)).all(-1)  # (image, place, image it may come from)
    assert (equal.sum(-1) == 1).all()
    assert torch.equal(mixed.patch_targets, targets[equal.int().argmax(-1)])
    expected = F.one_hot(mixed.patch_targets, CLASSES).double().mean(1)
    assert mixed.targets.dtype == torch.float32
    torch.testing.assert_close(mixed.targets.double(), expected, rtol=0, atol=1e-7)
    pasted = (after != before).any(-1).any(0).view(rows, columns)
    assert torch.equal(pasted, pasted.any(1)[:, None] & pasted.any(0))
    for line in (pasted.any(1), pasted.any(0)):
        assert int(line.int().diff().abs().sum()) + int(line[0]) + int(line[-1]) in (0, 2)  # one run, or none


def test_without_a_generator_the_seed_of_python_decides():
    images, targets = make(2, 16, 16, 1)
    found = []
    for _ in range(2):
        random.seed(5)
        found.append([patch_cutmix(images, targets, 1, CLASSES).images for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_the_fraction_of_the_pasted_area_follows_the_beta_distribution(alpha):
    fractions = draw_pasted(1500, 64, 64, alpha, "elem", random.Random(0)).float().mean((1, 2))
    assert fractions.mean().item() == pytest.approx(0.5, abs=0.03)
    for limit in (0.1, 0.25, 0.5, 0.75, 0.9):  # not nearer to the ends, where whole patches pile up
        below = (fractions <= limit).float().mean().item()
        assert below == pytest.approx(stats.beta(alpha, alpha).cdf(limit), abs=0.04)


@pytest.mark.parametrize("grid", [(24, 24), (7, 7), (4, 4), (2, 2), (1, 2), (3, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("alpha", [0.01, 1.0, 20.0])
def test_both_images_stay_present(grid, alpha):
    pasted = draw_pasted(2000, *grid, alpha, "elem", random.Random(0))
    fractions = pasted.float().mean((1, 2))
    assert fractions.min() > 0
    assert fractions.max() <= 1 - 1 / max(grid) + 1e-6  # at least a row or column stays
    if grid == (4, 4) and alpha == 1.0:  # Beta's upper quarter or so is rounded to 3/4, whichever side stays
        largest = pasted[fractions == fractions.max()].float().mean(0)
        assert largest[0].mean().item() == pytest.approx(largest[:, -1].mean().item(), abs=0.06)
        assert fractions.mean().item() == pytest.approx(0.46, abs=0.02)


@pytest.mark.parametrize(("mode", "boxes"), [("batch", 1), ("pair", 3), ("elem", 6)])
def test_the_mode_decides_which_images_have_a_rectangle_in_common(mode, boxes):
    images, _ = make(6, 8, 8, 2)
    mixed = patch_cutmix(images, torch.arange(6), 2, 6, rng=random.Random(3), mode=mode)
    pasted = (patches(mixed.images, 2) != patches(images, 2)).any(-1)
    assert len({tuple(row) for row in pasted.tolist()}) == boxes
    partner = {0: 1, 1: 0, 2: 3, 3: 2, 4: 5, 5: 4} if mode == "pair" else {i: (i - 1) % 6 for i in range(6)}
    for image, here in enumerate(pasted):
        assert torch.equal(patches(mixed.images, 2)[image, here], patches(images, 2)[partner[image], here])
        assert (mixed.patch_targets[image, here] == partner[image]).all()
        assert (mixed.patch_targets[image, ~here] == image).all()
        assert mixed.targets[image, image] == pytest.approx(1 - here.float().mean().item())


@pytest.mark.parametrize("mode", MODES)
def test_an_image_may_have_several_labels_and_a_batch_no_image(mode):
    images, _ = make(4, 4, 4, 2)
    labels = torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0]])
    mixed = patch_cutmix(images, labels, 2, 3, rng=random.Random(1), mode=mode)
    single = patch_cutmix(images, torch.arange(4), 2, 4, rng=random.Random(1), mode=mode)
    assert torch.equal(mixed.images, single.images)
    assert torch.equal(mixed.patch_targets, labels[single.patch_targets])
    torch.testing.assert_close(mixed.targets, mixed.patch_targets.mean(1))
    empty = patch_cutmix(images[:0], labels[:0], 2, 3, mode=mode)
    assert [len(part) for part in empty] == [0, 0, 0]


@pytest.mark.parametrize(
    ("shape", "targets", "options", "what"),
    [
        ((2, 3, 8, 8), [0, 1, 2], {}, "shape"),
        ((3, 8, 8), [0, 1, 2], {}, "shape"),
        ((2, 3, 8, 8), [[0.5, 0.5], [1, 0]], {}, "shape"),
        ((3, 3, 8, 8), [[0.5, 0.5, 0], [1, 0, 0]], {}, "shape"),
        ((2, 3, 30, 32), [0, 1], {}, "patches of 4 pixels do not fit images of 30x32"),
        ((2, 3, 32, 30), [0, 1], {}, "patches of 4 pixels do not fit images of 32x30"),
        ((2, 3, 8, 8), [0, 1], {"mode": "each"}, "no mode 'each'"),
        ((2, 3, 8, 8), [0, 1], {"alpha": -1.0}, "alpha is -1.0"),
    ],
)
def test_invalid_arguments_are_refused(shape, targets, options, what):
    with pytest.raises(UserError, match=what):
        patch_cutmix(torch.zeros(shape), torch.tensor(targets), patch_size=4, num_classes=3, **options)


def mix(mixing: Mixing, size: int = SIZE) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Mix images of one value each, their place in the batch; return also the fraction of the partner in each."""
    place = torch.arange(float(size))
    images = place[:, None, None, None].expand(-1, 3, 4, 6)
    mixed = mixing.mix(images, torch.arange(size) % CLASSES, 0, 0, size, range(size))
    return *mixed, (mixed[0][:, 0, 0, 0] - place) / (partners(size, mixing.config.mixup_mode) - place)


@pytest.mark.parametrize(("mode", "different"), [("batch", 1), ("pair", 3), ("elem", 6)])
def test_mixup_blends_pixels_and_targets_alike(mode, different):
    images, targets, patch_targets, fraction = mix(mixup(mixup_mode=mode))
    assert ((fraction >= 0) & (fraction <= 1)).all()
    assert len({round(value, 4) for value in fraction.tolist()}) == different
    assert (images == images[:, :1, :1, :1]).all()
    own, other = torch.eye(CLASSES)[:SIZE], torch.eye(CLASSES)[partners(SIZE, mode)]
    torch.testing.assert_close(targets, (1 - fraction)[:, None] * own + fraction[:, None] * other)
    assert torch.equal(patch_targets, targets[:, None].expand(-1, 6, -1))


def test_fractions_follow_the_beta_distribution():
    fraction = mix(mixup(mixup=0.4, mixup_mode="elem"), size=3000)[-1]
    assert stats.kstest(fraction.numpy(), stats.beta(0.4, 0.4).cdf).pvalue > 0.01


@pytest.mark.parametrize(("fraction", "low", "high"), [(0.0, 0, 0), (0.3, 80, 160), (1.0, 400, 400)])
def test_cutmix_and_mixup_take_turns_in_a_fraction_of_the_batches(fraction, low, high):
    for change in ({"mixup_switch_prob": fraction}, {"mixup": 0.0, "mixup_prob": fraction}):
        mixing = mixup(cutmix=1.0, **change)
        assert low <= sum(mixing.draws(0, step)[0] == "cutmix" for step in range(400)) <= high
