from pathlib import Path

import pytest

from pdvit.data.sources import SOURCE_TYPES, absolute_path, list_source_types, run_name, source_type


@pytest.mark.parametrize(
    ("source", "label", "name"),
    [("digits", "paper", "digits-paper"), ("a/my set!", "from-b:c", "my-set--from-b-c"), ("/", "none", "data-none")],
)
def test_the_name_of_a_run_is_fit_for_a_file_name(source, label, name):
    assert run_name(source, label) == name


def test_every_type_has_a_line_and_is_in_the_docs():
    lines = list_source_types().splitlines()
    page = (Path(__file__).parents[4] / "docs" / "data.md").read_text(encoding="utf-8")
    for item in SOURCE_TYPES.values():
        assert sum(item.pattern in line for line in lines) == 1
        assert item.pattern in page


@pytest.mark.parametrize(
    ("source", "name"),
    [
        *((name, None) for name in ("some/folder", "a.zip", "./torch/cifar100", "")),
        *(("digits", "digits"), ("DIGITS", "digits"), ("FOLDER", None), ("DATA/Set.TAR", "tar"), ("a.csv", "csv")),
        *(("torch/cifar100", "torch"), ("HFDS/Owner/Name", "hfds")),
    ],
)
def test_the_text_identifies_the_type(source, name):
    assert source_type(source) == name


@pytest.mark.parametrize("prefix", ["", "hfds/", "HFDS/"])
def test_a_path_is_made_whole_behind_its_prefix(tmp_path, monkeypatch, prefix):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some/set").mkdir(parents=True)
    assert absolute_path(f"{prefix}some/set") == f"{prefix}{tmp_path}/some/set"
    assert absolute_path(f"{prefix}{tmp_path}/some/set") == f"{prefix}{tmp_path}/some/set"
    assert absolute_path(f"{prefix}owner/name") == f"{prefix}owner/name"
