"""Every term in every variant: finite for any tokens, in float32, true gradients, the mean over images."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pdvit.config import schema
from pdvit.errors import UserError
from pdvit.losses import TERMS, VARIANTS, contrastive_loss, cosine_loss, koleo_loss, mixing_loss, spectral_loss


def mixing(last: Tensor, variant: str) -> Tensor:
    """With the tokens as logits, and targets that change from patch to patch."""
    images, patches, classes = last.shape
    targets = torch.arange(patches, device=last.device).expand(images, patches) % classes
    return mixing_loss(last, targets, variant, 0.1)


FORMS = {
    **{f"cosine {v}": lambda first, last, v=v: cosine_loss(last, v) for v in VARIANTS if v != "released"},
    **{
        f"contrastive {v}": lambda first, last, v=v: contrastive_loss(first, last, v, False, (1, last.shape[1]))
        for v in VARIANTS
    },
    **{f"mixing {v}": lambda first, last, v=v: mixing(last, v) for v in ("paper", "released")},
    "koleo": lambda first, last: koleo_loss(last),
    "spectral": lambda first, last: spectral_loss(last),
}
# The value of a single patch; None: it depends on the tokens.
ONE_PATCH = (
    dict.fromkeys(FORMS, 0)
    | {"cosine diverse-vit": 1, "spectral": 1}
    | dict.fromkeys(("mixing paper", "mixing released"))
)
every = pytest.mark.parametrize("form", FORMS)


def tokens(case: str, scale: float, shape: tuple[int, int, int], seed: int) -> Tensor:
    """First and last patch tokens, `(2, *shape)`."""
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    if case == "identical":
        return torch.full_like(noise, scale)
    if case == "one zero":
        noise[:, :, 0] = 0
    return scale * (1 + 1e-6 * noise if case == "nearly identical" else noise)


def value_and_gradients(form: str, first_and_last: Tensor, autocast: bool = False) -> list[Tensor]:
    first, last = (part.clone().requires_grad_() for part in first_and_last)
    with torch.autocast(last.device.type, torch.bfloat16, enabled=autocast):
        loss = FORMS[form](first, last)
    (1024 * loss).backward()  # scaled as a float16 run does it: some gradients would be too small for that type
    return [loss.detach(), last.grad] + ([] if first.grad is None else [first.grad])


@every
@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(["random", "identical", "nearly identical", "one zero"]),
    scale=st.sampled_from([0.0, 1e-40, 1e-30, 1e-12, 1e-6, 1.0, 1e3, 1e6]),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 5)),
    autocast=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_value_and_gradient_are_finite_in_float32(form, case, scale, shape, autocast, seed):
    loss, *gradients = value_and_gradients(form, tokens(case, scale, shape, seed), autocast)
    assert loss.dtype == torch.float32
    assert all(tensor.isfinite().all() for tensor in (loss, *gradients))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [0, 1e-7, 1, 1e4])
@pytest.mark.parametrize("case", ["random", "identical", "one zero"])
def test_half_precision_stays_finite(form, dtype, scale, case):
    first, last = (part.to(dtype).requires_grad_() for part in tokens(case, scale, (2, 6, 5), seed=0))
    loss = FORMS[form](first, last)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert last.grad.isfinite().all()


@every
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_tokens_give_the_value_of_float64(device, form, dtype, autocast):
    """A gradient is rounded to the type of its tokens, so to 8 bits at least; the value is not."""
    low = tokens("random", 1.0, (2, 49, 64), seed=0).to(dtype)
    loss, *gradients = value_and_gradients(form, low.to(device), autocast)
    expected, *slopes = value_and_gradients(form, low.double())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert (gradient.cpu().double() - slope).norm() <= max(1e-5, torch.finfo(dtype).eps) * slope.norm()


@every
def test_autocast_changes_nothing_and_float64_stays(device, form):
    first, last = tokens("random", 1.0, (2, 9, 8), seed=0).to(device)
    expected = FORMS[form](first, last)
    with torch.autocast(device, torch.bfloat16):
        assert FORMS[form](first, last).item() == expected.item()
    assert FORMS[form](first.double(), last.double()).dtype == torch.float64


@every
@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 3, 5), (2, 2, 3)], ids=str)
def test_the_gradient_equals_finite_differences(form, shape):
    first, last = (part.requires_grad_() for part in tokens("random", 1.0, shape, seed=3).double())
    assert torch.autograd.gradcheck(FORMS[form], (first, last))


@every
def test_the_loss_is_the_mean_over_images(form):
    first, last = tokens("random", 1.0, (3, 5, 4), seed=0).double()
    alone = [FORMS[form](f[None], h[None]).item() for f, h in zip(first, last, strict=True)]
    assert FORMS[form](first, last).item() == pytest.approx(sum(alone) / 3)


@pytest.mark.parametrize("form", [form for form, value in ONE_PATCH.items() if value is not None])
def test_one_patch_has_a_fixed_value_and_no_gradient(form):
    loss, *gradients = value_and_gradients(form, tokens("random", 1.0, (2, 1, 4), seed=0))
    assert loss.item() == pytest.approx(ONE_PATCH[form])
    assert all(gradient.abs().max() < 1e-3 for gradient in gradients)  # of 1,024 times the loss


@pytest.mark.parametrize("form", ["cosine paper", "cosine v1", "koleo", "spectral"])
def test_a_step_against_the_gradient_spreads_the_patches(form):
    last = (1 + 0.1 * torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))).requires_grad_()
    before = FORMS[form](last, last)
    before.backward()
    assert FORMS[form](last, last.detach() - 0.01 * last.grad) < before


@pytest.mark.parametrize(
    "term",
    [cosine_loss, lambda last, variant: contrastive_loss(last, last, variant), mixing],
    ids=["cosine", "contrastive", "mixing"],
)
def test_an_unknown_variant_is_refused_with_the_closest(term):
    with pytest.raises(UserError, match="papr") as caught:
        term(torch.ones(1, 4, 3), "papr")
    assert "'paper'" in caught.value.tip


def test_the_released_code_has_no_cosine_term():
    with pytest.raises(UserError, match="released"):
        cosine_loss(torch.ones(1, 4, 3), "released")


def test_the_configuration_has_the_same_names():
    assert schema.TERMS == TERMS
    assert schema.VARIANTS == VARIANTS
    assert all(preset.variant in VARIANTS for preset in schema.PRESETS.values())
