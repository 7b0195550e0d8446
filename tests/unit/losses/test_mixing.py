import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pdvit.errors import UserError
from pdvit.losses import mixing_loss

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(2, 7), st.integers(0, 2**32))
few = settings(max_examples=30, deadline=None)


def make(images: int, count: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, count, classes, dtype=torch.float64, generator=generator)
    return logits, torch.randint(classes, (images, count), generator=generator)


def literal(logits: Tensor, targets: Tensor) -> float:
    """Mean over images of 1/n sum_i CE, patch by patch; targets are probabilities."""
    total, patches = 0.0, 0
    for image, labels in zip(logits.tolist(), targets.tolist(), strict=True):
        for scores, probabilities in zip(image, labels, strict=True):
            whole = sum(math.exp(score) for score in scores)
            terms = zip(scores, probabilities, strict=True)
            total -= sum(share * math.log(math.exp(score) / whole) for score, share in terms)
            patches += 1
    return total / patches


@few
@given(shape=SHAPES)
def test_equals_the_formula_patch_by_patch(shape):
    logits, targets = make(*shape)
    expected = literal(logits, F.one_hot(targets, shape[2]).double())
    assert mixing_loss(logits, targets).item() == pytest.approx(expected)


@few
@given(shape=SHAPES)
def test_soft_targets_equal_the_formula(shape):
    logits, _ = make(*shape)
    soft = make(*shape[:3], seed=shape[3] + 1)[0].softmax(-1)
    assert mixing_loss(logits, soft).item() == pytest.approx(literal(logits, soft))


@few
@given(shape=SHAPES)
def test_indices_equal_one_hot_probabilities(shape):
    logits, targets = make(*shape)
    one_hot = F.one_hot(targets, shape[2]).double()
    torch.testing.assert_close(mixing_loss(logits, targets), mixing_loss(logits, one_hot))


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_a_head_that_knows_nothing_gives_ln_c(classes):
    _, targets = make(2, 5, classes)
    assert mixing_loss(torch.zeros(2, 5, classes), targets).item() == pytest.approx(math.log(classes))


def test_every_patch_is_judged_by_its_own_target():
    logits = torch.full((1, 2, 3), -50.0)
    logits[0, 0, 2] = logits[0, 1, 0] = 50
    assert mixing_loss(logits, torch.tensor([[2, 0]])).item() == pytest.approx(0)
    assert mixing_loss(logits, torch.tensor([[2, 1]])).item() == pytest.approx(50)


def test_patches_swap_with_their_targets():
    logits, targets = make(2, 6, 4)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(mixing_loss(logits[:, order], targets[:, order]), mixing_loss(logits, targets))


def test_gradient_equals_finite_differences():
    logits, targets = make(2, 3, 4)
    assert torch.autograd.gradcheck(lambda logits: mixing_loss(logits, targets), logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_short_numbers_are_computed_in_float32(device, dtype, autocast):
    logits, targets = make(2, 8, 10)
    leaf = logits.to(device, dtype).requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = mixing_loss(leaf, targets.to(device))
    loss.backward()
    assert loss.dtype == torch.float32
    expected = literal(leaf.detach(), F.one_hot(targets, 10).double())
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("scale", [1e6, -1e6, 1e-30, 0])
def test_value_and_gradient_are_finite(autocast, scale):
    logits, targets = make(2, 5, 6)
    leaf = (scale * logits.float()).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = mixing_loss(leaf, targets)
    loss.backward()
    assert loss.isfinite()
    assert leaf.grad.isfinite().all()


def test_float64_stays_float64():
    logits, targets = make(1, 2, 3)
    assert mixing_loss(logits, targets).dtype == torch.float64


def literal_released(logits: Tensor, targets: Tensor) -> float:
    """Region by region: KL(target || softmax of the region's mean logits), by area; targets are probabilities."""
    total = 0.0
    for image, labels in zip(logits.tolist(), targets.tolist(), strict=True):
        for target in {tuple(label) for label in labels}:
            members = [i for i, label in enumerate(labels) if tuple(label) == target]
            pooled = [sum(image[i][c] for i in members) / len(members) for c in range(len(target))]
            whole = sum(math.exp(score) for score in pooled)
            kl = sum(
                t * (math.log(t) - math.log(math.exp(s) / whole)) for t, s in zip(target, pooled, strict=True) if t
            )
            total += kl * len(members) / len(labels)
    return total / len(logits)


@few
@given(shape=SHAPES)
def test_released_equals_the_divergence_region_by_region(shape):
    logits, targets = make(*shape)
    expected = literal_released(logits, F.one_hot(targets, shape[2]).double())
    assert mixing_loss(logits, targets, "released").item() == pytest.approx(expected, abs=1e-12)


@few
@given(shape=SHAPES)
def test_released_with_soft_targets_equals_the_divergence_region_by_region(shape):
    logits, regions = make(*shape)
    # every image has up to C regions, each with shares of its own
    shares = make(1, shape[2], shape[2], shape[3] + 1)[0][0].softmax(-1)
    soft = shares[regions]
    assert mixing_loss(logits, soft, "released").item() == pytest.approx(literal_released(logits, soft), abs=1e-12)


@few
@given(shape=SHAPES)
def test_released_is_a_lower_bound_of_the_patches_by_jensen(shape):
    logits, targets = make(*shape)
    assert mixing_loss(logits, targets, "released").item() <= mixing_loss(logits, targets).item() + 1e-12


@few
@given(shape=SHAPES)
def test_released_equals_the_paper_form_where_the_patches_of_a_region_agree(shape):
    answers, targets = make(*shape)
    logits = answers[:, 0][:, None].expand_as(answers)
    found = mixing_loss(logits, targets, "released").item()
    assert found == pytest.approx(mixing_loss(logits, targets).item(), abs=1e-12)


def test_pooled_logits_are_the_head_of_the_pooled_tokens():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 6, 4, generator=generator)
    head = torch.nn.Linear(4, 3)
    targets = torch.tensor([[0, 0, 2, 2, 2, 0]])
    pooled = torch.stack([head(tokens[0, targets[0] == label].mean(0)) for label in (0, 2)])
    expected = F.cross_entropy(pooled, torch.tensor([0, 2]))  # both have half of the area
    torch.testing.assert_close(mixing_loss(head(tokens), targets, "released"), expected)


def test_a_region_does_not_reach_into_another_image():
    logits, targets = make(3, 5, 4)
    alone = [mixing_loss(one[None], label[None], "released").item() for one, label in zip(logits, targets, strict=True)]
    assert mixing_loss(logits, targets, "released").item() == pytest.approx(sum(alone) / 3)


def test_the_answer_that_is_the_target_leaves_no_divergence():
    soft = make(2, 5, 4)[0].softmax(-1)
    assert mixing_loss(soft.log(), soft, "released").item() == pytest.approx(0, abs=1e-12)
    assert mixing_loss(soft.log(), soft).item() > 0.1  # the cross-entropy keeps the target's entropy


@pytest.mark.parametrize("multi_label", [False, True])
def test_released_gradient_equals_finite_differences(multi_label):
    logits, targets = make(2, 4, 3)
    labels = F.one_hot(targets, 3).double() if multi_label else targets
    assert torch.autograd.gradcheck(
        lambda logits: mixing_loss(logits, labels, "released", 0.1, multi_label), logits.requires_grad_()
    )


@pytest.mark.parametrize("variant", ["paper", "v1", "diverse-vit"])
def test_the_other_variants_are_the_mean_over_patches(variant):
    logits, targets = make(2, 6, 4)
    assert mixing_loss(logits, targets, variant) == mixing_loss(logits, targets)


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("scale", [1e6, 1e-30, 0])
def test_every_form_is_finite_in_float32(device, variant, autocast, scale):
    logits, targets = make(2, 5, 6)
    leaf = (scale * logits.float()).to(device).requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = mixing_loss(leaf, targets.to(device), variant, 0.1)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_autocast_does_not_round_the_logits(variant):
    logits, targets = (part.float() if part.is_floating_point() else part for part in make(2, 8, 5))
    expected = mixing_loss(logits, targets, variant)
    with torch.autocast("cpu", torch.bfloat16):
        assert mixing_loss(logits, targets, variant) == expected


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("classes", [2, 7])
def test_a_multi_label_head_that_knows_nothing_gives_ln_2(variant, classes):
    labels = torch.randint(2, (2, 5, classes), generator=torch.Generator().manual_seed(0)).float()
    assert mixing_loss(torch.zeros_like(labels), labels, variant, multi_label=True).item() == pytest.approx(math.log(2))


def test_an_unknown_variant_is_refused():
    with pytest.raises(UserError, match="regions"):
        mixing_loss(*make(1, 2, 3), "regions")
