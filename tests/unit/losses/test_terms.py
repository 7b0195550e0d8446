"""Every term in every variant: finite for any tokens, in float32, true gradients."""

from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from pdvit.config.schema import GRAM_VARIANTS, PRESETS, VARIANTS
from pdvit.errors import UserError
from pdvit.losses import TERMS, contrastive_loss, cosine_loss, gram_loss, mixing_loss
from pdvit.losses.terms import LAST_LAYER_TERMS, WeightSchedule


def mixing(last: Tensor, variant: str) -> Tensor:
    """With the tokens as logits, and targets that change from patch to patch."""
    images, patches, classes = last.shape
    targets = torch.arange(patches, device=last.device).expand(images, patches) % classes
    return mixing_loss(last, targets, variant, 0.1)


def gram(last: Tensor, variant: str) -> Tensor:
    """With an anchor of another width."""
    anchor = torch.randn(*last.shape[:2], 3, generator=torch.Generator().manual_seed(1))
    return gram_loss(last, anchor.to(last.device, torch.promote_types(last.dtype, torch.float32)), variant)


FORMS = {
    **{f"cosine {v}": lambda first, last, v=v: cosine_loss(last, v) for v in VARIANTS if v != "released"},
    **{
        f"contrastive {v}": lambda first, last, v=v: contrastive_loss(first, last, v, False, (1, last.shape[1]))
        for v in VARIANTS
    },
    **{f"mixing {v}": lambda first, last, v=v: mixing(last, v) for v in ("paper", "released")},
    **{f"gram {v}": lambda first, last, v=v: gram(last, v) for v in GRAM_VARIANTS},
    **{name: lambda first, last, term=term: term(last) for name, term in LAST_LAYER_TERMS.items()},
}
# The value of a single patch, unless it depends on the tokens.
ONE_PATCH = {form: 0 for form in FORMS if not form.startswith(("mixing", "gram batch"))} | {
    "cosine diverse-vit": 1,
    "spectral": 1,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_form = pytest.mark.parametrize("form", FORMS)


def tokens(shape: tuple[int, int, int], case: str = "random", seed: int = 0) -> Tensor:
    """First and last patch tokens, `(2, *shape)`."""
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    if case == "identical":
        return torch.ones_like(noise)
    if case == "one zero":
        noise[:, :, 0] = 0
    return 1 + 1e-6 * noise if case == "nearly identical" else noise


def value_and_gradients(form: str, both: Tensor, autocast: bool = False, scale: float = 1.0) -> list[Tensor]:
    first, last = (part.clone().requires_grad_() for part in both)
    with torch.autocast(last.device.type, torch.bfloat16, enabled=autocast):
        loss = FORMS[form](first, last)
    (scale * loss).backward()
    return [loss.detach(), last.grad] + ([] if first.grad is None else [first.grad])


@every_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_value_and_gradient_are_finite_in_float32(device, form, dtype, autocast):
    scales, shapes = [0, 1e-40, 1e-30, 1e-12, 1e-6, 1, 1e3, 1e6], [(1, 1, 4), (2, 6, 5), (1, 9, 1)]
    if dtype == torch.float16:
        scales, shapes = [0, 1e-7, 1, 1e4], shapes[:2]
    for case, scale, shape in product(("random", "identical", "nearly identical", "one zero"), scales, shapes):
        loss, *gradients = value_and_gradients(form, (scale * tokens(shape, case)).to(device, dtype), autocast)
        assert loss.dtype == torch.float32
        assert all(tensor.isfinite().all() for tensor in (loss, *gradients)), (case, scale, shape)


@every_form
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_precision_tokens_give_the_value_of_float64(device, form, dtype, autocast):
    """A gradient is rounded to the type of its tokens, so to 8 bits at least; the value is not."""
    low = tokens((2, 49, 64)).to(dtype)
    scale = 1024.0  # as a float16 run scales: some gradients would be too small for that type
    loss, *gradients = value_and_gradients(form, low.to(device), autocast, scale)
    expected, *slopes = value_and_gradients(form, low.double(), scale=scale)
    assert (loss.dtype, expected.dtype) == (torch.float32, torch.float64)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert (gradient.cpu().double() - slope).norm() <= max(1e-5, torch.finfo(dtype).eps) * slope.norm()


@every_form
@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 3, 5)], ids=str)
def test_the_gradient_equals_finite_differences(form, shape):
    first, last = (part.requires_grad_() for part in tokens(shape, seed=3).double())
    assert torch.autograd.gradcheck(FORMS[form], (first, last))


@pytest.mark.parametrize(("form", "value"), ONE_PATCH.items())
def test_one_patch_has_a_fixed_value_and_no_gradient(form, value):
    loss, *gradients = value_and_gradients(form, tokens((2, 1, 4)))
    assert loss.item() == pytest.approx(value)
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients)


def test_an_unknown_variant_is_refused_with_the_closest():
    last = torch.ones(1, 4, 3)
    for term in (cosine_loss, partial(contrastive_loss, last), mixing, gram):
        with pytest.raises(UserError, match=r"(?s)papr.*'paper'"):
            term(last, "papr")
    with pytest.raises(UserError, match="released"):
        cosine_loss(last, "released")


def test_these_tests_have_all_terms_and_presets_known_variants():
    assert {form.split()[0] for form in FORMS} == set(TERMS)
    assert all(preset["variant"] in VARIANTS for preset in PRESETS.values())


@pytest.mark.parametrize(
    ("parts", "factors"),
    [
        ({}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"warmup": 4}, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]),
        ({"decay": 4}, [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ({"until": 3}, [1, 1, 1, 0, 0, 0, 0, 0]),
        ({"warmup": 8, "decay": 8}, [0, 7 / 64, 12 / 64, 15 / 64, 16 / 64, 15 / 64, 12 / 64, 7 / 64]),
        ({"warmup": 0, "decay": 0, "until": 0}, [0] * 8),
    ],
    ids=str,
)
def test_the_factor_is_the_product_of_its_parts(parts, factors):
    schedule = WeightSchedule(8, **parts)
    assert [schedule(step) for step in range(8)] == pytest.approx(factors)
    assert schedule(99) == (0 if parts.keys() & {"decay", "until"} else 1)  # beyond the end
