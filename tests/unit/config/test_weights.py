import pytest

from pdvit.config import Duration, build, resolve
from pdvit.config.weights import weight_schedule
from pdvit.errors import UserError


def read(text: str) -> dict[str, Duration]:
    return weight_schedule(build(("flags", {"diversity": {"koleo_schedule": text}})).diversity, "koleo")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("constant", {}),
        (" constant ", {}),
        ("warmup:3ep", {"warmup": Duration(3, "ep")}),
        ("warmup:3", {"warmup": Duration(3, "ep")}),
        ("decay:10%", {"decay": Duration(10, "%")}),
        ("until:1e6im", {"until": Duration(1e6, "im")}),
        ("warmup:200st, until:50%", {"warmup": Duration(200, "st"), "until": Duration(50, "%")}),
        (
            "decay:1ep,warmup:2ep,until:3ep",
            {"decay": Duration(1, "ep"), "warmup": Duration(2, "ep"), "until": Duration(3, "ep")},
        ),
    ],
)
def test_the_parts_and_their_lengths_are_read(text, parts):
    assert read(text) == parts


@pytest.mark.parametrize(
    ("text", "what", "tip"),
    [
        ("warmpu:3ep", "warmpu", "'warmup'"),
        ("", "empty", "constant, or"),
        ("warmup", "needs a length", "warmup:3ep"),
        ("warmup:3ep,", "empty", "warmup:3ep"),
        ("warmup:3ep,warmup:4ep", "twice", "once"),
        ("constant,warmup:3ep", "stands alone", "leave"),
        ("constant:3ep", "stands alone", "leave"),
        ("until:soon", "soon", "30ep"),
        ("until:", "not a length", "30ep"),
        ("until:10min", "10min", "30ep"),
        ("decay:101%", "101%", "100 %"),
        ("decay:-1ep", "-1ep", "30ep"),
    ],
)
def test_anything_else_is_refused_before_the_run(text, what, tip):
    with pytest.raises(UserError) as caught:
        resolve(build(("flags", {"diversity": {"mixing_schedule": text}})))
    assert what in caught.value.what
    assert tip in caught.value.tip
    assert caught.value.where == "diversity.mixing_schedule (--mixing-schedule)"
