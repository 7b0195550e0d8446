from dataclasses import replace

import pytest
import torch
from scipy import stats
from timm.data.mixup import Mixup
from torch import Tensor
from torch.nn import functional as F

from pdvit.data.batch import Batch
from pdvit.data.mixing import MODES, Mixing, partners
from pdvit.losses import Objective
from pdvit.models.tokens import TokenOutput

CLASSES, SIZE = 5, 6
MIXUP = Mixing(cutmix=0.0, prob=1.0, patch_size=2, num_classes=CLASSES, labels=True, mixup=1.0)


def make(size: int = SIZE) -> Batch:
    """Images of one value each, their place in the batch."""
    images = torch.arange(float(size))[:, None, None, None].expand(-1, 3, 4, 6)
    return Batch(images, torch.arange(size) % CLASSES, torch.arange(size))


def mix(mixing: Mixing, step: int = 0, size: int = SIZE) -> Batch:
    return mixing.mix(make(size), 0, step, size, range(size))


def shares_of(mixed: Batch, mode: str) -> Tensor:
    """How much of its partner each image holds, read off its pixels."""
    place = torch.arange(float(SIZE))
    return (mixed.images[:, 0, 0, 0] - place) / (partners(SIZE, mode) - place)


@pytest.mark.parametrize("mode", MODES)
def test_mixup_blends_pixels_and_targets_alike(mode):
    batch = make()
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
        make().images.clone(), make().targets
    )
    tokens, logits = torch.randn(SIZE, 6, 8), torch.randn(SIZE, CLASSES)
    output = TokenOutput(logits, tokens, tokens, None)
    found = Objective(mixing=0)(output, targets).parts["class"]
    torch.testing.assert_close(found, -(targets * logits.log_softmax(1)).sum(1).mean())
