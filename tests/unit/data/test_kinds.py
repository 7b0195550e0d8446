from dataclasses import fields
from pathlib import Path

import pytest

from pdvit.config.schema import DataConfig
from pdvit.data.kinds import KINDS, OF_SOURCES, TAKES, kind_of, list_kinds, unused_source_settings, whole_path
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
        ("DATA/Set.TAR", "tar"),
        ("a.zip", None),
        ("a.csv", "csv"),
        ("torch/cifar100", "torch"),
        ("HFDS/Owner/Name", "hfds"),
        ("./torch/cifar100", None),
        ("", None),
    ],
)
def test_a_kind_is_told_by_the_text(source, kind):
    assert kind_of(source) == kind


@pytest.mark.parametrize(
    ("source", "setting"),
    [
        ("digits", {"val_split": "nonsense"}),
        ("digits:0-4", {"root": "data"}),
        ("some/folder", {"input_key": "img"}),
        ("a.tar", {"download": True}),
        ("a.csv", {"target_key": "class"}),
        ("torch/cifar100", {"input_key": "img"}),
    ],
)
def test_a_setting_without_effect_is_noted(source, setting):
    (note,) = unused_source_settings(DataConfig(source=source, **setting))
    assert note.startswith(f"data.{next(iter(setting))} = ")


@pytest.mark.parametrize(
    "data",
    [
        DataConfig(),
        DataConfig(source="some/folder", train_split="fit", val_split="check"),
        DataConfig(source="torch/cifar100", root="data", download=True),
        DataConfig(source="hfds/owner/name", input_key="img", target_key="fine_label"),
    ],
)
def test_a_setting_with_effect_is_not(data):
    assert unused_source_settings(data) == []


def test_every_kind_says_which_settings_it_takes():
    assert list(TAKES) == [kind.name for kind in KINDS]
    assert set(OF_SOURCES) <= {item.name for item in fields(DataConfig)}


@pytest.mark.parametrize("prefix", ["", "hfds/", "HFDS/"])
def test_a_path_is_made_whole_behind_its_prefix(tmp_path, monkeypatch, prefix):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some/set").mkdir(parents=True)
    assert whole_path(f"{prefix}some/set") == f"{prefix}{tmp_path}/some/set"
    assert whole_path(f"{prefix}{tmp_path}/some/set") == f"{prefix}{tmp_path}/some/set"
    assert whole_path(f"{prefix}owner/name") == f"{prefix}owner/name"


@pytest.mark.parametrize("source", ["digits", "torch/mnist"])
def test_a_name_is_no_path(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "mnist"):
        (tmp_path / name).mkdir()
    assert whole_path(source) == source
