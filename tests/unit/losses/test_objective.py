import math
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pdvit.errors import UserError
from pdvit.losses import (
    TERMS,
    VARIANTS,
    Objective,
    contrastive_loss,
    cosine_loss,
    koleo_loss,
    mixing_loss,
    spectral_loss,
)

CLASSES = 5


class Output(NamedTuple):
    logits: Tensor
    first: Tensor
    last: Tensor
    patch_logits: Tensor | None
    others: tuple[Tensor, ...] = ()
    mixing: Tensor | None = None
    smoothing: float = 0.0


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
        "koleo": lambda: koleo_loss(output.last),
        "spectral": lambda: spectral_loss(output.last),
    }[name]()


@pytest.mark.parametrize("weights", list(product([0, 0.5], repeat=5)))
def test_total_is_the_weighted_sum_and_terms_of_weight_zero_are_absent(weights):
    output, targets, patch_targets = make()
    total, parts = Objective(**dict(zip(TERMS, weights, strict=True)))(output, targets, patch_targets)
    expected = {"class": F.cross_entropy(output.logits, targets)}
    expected |= {name: alone(name, output, patch_targets) for name, w in zip(TERMS, weights, strict=True) if w}
    assert list(parts) == list(expected)
    torch.testing.assert_close(parts, expected)
    scale = {"class": 1.0, **dict(zip(TERMS, weights, strict=True))}
    assert total.item() == pytest.approx(sum(scale[name] * part.item() for name, part in expected.items()))


def test_a_term_that_is_off_cannot_spoil_the_total():
    output, targets, _ = make()
    broken = Output(output.logits, output.first * math.nan, output.last * math.nan, None)
    total, parts = Objective(cosine=0, contrastive=0, mixing=0)(broken, targets)
    assert list(parts) == ["class"]
    assert total.item() == pytest.approx(F.cross_entropy(output.logits, targets).item())


def test_the_three_terms_of_the_paper_have_weight_one_by_default():
    output, targets, patch_targets = make()
    total, parts = Objective()(output, targets, patch_targets)
    assert list(parts) == ["class", "cosine", "contrastive", "mixing"]
    assert total.item() == pytest.approx(sum(part.item() for part in parts.values()))


@pytest.mark.parametrize(
    ("options", "message"),
    [(({name: weight}), f"weight of the {name} term") for name in TERMS for weight in (-1e-9, math.nan, math.inf)]
    + [
        ({"label_smoothing": 1.0}, "label smoothing of 1"),
        ({"variant": "released"}, "no cosine term"),
        ({"variant": "papr"}, "papr"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Objective(**options)


def test_mixing_needs_patch_targets_and_a_patch_head():
    output, targets, patch_targets = make()
    for incomplete in ((output, targets), (output._replace(patch_logits=None), targets, patch_targets)):
        with pytest.raises(UserError, match="class of every patch and a patch head"):
            Objective()(*incomplete)
    assert list(Objective(mixing=0)(output, targets).parts) == ["class", "cosine", "contrastive"]


@pytest.mark.parametrize("multi_label", [False, True])
def test_label_smoothing_and_multi_label_are_for_images_and_patches_alike(multi_label):
    output, targets, patch_targets = make()
    objective = Objective(multi_label=multi_label, label_smoothing=0.2)
    labels, patches = (F.one_hot(of, CLASSES).float() for of in (targets, patch_targets))
    parts = objective(output, labels, patches).parts
    for name, logits, target in (("class", output.logits, labels), ("mixing", output.patch_logits, patches)):
        soft, p = target * 0.8 + 0.2 / (2 if multi_label else CLASSES), logits.sigmoid()
        binary = -(soft * p.log() + (1 - soft) * (1 - p).log()).mean()
        expected = binary if multi_label else -(soft * logits.log_softmax(-1)).sum(-1).mean()
        assert parts[name].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_diverse_vit_averages_the_class_token_and_the_patches(weight):
    output, targets, patch_targets = make()
    objective = Objective(cosine=0.5, contrastive=0.5, mixing=weight, variant="diverse-vit")
    total, parts = objective(output, targets, patch_targets)
    own = F.cross_entropy(output.logits, targets)
    patches = sum(F.cross_entropy(output.patch_logits[:, i], patch_targets[:, i]) for i in range(6))
    expected = (own + weight * patches) / (1 + 6 * weight) + 0.5 * (parts["cosine"] + parts["contrastive"])
    assert total.item() == pytest.approx(expected.item())


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


def on(**more) -> Objective:
    """All terms that the variant has, each with a weight of its own."""
    weights = {"cosine": 0.3, "contrastive": 0.7, "mixing": 1.5, "koleo": 0.2, "spectral": 0.4} | more
    return Objective(**(weights | ({"cosine": 0} if more.get("variant") == "released" else {})))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variant_decides_the_form_of_each_term(variant):
    output, targets, patch_targets = make()
    parts = on(variant=variant, grid=(2, 3))(output, targets, patch_targets).parts
    expected = {
        "class": F.cross_entropy(output.logits, targets),
        "contrastive": contrastive_loss(output.first, output.last, variant, grid=(2, 3)),
        "mixing": mixing_loss(output.patch_logits, patch_targets, variant),
        "koleo": koleo_loss(output.last),
        "spectral": spectral_loss(output.last),
    }
    if variant != "released":
        expected["cosine"] = cosine_loss(output.last, variant)
    torch.testing.assert_close(parts, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_factors_act_as_other_weights_and_change_no_part(variant):
    output, targets, patch_targets = make()
    factors = dict(zip(TERMS, (0.5, 0.25, 0.1, 3.0, 0.0), strict=True))
    plain = on(variant=variant, grid=(2, 3))
    found = plain(output, targets, patch_targets, torch.tensor(list(factors.values())))
    scaled = {name: getattr(plain, name) * factor for name, factor in factors.items()}
    expected = Objective(**scaled, variant=variant, grid=(2, 3))(output, targets, patch_targets)
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-6)
    torch.testing.assert_close(found.parts, plain(output, targets, patch_targets).parts, rtol=0, atol=0)


def test_a_mixing_term_of_the_forward_pass_is_taken_as_it_is():
    output, targets, _ = make()
    ready = output._replace(patch_logits=None, mixing=torch.tensor(0.75))
    losses = Objective(cosine=0, contrastive=0, mixing=2)(ready, targets)
    assert losses.parts["mixing"] == 0.75
    assert losses.total.item() == pytest.approx(losses.parts["class"].item() + 1.5)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_in_one_piece(variant, multi_label):
    """With factors and the checks of targets: nothing breaks the graph, and other factors do not compile again."""
    output, targets, patch_targets = make()
    if multi_label:
        targets, patch_targets = (F.one_hot(labels, CLASSES).float() for labels in (targets, patch_targets))
    objective = on(variant=variant, grid=(2, 3), multi_label=multi_label, label_smoothing=0.1)
    torch.compiler.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(objective.__call__, fullgraph=True, dynamic=False, backend=count)
    for factor in (1.0, 0.3, 0.0):
        factors = torch.full((len(TERMS),), factor)
        found = compiled(output, targets, patch_targets, factors)
        torch.testing.assert_close(found, objective(output, targets, patch_targets, factors))
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_compiled_it_gives_the_same_loss_and_gradients(device, variant):
    """By the compiler that training uses. Both compute in float32 and add up in another order: some 1e-6 apart."""
    output, targets, patch_targets = make()
    targets, patch_targets = targets.to(device), patch_targets.to(device)
    objective, found = on(variant=variant, grid=(2, 3), label_smoothing=0.1), []
    torch.compiler.reset()
    for call in (objective.__call__, torch.compile(objective.__call__, fullgraph=True, dynamic=False)):
        leaves = [tensor.to(device).requires_grad_() for tensor in output[:4]]
        losses = call(Output(*leaves), targets, patch_targets)
        gradients = torch.autograd.grad(losses.total, leaves, allow_unused=True)
        found.append((losses, [gradient for gradient in gradients if gradient is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"variant": "released", "cosine": 0, "contrastive": 0}, "another form of it"),
        ({"multi_label": True}, "another form of it"),
        ({"label_smoothing": 0.1}, "with label smoothing 0,"),
    ],
)
def test_a_mixing_term_of_another_form_is_not_taken_for_its_own(options, named):
    output, targets, patch_targets = make()
    ready = output._replace(mixing=torch.tensor(1.0), patch_logits=None)
    if options.get("multi_label"):
        targets = torch.nn.functional.one_hot(targets, output.logits.shape[1]).float()
    with pytest.raises(UserError, match=named):
        Objective(**options)(ready, targets, patch_targets)
    assert Objective()(ready, output.logits.argmax(1), patch_targets).parts["mixing"] == 1
