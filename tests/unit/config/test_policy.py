import pytest

from pdvit.config.policy import Policy, parse_policy
from pdvit.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("rand", Policy()),
        ("rand-m9-mstd0.5-inc1", Policy(9, noise=0.5, increasing=True)),
        ("rand-n3-m7-p0.25-inc0", Policy(7, layers=3, prob=0.25)),
        ("rand-m5-mmax8-mstd101", Policy(5, noise=101, most=8)),
    ],
)
def test_a_policy_is_read_as_timm_reads_it(text, expected):
    assert parse_policy(text) == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("augmix-m5", "augmix"),
        ("original", "original"),
        ("3a", "3a"),
        ("rand-m9-t3a", "t3a"),
        ("rand-m9-tweights", "tweights"),
        ("rand-q3", "q3"),
        ("rand-", "''"),
        ("rand-m", "'m'"),
        ("rand-m9.5", "m9.5"),
        ("rand-mstd0.5.5", "mstd0.5.5"),
        ("rand-m12", "rand-m12"),
        ("rand-m9-mmax20", "mmax20"),
        ("rand-p1.5", "p1.5"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(text, named):
    with pytest.raises(UserError) as caught:
        parse_policy(text)
    assert named in caught.value.what
    assert "--aa" in caught.value.where
