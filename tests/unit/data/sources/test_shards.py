import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from pdvit.config.schema import DataConfig
from pdvit.data.sources import open_source
from pdvit.errors import UserError


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def image(value):
    content = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()


def shard(file, samples, label="cls"):
    """Write samples (number, class): each image is as bright as its number."""
    with tarfile.open(file, "w") as tar:
        for number, target in samples:
            written = str(target) if label == "cls" else json.dumps({"kind": target})
            add(tar, f"part/{number:04}.{label}", written.encode())
            add(tar, f"part/{number:04}.png", image(number))
            add(tar, f"part/{number:04}.note.txt", b"more")


@pytest.fixture
def shards(tmp_path):
    root = tmp_path / "shards"
    root.mkdir()
    for number in range(3):
        shard(root / f"set-train-{number:03}.tar", [(10 * number + item, item % 2) for item in range(6)])
    shard(root / "set-val-000.tar", [(90, 0), (91, 1)])
    return root


def opened(root, **options):
    return open_source(DataConfig(source="wds/set", root=str(root), **options))


def values(split):
    return [int(np.asarray(split.open(index))[0, 0, 0]) for index in range(len(split))]


TRAIN = [10 * number + item for number in range(3) for item in range(6)]


def test_shards_are_found_by_their_names_and_read_at_random(shards):
    source = opened(shards)
    assert source.classes == ["0", "1"]
    assert values(source.splits["train"]) == TRAIN
    assert source.splits["train"].labels.tolist() == [value % 2 for value in TRAIN]
    assert values(source.splits["val"]) == [90, 91]
    assert source.splits["train"].open(7).size == (4, 4)
    assert source.splits["train"].name(7) == f"{shards}/set-train-001.tar/part/0011.png"


def test_the_list_of_shards_wins(shards):
    splits = {"train": {"filenames": ["set-train-001.tar"]}, "validation": {"filenames": ["set-val-000.tar"]}}
    (shards / "_info.json").write_text(json.dumps({"splits": splits}))
    assert values(opened(shards).splits["train"]) == TRAIN[6:12]
    (shards / "_info.json").write_text("{}")
    with pytest.raises(UserError, match="list of shards"):
        opened(shards)


@pytest.mark.parametrize("named", ["set-train-{000..001}.tar", "set-train-{000..001}.tar|12", "set-train-00[01].tar"])
def test_shards_may_be_named_as_for_timm(shards, named):
    source = opened(shards, train_split=named, val_split="set-val-000.tar")
    assert values(source.splits["train"]) == TRAIN[:12]


def test_the_folder_may_stand_behind_the_prefix(shards):
    assert len(open_source(DataConfig(source=f"wds/{shards}")).splits["train"]) == 18


def test_labels_may_lie_in_json(tmp_path):
    shard(tmp_path / "train.tar", [(1, "bee"), (2, "ant"), (3, "bee")], "json")
    shard(tmp_path / "val.tar", [(4, "ant")], "json")
    source = opened(tmp_path, target_key="kind")
    assert source.classes == ["ant", "bee"]
    assert source.splits["train"].labels.tolist() == [1, 0, 1]
    with pytest.raises(UserError, match=r"no label in \.cls"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"train_split": "set-train-{000..004}.tar"}, "2 shards are missing"),
        ({"train_split": "none-*.tar"}, "shards are missing"),
        ({"train_split": "https://example.org/{000..004}.tar"}, "over a network"),
    ],
)
def test_shards_that_are_not_there_are_refused(shards, options, what):
    with pytest.raises(UserError) as caught:
        opened(shards, **options)
    assert what in caught.value.what


def test_a_folder_without_shards_and_a_label_out_of_range(tmp_path, shards):
    with pytest.raises(UserError, match="no shards"):
        opened(tmp_path)
    shard(shards / "set-val-000.tar", [(90, 0), (91, 7)])
    with pytest.raises(UserError, match="label 7 of sample 1 in val is none of the 2 classes"):
        opened(shards)
    shard(shards / "set-val-000.tar", [(90, -1)])
    with pytest.raises(UserError, match="label -1"):
        opened(shards)
