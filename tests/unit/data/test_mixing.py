import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from timm.data.mixup import Mixup
from torch import Tensor
from torch.nn import functional as F

from pdvit.data.batch import Batch
from pdvit.data.mixing import MODES, Mixing, draw_pasted, partners, patch_cutmix
from pdvit.errors import UserError
from pdvit.losses import Objective
from pdvit.losses.objective import TokenOutput

CLASSES, SIZE = 7, 6
MIXUP = Mixing(cutmix=0.0, prob=1.0, patch_size=2, num_classes=CLASSES, labels=True, mixup=1.0)


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


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_share_of_the_pasted_area_follows_the_beta_distribution(alpha):
    shares = draw_pasted(1500, 64, 64, alpha, "elem", random.Random(0)).float().mean((1, 2))
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    for limit in (0.1, 0.25, 0.5, 0.75, 0.9):  # not nearer to the ends, where whole patches pile up
        below = (shares <= limit).float().mean().item()
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


def numbered(size: int = SIZE) -> Batch:
    """Images of one value each, their place in the batch."""
    images = torch.arange(float(size))[:, None, None, None].expand(-1, 3, 4, 6)
    return Batch(images, torch.arange(size) % CLASSES, torch.arange(size))


def mix(mixing: Mixing, step: int = 0, size: int = SIZE) -> Batch:
    return mixing.mix(numbered(size), 0, step, size, range(size))


def shares_of(mixed: Batch, mode: str) -> Tensor:
    """How much of its partner each image holds, read off its pixels."""
    place = torch.arange(float(SIZE))
    return (mixed.images[:, 0, 0, 0] - place) / (partners(SIZE, mode) - place)


@pytest.mark.parametrize("mode", MODES)
def test_mixup_blends_pixels_and_targets_alike(mode):
    batch = numbered()
    mixed = mix(replace(MIXUP, mode=mode))
    share = shares_of(mixed, mode)
    assert ((share >= 0) & (share <= 1)).all()
    assert (mixed.images == mixed.images[:, :1, :1, :1]).all()
    own, other = F.one_hot(batch.targets, CLASSES), F.one_hot(batch.targets[partners(SIZE, mode)], CLASSES)
    torch.testing.assert_close(mixed.targets, (1 - share)[:, None] * own + share[:, None] * other)
    assert torch.equal(mixed.patch_targets, mixed.targets[:, None].expand(-1, 6, -1))


@pytest.mark.parametrize(("mode", "different"), [("batch", 1), ("pair", 3), ("elem", 6)])
def test_the_mode_says_how_many_draws_there_are(mode, different):
    mixed = mix(replace(MIXUP, mode=mode))
    assert len({round(share, 4) for share in shares_of(mixed, mode).tolist()}) == different


def test_shares_follow_the_beta_distribution():
    mixed, place = mix(replace(MIXUP, mixup=0.4, mode="elem"), size=3000), torch.arange(3000.0)
    shares = ((mixed.images[:, 0, 0, 0] - place) / (partners(3000, "elem") - place)).numpy()
    assert stats.kstest(shares, stats.beta(0.4, 0.4).cdf).pvalue > 0.01


@pytest.mark.parametrize(("switch_prob", "low", "high"), [(0.0, 0, 0), (0.3, 80, 160), (1.0, 400, 400)])
def test_cutmix_and_mixup_take_turns(switch_prob, low, high):
    mixing = replace(MIXUP, cutmix=1.0, switch_prob=switch_prob)
    assert low <= sum(mixing.draws(0, step)[0] == "cutmix" for step in range(400)) <= high


def test_an_objective_takes_what_timms_own_mixup_makes():
    _, targets = Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)(
        numbered().images.clone(), numbered().targets
    )
    tokens, logits = torch.randn(SIZE, 6, 8), torch.randn(SIZE, CLASSES)
    output = TokenOutput(logits, tokens, tokens, None)
    found = Objective(mixing=0)(output, targets).parts["class"]
    torch.testing.assert_close(found, -(targets * logits.log_softmax(1)).sum(1).mean())


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_a_batch_without_images_stays_empty(mode):
    mixed = patch_cutmix(torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.long), 4, num_classes=3, mode=mode)
    assert [len(part) for part in mixed] == [0, 0, 0]
