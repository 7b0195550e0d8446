import pytest

from pdvit.errors import RunFailed, UserError, closest


def test_errors_are_lines_with_labels():
    lines = str(UserError("no such thing", "over there", "look elsewhere")).splitlines()
    assert [line.strip() for line in lines] == ["no such thing", "where: over there", "tip:   look elsewhere"]
    hostile = str(UserError("a\x1b[31m\udcff", "b\n" * 9, "c" * 10**6))
    assert [line.isprintable() and len(line) < 3000 for line in hostile.splitlines()] == [True] * 3
    lines = str(RunFailed("it broke", "repair it")).splitlines()
    assert [line.strip() for line in lines] == ["it broke", "tip:   repair it"]


@pytest.mark.parametrize(
    ("typed", "options", "tip"),
    [
        *(("cosin", ["mixing", "cosine"], "did you mean 'cosine'?"), ("COSINE", ["cosine"], "did you mean 'cosine'?")),
        ("vit_tiny", ["cosine", "vit_tiny_patch16_224"], "did you mean 'vit_tiny_patch16_224'?"),
        ("lr", ["lr_noise", "lr"], "did you mean 'lr'?"),  # an exact match wins over a longer option
        ("zzz", ["cosine", "mixing"], "choose from: cosine, mixing"),
        ("zzz", [f"option{number}" for number in range(9)], "choose from: option0, option1, ..."),
    ],
)
def test_the_closest_option_is_named_or_the_first_ones_are_listed(typed, options, tip):
    assert closest(typed, options, shown=2) == tip
    assert "did you mean" not in closest(typed, [])
