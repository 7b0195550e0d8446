import sys

import numpy as np
import pytest
from PIL import Image

from pdvit.config.schema import DataConfig
from pdvit.data.sources import open_source

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
