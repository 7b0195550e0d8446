import pytest
from PIL import Image

from pdvit.config.schema import DataConfig
from pdvit.data.sources import list_images, open_source, source_label
from pdvit.errors import UserError


def layout(root, tree):
    """Make an image file for each split/class/file name."""
    for path in tree:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(file)
    return root


def folder(root):
    return open_source(DataConfig(source=str(root)))


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_a_folder_of_class_folders_is_a_source(tmp_path, validation):
    files = ["train/bee/1.png", "train/bee/deep/2.PNG", "train/ant/3.jpg", f"{validation}/ant/4.png"]
    source = folder(layout(tmp_path / "insects", [*files, f"{validation}/bee/5.png"]))
    assert source.name == "insects"
    assert source.classes == ["ant", "bee"]
    assert [path.name for path in source.splits["train"].paths] == ["3.jpg", "1.png", "2.PNG"]
    assert source.splits["train"].labels.tolist() == [0, 1, 1]
    assert [path.name for path in source.splits["val"].paths] == ["4.png", "5.png"]
    assert set(source.splits) == {"train", "val"}
    assert source.final_split == "val"


def test_a_test_folder_is_the_final_split(tmp_path):
    source = folder(layout(tmp_path, ["train/ant/1.png", "val/ant/2.png", "test/ant/3.png"]))
    assert source.final_split == "test"
    assert [path.name for path in source.splits["test"].paths] == ["3.png"]


def test_a_test_folder_of_loose_images_is_no_split(tmp_path):
    assert set(folder(layout(tmp_path, ["train/a/1.png", "val/a/2.png", "test/3.png"])).splits) == {"train", "val"}


def test_names_may_be_in_any_script(tmp_path):
    root = layout(tmp_path / "zvířata 動物", ["train/žába/один.png", "val/žába/δύο.png"])
    source = folder(root)
    assert source.classes == ["žába"]
    assert source.splits["val"].paths[0].name == "δύο.png"
    assert source_label(DataConfig(source=str(root))) == "zvířata-動物"


def test_hidden_folders_and_other_files_are_passed_over(tmp_path):
    layout(tmp_path, ["train/ant/1.png", "val/ant/2.png", "train/.cache/3.png"])
    (tmp_path / "train/ant/notes.txt").write_text("not an image")
    (tmp_path / "train/README.md").write_text("not a class")
    source = folder(tmp_path)
    assert source.classes == ["ant"]
    assert len(source.splits["train"]) == 1


@pytest.mark.parametrize(
    ("tree", "what"),
    [
        ([], "no folder train/ (found: nothing)"),
        (["pictures/ant/1.png"], "found: pictures"),
        (["train/1.png", "val/ant/2.png"], "no class folders"),
        (["train/ant/1.png"], "no folder val/"),
        (["train/ant/1.png", "val/ant/2.png", "val/bee/3.png"], "class 'bee' of val/ is not in train/"),
        (["train/ant/1.png", "train/bee/2.png", "val/ant/3.png"], "class 'bee' has no images in val/"),
        (["train/ant/1.png", "val/ant/2.png", "test/bee/3.png"], "class 'bee' of test/ is not in train/"),
    ],
)
def test_a_folder_of_another_layout_is_refused(tmp_path, tree, what):
    with pytest.raises(UserError) as caught:
        folder(layout(tmp_path, tree))
    assert what in caught.value.what


def test_a_class_without_images_is_refused(tmp_path):
    layout(tmp_path, ["train/ant/1.png", "val/ant/2.png"])
    (tmp_path / "train/bee").mkdir()
    with pytest.raises(UserError, match="class 'bee' has no images in train/"):
        folder(tmp_path)


def test_the_list_of_images_is_in_order(tmp_path):
    layout(tmp_path, ["b.png", "a.jpeg", "c/d.webp"])
    assert [path.name for path in list_images(tmp_path)] == ["a.jpeg", "b.png", "d.webp"]
