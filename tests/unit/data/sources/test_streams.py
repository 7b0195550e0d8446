import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pdvit.config.schema import DataConfig
from pdvit.data.sources import open_source
from pdvit.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")


def opened(**options):
    said = []
    return open_source(DataConfig(**options), said.append), said


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PDVIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_stream_of_the_hub_is_copied_once(image_folder, tmp_path, cache):
    pytest.importorskip("datasets", reason="datasets is not installed (extra hf-data)")
    options = {"source": f"hfids/{image_folder}", "root": str(tmp_path / "hub"), "download": True}
    source, said = opened(**options)
    assert any(str(cache) in line for line in said)
    assert source.classes == ["blue", "green", "red"]
    for name, split in source.splits.items():
        files = {np.asarray(Image.open(path)).tobytes() for path in (image_folder / name).rglob("*.png")}
        assert {np.asarray(split.open(index)).tobytes() for index in range(len(split))} == files
    again, said = opened(**options)
    assert not any("copying" in line for line in said)
    assert again.fingerprint() == source.fingerprint()


def test_a_set_of_tensorflow_is_copied_once(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="tensorflow_datasets is not installed (extra tf-data)")

    class TinyPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(shape=(4, 4, 3)), "label": tfds.features.ClassLabel(names=NAMES)}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"train": self._generate_examples(30), "test": self._generate_examples(6)}

        def _generate_examples(self, count):
            for number in range(count):
                yield number, {"image": np.full((4, 4, 3), number, dtype=np.uint8), "label": number % 3}

    sys.modules.setdefault(TinyPictures.__module__, sys.modules[__name__])
    options = {"source": "tfds/tiny_pictures", "root": str(tmp_path / "tfds"), "download": True}
    source, _ = opened(**options)
    assert source.classes == NAMES
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 27, "val": 3, "test": 6}
    for split in source.splits.values():
        values = [int(np.asarray(split.open(index))[0, 0, 0]) for index in range(len(split))]
        assert [value % 3 for value in values] == split.labels.tolist()
    assert opened(**options)[0].fingerprint() == source.fingerprint()


NAMES = ["one", "two", "three"]


class Stream:
    """What timm's `create_dataset` returns for a stream: images as bright as their numbers, every process its part."""

    def __init__(self, count, said, broken=False):
        self.count, self.broken, self.reader = count, broken, self
        self.class_to_idx, self.num_samples = {name: index for index, name in enumerate(NAMES)}, said
        self.builder = SimpleNamespace(info=SimpleNamespace(splits=["train"], version="1.0.0"))
        self.dist_rank, self.dist_num_replicas = 1, 2  # as timm finds them under torchrun

    def __iter__(self):
        for number in range(self.dist_rank, self.count, self.dist_num_replicas):
            yield Image.new("RGB", (4, 4), (number, 0, 0)), number % 3
        if self.broken:
            raise ConnectionError("the network is down")


@pytest.fixture
def stream(monkeypatch):
    monkeypatch.setattr("pdvit.data.sources.streams.need", lambda *_: None)

    def use(*arguments):
        monkeypatch.setattr("pdvit.data.sources.streams.open_timm", lambda data, split: Stream(*arguments))

    return use


def test_several_processes_copy_every_image(stream):
    stream(60, 60)
    source, _ = opened(source="hfids/owner/name")
    parts = source.splits.values()
    values = [split.open(index).getpixel((0, 0))[0] for split in parts for index in range(len(split))]
    assert sorted(values) == list(range(60))


@pytest.mark.parametrize(
    ("arguments", "what"), [((50, 60), "gave 50 images of the 60"), ((60, 60, True), "breaks off: the network is down")]
)
def test_a_stream_that_ends_early_is_refused_and_not_kept(stream, cache, arguments, what):
    stream(*arguments)
    with pytest.raises(UserError, match=what):
        opened(source="hfids/owner/name")
    stream(60, 60)
    assert sum(map(len, opened(source="hfids/owner/name")[0].splits.values())) == 60


def test_folders_of_one_name_have_copies_of_their_own(stream, tmp_path, monkeypatch):
    for place, count in (("here", 30), ("there", 60)):
        (tmp_path / place / "pictures").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / place)
        stream(count, count)
        assert sum(map(len, opened(source="hfids/pictures")[0].splits.values())) == count
