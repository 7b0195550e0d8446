"""What every term promises in every variant: value and gradient finite whatever the tokens, in float32, one piece."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pdvit.config import presets
from pdvit.losses import TERMS, VARIANTS, contrastive_loss, cosine_loss, koleo_loss, spectral_loss

FORMS = {
    **{f"cosine {v}": lambda first, last, v=v: cosine_loss(last, v) for v in VARIANTS if v != "released"},
    **{
        f"contrastive {v}": lambda first, last, v=v: contrastive_loss(first, last, v, False, (1, last.shape[1]))
        for v in VARIANTS
    },
    "koleo": lambda first, last: koleo_loss(last),
    "spectral": lambda first, last: spectral_loss(last),
}
every = pytest.mark.parametrize("form", FORMS)


def tokens(case: str, scale: float, shape: tuple[int, int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, *shape, generator=generator)
    if case == "identical":
        return torch.full_like(noise, scale)
    if case == "one zero":
        noise[:, :, 0] = 0
    return scale * (1 + 1e-6 * noise if case == "nearly identical" else noise)


@every
@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(["random", "identical", "nearly identical", "one zero"]),
    scale=st.sampled_from([0.0, 1e-40, 1e-30, 1e-12, 1e-6, 1.0, 1e3, 1e6]),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 5)),
    autocast=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_value_and_gradient_are_finite(form, case, scale, shape, autocast, seed):
    first, last = (part.clone().requires_grad_() for part in tokens(case, scale, shape, seed))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = FORMS[form](first, last)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert last.grad.isfinite().all()
    assert first.grad is None or first.grad.isfinite().all()


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
def test_short_numbers_give_what_the_same_numbers_give_in_float64(device, form, dtype, autocast):
    """A gradient is rounded to its tokens' type, so to 8 bits at least; the value is not.

    The loss is scaled as a run in float16 does it: some gradients would be too small for that type.
    """
    short = tokens("random", 1.0, (2, 49, 64), seed=0).to(dtype)
    found, expected = [], []
    for numbers, gradients in ((short.to(device), found), (short.double(), expected)):
        first, last = (part.clone().requires_grad_() for part in numbers)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = FORMS[form](first, last)
        (1024 * loss).backward()
        gradients += [loss.detach().cpu().double(), last.grad.cpu().double()]
        gradients += [] if first.grad is None else [first.grad.cpu().double()]
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert (ours - theirs).norm() <= max(1e-5, torch.finfo(dtype).eps) * theirs.norm()


@every
def test_autocast_changes_nothing_and_float64_stays(device, form):
    first, last = tokens("random", 1.0, (2, 9, 8), seed=0).to(device)
    expected = FORMS[form](first, last)
    with torch.autocast(device, torch.bfloat16):
        assert FORMS[form](first, last).item() == expected.item()
    assert FORMS[form](first.double(), last.double()).dtype == torch.float64


def test_the_configuration_knows_the_same_names():
    assert presets.TERMS == TERMS
    assert presets.VARIANTS == VARIANTS
    for preset in presets.PRESETS.values():
        assert preset.variant in VARIANTS
