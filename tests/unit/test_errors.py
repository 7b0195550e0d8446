import pytest

from pdvit.errors import RunFailed, UserError, closest


def test_a_user_error_is_three_lines():
    lines = str(UserError("no such thing", "over there", "look elsewhere")).splitlines()
    assert [line.strip() for line in lines] == ["no such thing", "where: over there", "tip:   look elsewhere"]


def test_a_failed_run_says_what_and_a_tip():
    lines = str(RunFailed("it broke", "mend it")).splitlines()
    assert [line.strip() for line in lines] == ["it broke", "tip:   mend it"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("cosin", "cosine"), ("COSINE", "cosine"), ("mixin", "mixing"), ("vit_tiny", "vit_tiny_patch16_224")],
)
def test_the_closest_option_is_named(typed, meant):
    options = ["contrastive", "cosine", "mixing", "vit_tiny_patch16_224"]
    assert closest(typed, options) == f"did you mean '{meant}'?"


def test_an_exact_match_wins_over_a_longer_option():
    assert closest("lr", ["lr_noise", "lr"]) == "did you mean 'lr'?"


def test_options_are_listed_where_none_is_alike():
    assert closest("zzz", ["cosine", "mixing"]) == "choose from: cosine, mixing"


def test_a_long_list_of_options_is_cut():
    assert closest("zzz", (f"option{i}" for i in range(9)), shown=2) == "choose from: option0, option1, ..."


def test_exactly_as_many_options_as_shown_are_not_cut():
    assert closest("zzz", ["cosine", "mixing"], shown=2) == "choose from: cosine, mixing"


def test_no_options_at_all_are_no_crash():
    assert "did you mean" not in closest("zzz", [])
