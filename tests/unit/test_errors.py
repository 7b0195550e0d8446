import pytest

from pdvit.errors import RunFailed, UserError, closest


def test_errors_are_lines_with_labels():
    lines = str(UserError("no such thing", "over there", "look elsewhere")).splitlines()
    assert [line.strip() for line in lines] == ["no such thing", "where: over there", "tip:   look elsewhere"]
    lines = str(RunFailed("it broke", "repair it")).splitlines()
    assert [line.strip() for line in lines] == ["it broke", "tip:   repair it"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("cosin", "cosine"), ("COSINE", "cosine"), ("mixin", "mixing"), ("vit_tiny", "vit_tiny_patch16_224")],
)
def test_the_closest_option_is_named(typed, meant):
    options = ["contrastive", "cosine", "mixing", "vit_tiny_patch16_224"]
    assert closest(typed, options) == f"did you mean '{meant}'?"


def test_an_exact_match_wins_over_a_longer_option():
    assert closest("lr", ["lr_noise", "lr"]) == "did you mean 'lr'?"


@pytest.mark.parametrize(
    ("options", "tip"),
    [
        (["cosine", "mixing"], "choose from: cosine, mixing"),
        ([f"option{number}" for number in range(9)], "choose from: option0, option1, ..."),
    ],
)
def test_options_are_listed_if_none_is_similar(options, tip):
    assert closest("zzz", options, shown=2) == tip
    assert "did you mean" not in closest("zzz", [])
