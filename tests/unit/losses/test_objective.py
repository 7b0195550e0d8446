import math
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pdvit.errors import UserError
from pdvit.losses import TERMS, Objective, contrastive_loss, cosine_loss, mixing_loss

CLASSES = 5


class Output(NamedTuple):
    logits: Tensor
    first: Tensor
    last: Tensor
    patch_logits: Tensor | None
    others: tuple[Tensor, ...] = ()


def make(dtype: torch.dtype = torch.float32) -> tuple[Output, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    output = Output(gaussian(3, CLASSES), gaussian(3, 6, 4), gaussian(3, 6, 4), gaussian(3, 6, CLASSES))
    targets = torch.randint(CLASSES, (3,), generator=generator)
    return output, targets, torch.randint(CLASSES, (3, 6), generator=generator)


def alone(name: str, output: Output, patch_targets: Tensor) -> Tensor:
    return {
        "cosine": lambda: cosine_loss(output.last),
        "contrastive": lambda: contrastive_loss(output.first, output.last),
        "mixing": lambda: mixing_loss(output.patch_logits, patch_targets),
    }[name]()


@pytest.mark.parametrize("weights", list(product([0, 0.5, 2.0], repeat=3)))
def test_total_is_the_weighted_sum_and_terms_of_weight_zero_are_absent(weights):
    output, targets, patch_targets = make()
    total, parts = Objective(**dict(zip(TERMS, weights, strict=True)))(output, targets, patch_targets)
    expected = {"class": F.cross_entropy(output.logits, targets)}
    expected |= {name: alone(name, output, patch_targets) for name, w in zip(TERMS, weights, strict=True) if w}
    assert list(parts) == list(expected)
    torch.testing.assert_close(parts, expected)
    scale = {"class": 1.0, **dict(zip(TERMS, weights, strict=True))}
    assert total.item() == pytest.approx(sum(scale[name] * part.item() for name, part in expected.items()))


def test_weights_are_one_by_default():
    output, targets, patch_targets = make()
    total, parts = Objective()(output, targets, patch_targets)
    assert list(parts) == ["class", *TERMS]
    assert total.item() == pytest.approx(sum(part.item() for part in parts.values()))


def test_a_term_that_is_off_cannot_spoil_the_total():
    output, targets, _ = make()
    broken = Output(output.logits, output.first * math.nan, output.last * math.nan, None)
    total, parts = Objective(cosine=0, contrastive=0, mixing=0)(broken, targets)
    assert list(parts) == ["class"]
    assert total.item() == pytest.approx(F.cross_entropy(output.logits, targets).item())


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("weight", [-1, -1e-9, math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_weight_is_refused(name, weight):
    with pytest.raises(UserError, match=f"weight of the {name} term"):
        Objective(**{name: weight})


def test_mixing_without_patch_targets_is_refused():
    output, targets, _ = make()
    with pytest.raises(UserError, match="class of every patch"):
        Objective()(output, targets)


def test_mixing_without_a_patch_head_is_refused():
    output, targets, patch_targets = make()
    with pytest.raises(UserError, match="patch head"):
        Objective()(output._replace(patch_logits=None), targets, patch_targets)


def test_patch_targets_are_not_needed_without_mixing():
    output, targets, _ = make()
    assert list(Objective(mixing=0)(output, targets).parts) == ["class", "cosine", "contrastive"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_label_smoothing_mixes_in_the_uniform_answer(smoothing):
    output, targets, _ = make()
    log_p = output.logits.log_softmax(-1)
    own = -log_p[torch.arange(3), targets].mean()
    expected = (1 - smoothing) * own - smoothing * log_p.mean(-1).mean()
    losses = Objective(cosine=0, contrastive=0, mixing=0, label_smoothing=smoothing)(output, targets)
    assert losses.total.item() == pytest.approx(expected.item())
    torch.testing.assert_close(losses.total, torch.nn.CrossEntropyLoss(label_smoothing=smoothing)(output[0], targets))


def test_soft_class_targets_equal_the_formula():
    output, _, patch_targets = make()
    soft = make()[0].patch_logits[:, 0].softmax(-1)
    expected = -(soft * output.logits.log_softmax(-1)).sum(-1).mean()
    assert Objective()(output, soft, patch_targets).parts["class"].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype):
    output, targets, patch_targets = make(dtype)
    expected = Objective()(output, targets, patch_targets)
    with torch.autocast("cpu", torch.bfloat16):
        found = Objective()(output, targets, patch_targets)
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_float64_stays_float64():
    output, targets, patch_targets = make(torch.float64)
    losses = Objective()(output, targets, patch_targets)
    assert {name: part.dtype for name, part in losses.parts.items()} == dict.fromkeys(losses.parts, torch.float64)
    assert losses.total.dtype == torch.float64


def test_the_cosine_term_is_the_mean_over_last_and_the_other_layers():
    output, targets, patch_targets = make()
    others = (torch.randn(2, 3, 7), torch.ones(2, 5, 4))
    parts = Objective()(output._replace(others=others), targets, patch_targets).parts
    expected = (cosine_loss(output.last) + cosine_loss(others[0]) + 1) / 3
    torch.testing.assert_close(parts["cosine"], expected, check_dtype=False)


def test_every_output_gets_its_gradient_and_the_first_layer_none():
    output, targets, patch_targets = make()
    for tensor in output[:4]:
        tensor.requires_grad_()
    Objective()(output, targets, patch_targets).total.backward()
    for tensor in (output.logits, output.last, output.patch_logits):
        assert tensor.grad.abs().sum() > 0
    assert output.first.grad is None
