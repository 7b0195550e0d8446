from pathlib import Path

import pytest

from pdvit.data.kinds import KINDS, kind_of, list_kinds
from pdvit.data.sources import READERS


def test_every_kind_has_a_reader_a_line_and_a_place_in_the_docs():
    assert [kind.name for kind in KINDS] == list(READERS)
    lines = list_kinds().splitlines()
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    for kind in KINDS:
        assert sum(kind.written in line for line in lines) == 1
        assert all(part.strip() in page for part in kind.written.split(","))


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("digits", "digits"),
        ("some/folder", None),
        ("DATA/Set.TAR.GZ", "archive"),
        ("a.zip", "archive"),
        ("a.csv", "csv"),
        ("torch/cifar100", "torch"),
        ("HFDS/Owner/Name", "hfds"),
        ("./torch/cifar100", None),
        ("", None),
    ],
)
def test_a_kind_is_told_by_the_text(source, kind):
    assert kind_of(source) == kind
