import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from pdvit.config.schema import VARIANTS
from pdvit.errors import UserError
from pdvit.losses import TERMS, Objective, contrastive_loss, cosine_loss, gram_loss, mixing_loss
from pdvit.losses.cross_entropy import cross_entropy_loss
from pdvit.losses.objective import TokenOutput
from pdvit.losses.terms import LAST_LAYER_TERMS

CLASSES, GRID = 5, (2, 3)
WEIGHTS = {"cosine": 0.3, "contrastive": 0.7, "mixing": 1.5} | dict.fromkeys(LAST_LAYER_TERMS, 0.2) | {"gram": 0.9}
ANCHOR = torch.randn(3, 6, 7, generator=torch.Generator().manual_seed(1))
OFF = dict.fromkeys(TERMS, 0.0)
FORMS = [*((variant, False) for variant in VARIANTS), ("paper", True), ("released", True)]  # and of several labels


def make(multi_label: bool = False) -> tuple[TokenOutput, Tensor, Tensor]:
    """Return a forward pass, targets and patch targets: indices, or of several labels probabilities."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, CLASSES), (3, 6, 4), (3, 6, 4), (3, 6, CLASSES))
    output = TokenOutput(*(torch.randn(shape, generator=generator) for shape in shapes))
    targets = [torch.randint(CLASSES, shape, generator=generator) for shape in ((3,), (3, 6))]
    return output, *(F.one_hot(labels, CLASSES).float() if multi_label else labels for labels in targets)


def objective_of(variant: str, multi_label: bool = False) -> Objective:
    """All terms that the variant has, each with a weight of its own, and label smoothing."""
    weights = WEIGHTS | ({"cosine": 0} if variant == "released" else {})
    options = {"grid": GRID, "label_smoothing": 0.1, "multi_label": multi_label, "gram_variant": "remove-neg"}
    return Objective(**weights, variant=variant, **options)


@pytest.mark.parametrize(("variant", "multi_label"), FORMS)
def test_total_is_the_weighted_sum_and_terms_of_weight_zero_are_absent(variant, multi_label):
    output, targets, patch_targets = make(multi_label)
    terms = {
        "cosine": None if variant == "released" else cosine_loss(output.last, variant),
        "contrastive": contrastive_loss(output.first, output.last, variant, grid=GRID),
        "mixing": mixing_loss(output.patch_logits, patch_targets, variant, 0.1, multi_label),
        **{name: term(output.last) for name, term in LAST_LAYER_TERMS.items()},
        "gram": gram_loss(output.last, ANCHOR, "remove-neg"),
    }
    terms = {name: value for name, value in terms.items() if value is not None}
    own, objective = cross_entropy_loss(output.logits, targets, 0.1, multi_label), objective_of(variant, multi_label)
    for chosen in product([False, True], repeat=len(terms)):
        weights = {name: WEIGHTS[name] for name, on in zip(terms, chosen, strict=True) if on}
        total, parts = replace(objective, **OFF | weights)(output, targets, patch_targets, None, ANCHOR)
        assert list(parts) == ["class", *weights]
        torch.testing.assert_close(parts, {"class": own} | {name: terms[name] for name in weights})
        expected = own
        if variant == "diverse-vit" and (weight := weights.pop("mixing", 0)):  # the mean over class token and patches
            expected = (own + weight * 6 * terms["mixing"]) / (1 + 6 * weight)
        expected = expected + sum(weight * terms[name] for name, weight in weights.items())
        torch.testing.assert_close(total, expected)


def test_the_three_terms_of_the_paper_have_weight_one_by_default():
    output, targets, patch_targets = make()
    for tensor in output[:4]:
        tensor.requires_grad_()
    total, parts = Objective()(output, targets, patch_targets)
    assert list(parts) == ["class", "cosine", "contrastive", "mixing"]
    assert total.item() == pytest.approx(sum(part.item() for part in parts.values()))
    total.backward()
    assert all(tensor.grad.any() for tensor in (output.logits, output.last, output.patch_logits))
    assert output.first.grad is None


def test_a_term_that_is_off_cannot_spoil_the_total():
    output, targets, _ = make()
    broken = TokenOutput(output.logits, output.first * math.nan, output.last * math.nan, None)
    torch.testing.assert_close(Objective(**OFF)(broken, targets).total, F.cross_entropy(output.logits, targets))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({name: -1e-9}, f"weight of the {name} term") for name in TERMS),
        *(({"mixing": weight}, "weight of the mixing term") for weight in (math.nan, math.inf)),
        *(({"label_smoothing": 1.0}, "label smoothing of 1"), ({"variant": "released"}, "no cosine term")),
        ({"variant": "papr"}, "papr"),
        ({"gram_variant": "papr"}, "papr"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Objective(**options)


def test_mixing_needs_patch_targets_and_a_patch_head_and_the_gram_term_an_anchor():
    output, targets, patch_targets = make()
    for incomplete in ((output, targets), (output._replace(patch_logits=None), targets, patch_targets)):
        with pytest.raises(UserError, match="class of every patch and a patch head"):
            Objective()(*incomplete)
    with pytest.raises(UserError, match="needs an anchor"):
        Objective(**OFF | {"gram": 1})(output, targets)


def test_the_cosine_term_is_the_mean_over_last_and_the_other_layers():
    output, targets, patch_targets = make()
    others = (torch.randn(2, 3, 7), torch.ones(2, 5, 4))
    parts = Objective()(output._replace(others=others), targets, patch_targets).parts
    expected = (cosine_loss(output.last) + cosine_loss(others[0]) + 1) / 3
    torch.testing.assert_close(parts["cosine"], expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_factors_act_as_other_weights_and_change_no_part(variant):
    output, targets, patch_targets = make()
    factors = dict.fromkeys(TERMS, 3.0) | {"cosine": 0.5, "contrastive": 0.25, "mixing": 0.1, "spectral": 0.0}
    plain = objective_of(variant)
    found = plain(output, targets, patch_targets, torch.tensor(list(factors.values())), ANCHOR)
    scaled = {name: getattr(plain, name) * factor for name, factor in factors.items()}
    expected = replace(plain, **scaled)(output, targets, patch_targets, None, ANCHOR)
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-6)
    torch.testing.assert_close(found.parts, plain(output, targets, patch_targets, None, ANCHOR).parts, rtol=0, atol=0)


def test_a_mixing_term_of_the_forward_pass_is_used_unless_it_has_another_form():
    output, targets, patch_targets = make()
    ready = output._replace(patch_logits=None, mixing=torch.tensor(0.75))
    losses = Objective(cosine=0, contrastive=0, mixing=2)(ready, targets)
    assert losses.parts["mixing"] == 0.75
    assert losses.total.item() == pytest.approx(losses.parts["class"].item() + 1.5)
    for options, message in (
        ({"variant": "released", "cosine": 0}, "another form of it"),
        ({"multi_label": True}, "another form of it"),
        ({"label_smoothing": 0.1}, "has label smoothing 0,"),
    ):
        labels = F.one_hot(targets, CLASSES).float() if "multi_label" in options else targets
        with pytest.raises(UserError, match=message):
            Objective(**options, contrastive=0)(ready, labels, patch_targets)


@pytest.mark.parametrize(("variant", "multi_label"), FORMS)
def test_compiles_in_one_piece(variant, multi_label):
    """With factors and the checks of targets: nothing breaks the graph, and other factors do not compile again."""
    (output, targets, patch_targets), objective = make(multi_label), objective_of(variant, multi_label)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(objective.__call__, fullgraph=True, dynamic=False, backend=counter)
    for factor in (1.0, 0.3, 0.0):
        factors = torch.full((len(TERMS),), factor)
        found = compiled(output, targets, patch_targets, factors, ANCHOR)
        torch.testing.assert_close(found, objective(output, targets, patch_targets, factors, ANCHOR))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_compiled_it_gives_the_same_loss_and_gradients(device, variant):
    """By the compiler that training uses. Both compute in float32 and add up in another order: some 1e-6 apart."""
    output, targets, patch_targets = make()
    targets, patch_targets = targets.to(device), patch_targets.to(device)
    objective, found = objective_of(variant), []
    torch.compiler.reset()
    for call in (objective.__call__, torch.compile(objective.__call__, fullgraph=True, dynamic=False)):
        leaves = [tensor.to(device).requires_grad_() for tensor in output[:4]]
        losses = call(TokenOutput(*leaves), targets, patch_targets, None, ANCHOR.to(device))
        gradients = torch.autograd.grad(losses.total, leaves, allow_unused=True)
        found.append((losses, [gradient for gradient in gradients if gradient is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
