import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from pdvit.data.mixing import MODES, Mixed, patch_cutmix
from pdvit.errors import UserError

CLASSES = 7
CASES = {
    "batch": st.integers(1, 5),
    "rows": st.integers(1, 6),
    "columns": st.integers(1, 6),
    "size": st.integers(1, 3),
    "seed": st.integers(0, 2**32),
    "alpha": st.sampled_from([0.0, 0.2, 1.0, 5.0]),
}
few = settings(max_examples=40, deadline=None)


def make(batch: int, rows: int, columns: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images in which every pixel value occurs once, and random classes."""
    shape = (batch, 2, rows * size, columns * size)
    images = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    return images, torch.randint(CLASSES, (batch,), generator=torch.Generator().manual_seed(seed))


def patches(images: Tensor, size: int) -> Tensor:
    """Cut images into patches `(B, N, values)`, row by row of the grid."""
    return F.unfold(images, size, stride=size).transpose(1, 2)


def mixed_patches(mixed: Mixed, images: Tensor, size: int) -> Tensor:
    """Which patches were pasted, `(N,)`; the same for every image of a batch."""
    return (patches(mixed.images, size) != patches(images, size)).any(-1).any(0)


def pasted_share(rows: int, alpha: float, draws: int) -> list[float]:
    rng = random.Random(0)
    images, targets = torch.zeros(2, 1, rows, rows), torch.tensor([0, 1])
    return [patch_cutmix(images, targets, 1, 2, alpha, rng).targets[0, 1].item() for _ in range(draws)]


@few
@given(**CASES)
def test_every_patch_comes_whole_from_one_image_and_says_from_which(batch, rows, columns, size, seed, alpha):
    images, targets = make(batch, rows, columns, size, seed)
    mixed = patch_cutmix(images, targets, size, CLASSES, alpha, random.Random(seed))
    before, after = patches(images, size), patches(mixed.images, size)
    assert mixed.images.shape == images.shape
    assert mixed.patch_targets.shape == (batch, rows * columns)
    equal = (after[:, :, None] == before.transpose(0, 1)).all(-1)  # (image, place, image it may come from)
    assert (equal.sum(-1) == 1).all()
    assert torch.equal(mixed.patch_targets, targets[equal.int().argmax(-1)])


@few
@given(**CASES)
def test_class_target_is_the_mean_of_the_patch_targets(batch, rows, columns, size, seed, alpha):
    images, targets = make(batch, rows, columns, size, seed)
    mixed = patch_cutmix(images, targets, size, CLASSES, alpha, random.Random(seed))
    expected = F.one_hot(mixed.patch_targets, CLASSES).double().mean(1)
    assert mixed.targets.dtype == torch.float32
    torch.testing.assert_close(mixed.targets.double(), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(mixed.targets.sum(1), torch.ones(batch))


@few
@given(**CASES)
def test_pasted_patches_form_one_rectangle(batch, rows, columns, size, seed, alpha):
    images, targets = make(batch, rows, columns, size, seed)
    mixed = patch_cutmix(images, targets, size, CLASSES, alpha, random.Random(seed))
    pasted = mixed_patches(mixed, images, size).view(rows, columns)
    assert torch.equal(pasted, pasted.any(1)[:, None] & pasted.any(0))
    for line in (pasted.any(1), pasted.any(0)):
        assert int(line.int().diff().abs().sum()) + int(line[0]) + int(line[-1]) in (0, 2)  # one run, or none


@few
@given(**CASES)
def test_inputs_are_not_touched_and_the_same_generator_gives_the_same_result(batch, rows, columns, size, seed, alpha):
    images, targets = make(batch, rows, columns, size, seed)
    copies = images.clone(), targets.clone()
    once = patch_cutmix(images, targets, size, CLASSES, alpha, random.Random(seed))
    again = patch_cutmix(images, targets, size, CLASSES, alpha, random.Random(seed))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert torch.equal(images, copies[0])
    assert torch.equal(targets, copies[1])


def test_without_a_generator_the_seed_of_python_decides():
    images, targets = make(2, 16, 16, 1)
    found = []
    for _ in range(2):
        random.seed(5)
        found.append([patch_cutmix(images, targets, 1, CLASSES).images for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_share_of_the_pasted_area_follows_the_beta_distribution(alpha):
    shares = pasted_share(64, alpha, 1500)
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.03)
    for limit in (0.1, 0.25, 0.5, 0.75, 0.9):  # not nearer to the ends, where whole patches pile up
        below = sum(share <= limit for share in shares) / len(shares)
        assert below == pytest.approx(stats.beta(alpha, alpha).cdf(limit), abs=0.04)


@pytest.mark.parametrize(("mode", "boxes"), [("batch", 1), ("pair", 3), ("elem", 6)])
def test_the_mode_says_who_shares_a_rectangle_and_with_whom(mode, boxes):
    images, _ = make(6, 8, 8, 2)
    mixed = patch_cutmix(images, torch.arange(6), 2, 6, rng=random.Random(3), mode=mode)
    pasted = (patches(mixed.images, 2) != patches(images, 2)).any(-1)
    assert len({tuple(row) for row in pasted.tolist()}) == boxes
    lender = {0: 1, 1: 0, 2: 3, 3: 2, 4: 5, 5: 4} if mode == "pair" else {i: (i - 1) % 6 for i in range(6)}
    for image, here in enumerate(pasted):
        assert torch.equal(patches(mixed.images, 2)[image, here], patches(images, 2)[lender[image], here])
        assert (mixed.patch_targets[image, here] == lender[image]).all()
        assert (mixed.patch_targets[image, ~here] == image).all()
        assert mixed.targets[image, image] == pytest.approx(1 - here.float().mean().item())


@pytest.mark.parametrize("mode", MODES)
def test_an_image_may_have_several_labels(mode):
    images, _ = make(4, 4, 4, 2)
    labels = torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0]])
    mixed = patch_cutmix(images, labels, 2, 3, rng=random.Random(1), mode=mode)
    single = patch_cutmix(images, torch.arange(4), 2, 4, rng=random.Random(1), mode=mode)
    assert torch.equal(mixed.images, single.images)
    assert torch.equal(mixed.patch_targets, labels[single.patch_targets])
    torch.testing.assert_close(mixed.targets, mixed.patch_targets.mean(1))


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match="no mode 'each'"):
        patch_cutmix(*make(2, 2, 2, 2), 2, CLASSES, mode="each")


@pytest.mark.parametrize(("height", "width"), [(30, 32), (32, 30), (3, 3)])
def test_a_patch_size_that_does_not_divide_is_refused(height, width):
    with pytest.raises(UserError, match=f"patches of 4 pixels do not fit images of {height}x{width}"):
        patch_cutmix(torch.zeros(2, 3, height, width), torch.tensor([0, 1]), 4, CLASSES)


@pytest.mark.parametrize(
    ("shape", "targets", "named"),
    [
        ((2, 3, 8, 8), [0, 1, 2], "shape"),
        ((3, 8, 8), [0, 1, 2], "shape"),
        ((2, 3, 8, 8), [[0.5, 0.5], [1, 0]], "shape"),
        ((3, 3, 8, 8), [[0.5, 0.5, 0], [1, 0, 0]], "shape"),
        ((2, 3, 8, 8), [0, 3], "0 to 3"),
        ((2, 3, 8, 8), [-1, 0], "-1 to 0"),
    ],
)
def test_targets_that_do_not_fit_are_refused(shape, targets, named):
    with pytest.raises(UserError, match=named):
        patch_cutmix(torch.zeros(shape), torch.tensor(targets), patch_size=4, num_classes=3)
