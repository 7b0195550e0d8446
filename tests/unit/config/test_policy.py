import pytest
from timm.data.auto_augment import rand_augment_transform

from pdvit.config.policy import check_auto_augment
from pdvit.errors import UserError


@pytest.mark.parametrize(
    "text", ["", "rand", "rand-m9-mstd0.5-inc1", "rand-n3-p0.7-m5", "rand-m12-mmax20", "rand-mstd101"]
)
def test_what_timm_reads_is_accepted(text):
    check_auto_augment(text)
    if text:
        rand_augment_transform(text)


@pytest.mark.parametrize(
    "text",
    [
        "augmix-m3",
        "original",
        "9",
        "rand-",
        "rand-m",
        "rand-mx",
        "rand-m9.5",
        "rand-q1",
        "rand-inc2",
        "rand-m11",
        "rand-p2",
    ],
)
def test_other_policies_are_refused_with_an_example(text):
    with pytest.raises(UserError) as caught:
        check_auto_augment(text)
    assert "--aa" in caught.value.where
