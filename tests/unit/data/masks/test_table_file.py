import pytest

from pdvit.data.masks.table import IGNORED, default_palette
from pdvit.data.masks.table_file import read_table
from pdvit.errors import UserError


def table(tmp_path, text):
    path = tmp_path / "classes.tsv"
    path.write_text(text, encoding="utf-8-sig")
    return read_table(path)


def test_camvids_table_ignores_what_is_unlabelled(tmp_path):
    found = table(tmp_path, "0\tSky\n1\tRoad\n11\tUnlabelled\n")
    assert found.names == ["Sky", "Road"]
    assert found.ids == {0: 0, 1: 1, 11: IGNORED, 255: IGNORED}
    assert found.colours is None
    assert found.palette == default_palette(2)


@pytest.mark.parametrize(
    "text", ["id,name,color\n4,a,#0A0b0C\n2,b,1 2 3\n\n", "name,colour,id\na,#0a0b0c,4\nb,1 2 3,2"]
)
def test_a_header_may_give_the_columns_in_any_order(tmp_path, text):
    found = table(tmp_path, text)
    assert (found.names, found.ids) == (["a", "b"], {255: IGNORED, 4: 0, 2: 1})
    assert found.colours == {(10, 11, 12): 0, (1, 2, 3): 1}
    assert found.palette == [(10, 11, 12), (1, 2, 3)]


def test_a_table_without_ids_reads_masks_by_colour(tmp_path):
    found = table(tmp_path, "name\tcolour\nsky\t#ff0000\nvoid\t#e0e0c0\nroad\t#00ff00\n")
    assert found.ids is None
    assert found.colours == {(255, 0, 0): 0, (224, 224, 192): IGNORED, (0, 255, 0): 1}


def test_classes_that_are_ignored_may_share_a_name(tmp_path):
    found = table(tmp_path, "0\tvoid\t#000000\n1\tvoid\t#010101\n2\ta\t#020202\n3\tb\t#030303\n")
    assert found.names == ["a", "b"]
    assert found.ids == {0: IGNORED, 1: IGNORED, 255: IGNORED, 2: 0, 3: 1}
    assert found.colours == {(0, 0, 0): IGNORED, (1, 1, 1): IGNORED, (2, 2, 2): 0, (3, 3, 3): 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 classes"),
        ("0\tonly\n", "1 classes"),
        ("0\ta\n1\tvoid\n", "1 classes"),
        ("".join(f"{n}\tc{n}\n" for n in range(255)), "255 classes"),
        ("0\ta\n0\tb\n", "same id, "),
        ("0\ta\n1\ta\n", "same name, a"),
        ("0\ta\t#000000\n1\tb\t#000000\n", "same colour"),
        ("0\ta\n1\tb\n2\tvoid\n2\tvoid\n", "same id, "),
        ("0\ta\t#000000\n1\tb\t#010101\n2\tvoid\t#000000\n", "same colour"),
        ("0\ta\t#000000\n1\tb\n", "'b' has no colour"),
        ("id\tname\n\ta\n1\tb\n", "'a' has no id"),
        ("0\ta\n1\n", "class 2 of the table has no name"),
        ("-1\ta\n1\tb\n", "id '-1' of 'a'"),
        ("70000\ta\n1\tb\n", "id '70000'"),
        ("name\na\nb\n", "neither ids nor colours"),
        ("0\ta\tred\n1\tb\t#000000\n", "'red' is no colour of 'a'"),
        ("0\ta\t1 2 256\n1\tb\t#000000\n", "'1 2 256' is no colour"),
    ],
)
def test_a_table_that_is_not_sound_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        table(tmp_path, text)
    assert caught.value.tip


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_can_not_be_read_is_refused(tmp_path, content):
    path = tmp_path / "classes.csv"
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError, match="can't be read"):
        read_table(path)
