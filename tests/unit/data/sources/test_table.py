import pytest

from tests.errors import refused
from tests.unit.data.batches import keys, opened


def table(folder, text, **options):
    (folder / "set.csv").write_text(text, encoding="utf-8")
    return opened(folder / "set.csv", **options)


SPLIT = "path,label,split\na/1.png,cat,train\na/2.png,dog,train\n/abs/3.png,dog,val\n"


def test_paths_are_relative_to_the_table_and_classes_those_of_train(tmp_path):
    source = table(tmp_path, SPLIT)
    assert source.name == "set"
    assert source.classes == ["cat", "dog"]
    assert [str(path) for path in source.splits["train"].paths] == [f"{tmp_path}/a/1.png", f"{tmp_path}/a/2.png"]
    assert [str(path) for path in source.splits["val"].paths] == ["/abs/3.png"]
    assert source.splits["val"].labels.tolist() == [1]
    assert "1 of 2 classes have no image in val: cat" in source.describe()


def test_whole_numbers_are_in_the_order_of_numbers_and_empty_rows_are_skipped(tmp_path):
    rows = "".join(f"{label}-{copy}.png,{label}\n" for label in (10, 9, 2) for copy in range(10))
    source = table(tmp_path, f"path,label\n\n,,\n{rows}")
    assert source.classes == ["2", "9", "10"]
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 27, "val": 3}
    assert "split_seed 0" in source.describe()


def test_rows_of_splits_that_are_not_used_are_counted(tmp_path):
    source = table(tmp_path, SPLIT + "4.png,cat,unsure\n5.png,cat,unsure\n")
    assert "2 rows of split 'unsure' are not used" in source.describe()
    named = table(tmp_path, SPLIT + "4.png,cat,unsure\n", val_split="unsure")
    assert keys(named.splits["val"]) == ["4.png"]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("path,label\n1.png,žába\n".encode("utf-16"), "can't be read"),
        ("", "no column 'path'"),
        ("file,label\n1.png,a\n", "no column 'path' (it has: file, label)"),
        ("path,class\n1.png,a\n", "no column 'label'"),
        ("path,label,split\n1.png,a,train\n2.png,a,\n", "no split 'val'"),
        ("path,label\n", "no rows"),
        ("path,label,label\n1.png,a,b\n", "two columns 'label'"),
        ("path,label\n1.png,cat, black\n2.png,dog\n", "more cells than the header"),
        ("path,label\n1.png,\n", "without path or label"),
        ("path,label\n1.png\n", "without path or label"),
        ("path,label\n1.png,-1\n2.png,0\n", "label -1 is below 0"),
        ('path,label\n"1.png,a\n', "can't be read"),
        ("path,label,split\n1.png,a,train\n2.png,b,val\n", "label 'b' of val is none of the 1 labels of train"),
        ("path,label,split\n1.png,a,train\n2.png,a,dev\n", "no split 'val' (found: train, dev)"),
        ("path,label,split\n1.png,a,val\n", "no split 'train'"),
    ],
)
def test_a_table_that_is_not_sound_is_refused(tmp_path, text, what):
    (tmp_path / "set.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with refused(what, where="set.csv"):
        opened(tmp_path / "set.csv")


def test_one_image_in_two_splits_or_with_two_labels_is_a_warning(tmp_path):
    source = table(tmp_path, SPLIT + "a/1.png,dog,train\na/./2.png,dog,val\n5.png,cat,train\n5.png,cat,train\n")
    for text in ("repeated: 1 (", "in two splits: 1 (", "with two labels: 1 ("):
        assert f"warning: images {text}" in source.describe()
    assert "warning" not in table(tmp_path, SPLIT).describe()


@pytest.mark.parametrize("options", [{"train_split": "bogus"}, {"val_split": "test"}])
def test_a_table_without_splits_has_none_to_name(tmp_path, options):
    with refused("found: nothing"):
        table(tmp_path, "path,label\na.png,cat\nb.png,cat\n", **options)
