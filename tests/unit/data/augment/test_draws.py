import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.data import auto_augment as timm_ops

from pdvit.config.policy import Policy, parse_policy
from pdvit.data.augment.draws import DRAWS, arguments_of, draw_jitter, draw_policy
from pdvit.data.augment.operations import NAMES
from pdvit.data.randomness import uniform


def timm_name(name, increasing):
    grows = name in ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
    return name + ("Increasing" if increasing and grows else "Rel" if name.startswith("Translate") else "")


@given(st.floats(0, 10), st.sampled_from([-1.0, 1.0]), st.booleans())
def test_arguments_are_those_of_timm(level, sign, increasing):
    table = arguments_of(torch.tensor([level], dtype=torch.float64), torch.tensor([sign]), increasing)
    assert set(table) == set(NAMES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm_ops, "_randomly_negate", lambda value: sign * value)
        for name, found in table.items():
            rule = timm_ops.LEVEL_TO_ARG[timm_name(name, increasing)]
            expected = rule(level, {}) if rule else (0.0,)
            assert found.tolist() == pytest.approx(list(expected), abs=1e-6), name


@pytest.mark.parametrize("increasing", [False, True])
def test_operations_are_those_of_timm(increasing):
    names = timm_ops.rand_augment_choices("", increasing)
    assert {timm_name(name, increasing) for name in NAMES} == set(names)


def policy_draws(count, policy):
    return draw_policy(uniform(3, torch.arange(count), policy.layers * DRAWS), policy)


def test_each_operation_comes_as_often_and_half_are_left_out():
    chosen, _ = policy_draws(20_000, Policy(layers=3))
    assert chosen.shape == (20_000, 3)
    counts = (chosen + 1).flatten().bincount(minlength=len(NAMES) + 1) / chosen.numel()
    assert counts[0] == pytest.approx(0.5, abs=0.01)
    torch.testing.assert_close(counts[1:], torch.full((len(NAMES),), 0.5 / len(NAMES)), atol=0.004, rtol=0)


def levels(policy, name="Rotate"):
    chosen, arguments = policy_draws(60_000, policy)
    return arguments[chosen == NAMES.index(name)] / 3  # 30 degrees at level 10


def test_the_magnitude_is_normal_and_cut():
    found = levels(parse_policy("rand-m6-mstd0.5-n1-p1"))
    assert found.abs().mean() == pytest.approx(6, abs=0.05)
    assert found.abs().std() == pytest.approx(0.5, abs=0.03)
    assert (found > 0).double().mean() == pytest.approx(0.5, abs=0.03)
    cut = levels(parse_policy("rand-m9-mstd3-n1-p1")).abs()
    assert cut.max() == pytest.approx(10)
    assert (cut > 9.9999).double().mean() == pytest.approx(0.369, abs=0.03)  # the normal's tail above a third


def test_a_magnitude_can_be_fixed_or_even():
    assert levels(Policy(magnitude=4, layers=1)).abs().unique().tolist() == [4]
    even = levels(parse_policy("rand-m8-mstd101-n1")).abs()
    assert (float(even.min()), float(even.max())) == pytest.approx((0, 8), abs=0.05)
    assert even.mean() == pytest.approx(4, abs=0.15)


@pytest.mark.parametrize(("strength", "low", "high"), [(0.4, 0.6, 1.4), (2.0, 0.0, 3.0)])
def test_the_jitter_has_three_factors_in_any_order(strength, low, high):
    chosen, factors = draw_jitter(uniform(1, torch.arange(12_000), 6), strength)
    orders, counts = chosen.unique(dim=0, return_counts=True)
    assert {NAMES[place] for place in orders.flatten().tolist()} == {"Brightness", "Contrast", "Color"}
    assert len(orders) == 6
    assert counts.min() > 1800
    assert (float(factors.min()), float(factors.max())) == pytest.approx((low, high), abs=0.01)
    assert factors.mean() == pytest.approx((low + high) / 2, abs=0.02)
