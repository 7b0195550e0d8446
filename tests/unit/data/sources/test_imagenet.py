import zipfile

import pytest
from PIL import Image

from pdvit.config.schema import DataConfig
from pdvit.data.sources import open_source
from pdvit.errors import UserError

ANT, BEE = "n02219486", "n02206856"
VALIDATION = {"ILSVRC2012_val_00000001": BEE, "ILSVRC2012_val_00000002": ANT, "ILSVRC2012_val_00000003": BEE}


@pytest.fixture
def kaggle(tmp_path):
    root = tmp_path / "imagenet"
    images = root / "ILSVRC" / "Data" / "CLS-LOC"
    files = [f"train/{name}/{name}_{number}.JPEG" for name in (ANT, BEE) for number in (1, 2)]
    for file in [*files, *(f"val/{name}.JPEG" for name in VALIDATION), "test/ILSVRC2012_test_00000001.JPEG"]:
        (images / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5)).save(images / file)
    rows = "".join(f"{name},{wnid} 1 2 3 4 {wnid} 5 6 7 8\n" for name, wnid in VALIDATION.items())
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + rows)
    return root


def packed(root):
    file = root.with_suffix(".zip")
    with zipfile.ZipFile(file, "w") as archive:
        for path in root.rglob("*"):
            archive.write(path, path.relative_to(root))
    return file


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_kaggles_layout_takes_the_classes_of_validation_from_its_table(kaggle, form):
    source = open_source(DataConfig(source=str(kaggle if form == "folder" else packed(kaggle))))
    assert source.classes == [BEE, ANT]
    assert source.splits["train"].labels.tolist() == [0, 0, 1, 1]
    val = source.splits["val"]
    found = {val.key(index).removesuffix(".JPEG"): source.classes[int(val.labels[index])] for index in range(len(val))}
    assert found == VALIDATION
    assert set(source.splits) == {"train", "val"}


def test_the_table_has_to_be_there_and_whole(kaggle):
    table = kaggle / "LOC_val_solution.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:-1]))
    with pytest.raises(UserError, match="ILSVRC2012_val_00000003"):
        open_source(DataConfig(source=str(kaggle)))
    table.unlink()
    with pytest.raises(UserError, match=r"LOC_val_solution\.csv is not there"):
        open_source(DataConfig(source=str(kaggle)))


def test_folders_of_wordnet_ids_are_a_folder_like_any_other(kaggle):
    images = kaggle / "ILSVRC" / "Data" / "CLS-LOC"
    for name, wnid in VALIDATION.items():
        (images / "val" / wnid).mkdir(exist_ok=True)
        (images / "val" / f"{name}.JPEG").rename(images / "val" / wnid / f"{name}.JPEG")
    source = open_source(DataConfig(source=str(images)))
    assert source.splits["val"].labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("options", [{"train_split": "bogus"}, {"val_split": "test"}])
def test_kaggles_layout_has_no_other_splits(kaggle, options):
    with pytest.raises(UserError, match="there is no split"):
        open_source(DataConfig(source=str(kaggle), **options))
