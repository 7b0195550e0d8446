"""Streams: timm reads them from first to last only, so they are copied once, without loss, into a shard."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pdvit.config.schema import DataConfig
from pdvit.data.kinds import whole_path
from pdvit.data.sources.archive import tar_members
from pdvit.data.sources.cache import Say, cached_by
from pdvit.data.sources.holdout import assemble, choose_splits
from pdvit.data.sources.labels import as_classes
from pdvit.data.sources.shards import shard_split
from pdvit.data.sources.split import Source, as_file_name
from pdvit.data.sources.timm_sets import need, open_timm
from pdvit.errors import UserError

CLASSES = "classes.json"


def read_stream(data: DataConfig, say: Say) -> Source:
    """Read `tfds/NAME` or `hfids/NAME` through a copy in the cache: pixels as PNG, labels as numbers.

    A run that is resumed at a step needs images by number, in an order that never changes; a stream has neither.
    Raises UserError where a package is missing, or the set does not open.
    """
    if data.source.lower().startswith("tfds/"):
        need("tensorflow_datasets", "tf-data", data.source)
        need("tensorflow", "tf-data", data.source)
    else:
        need("datasets", "hf-data", data.source)
    first = open_timm(data, data.train_split or "train")
    builder = first.reader.builder
    chosen = choose_splits(list(builder.info.splits or ()), data)
    if "train" not in chosen:
        raise UserError("there is no train split", data.source, "name one: --train-split")
    copies = {role: _copy(data, split, str(builder.info.version), say) for role, split in chosen.items()}
    plain = DataConfig(source=data.source)
    found = {role: shard_split(copy, plain, say) for role, copy in copies.items()}
    names = json.loads(tar_members(copies["train"])[CLASSES].read())
    labels = {role: split.labels.tolist() for role, split in found.items()}
    classes, _ = as_classes(labels, names or None, data.source)
    return assemble(data.source.rpartition("/")[2], classes, found, data)


def _copy(data: DataConfig, split: str, version: str, say: Say) -> Path:
    name = "-".join([*data.source.split("/"), split])
    source = whole_path(data.source, data.root)
    identity = json.dumps([source, data.root, split, data.input_key, data.target_key, version])

    def write(target: Path) -> None:
        stream = open_timm(data, split)
        count = 0
        with tarfile.open(target, "w") as tar:
            _add(tar, CLASSES, json.dumps(list(stream.reader.class_to_idx)).encode())
            for image, label in _whole(stream, data.source):
                _add(tar, f"{count:08}.png", _png(image))
                _add(tar, f"{count:08}.cls", str(int(label)).encode())
                count += 1
        if count != stream.reader.num_samples:
            what = f"split '{split}' gave {count:,} images of the {stream.reader.num_samples:,} that it says to have"
            raise UserError(what, data.source, "try again; a set of the hub needs no copy as hfds/")

    say(f"{data.source} {split} is a stream, which has no images by number")
    return cached_by(as_file_name(name), identity, ".tar", write, say)


def _whole(stream: Any, source: str) -> Iterator[tuple[Any, Any]]:
    """Yield every sample of a stream; UserError where it breaks off."""
    # Where several processes train, timm's reader would give each of them its part.
    stream.reader.dist_rank, stream.reader.dist_num_replicas = 0, 1
    try:
        yield from stream
    except Exception as error:  # of the network, the files, the decoders
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"the stream breaks off: {reason}", source, "try again; nothing was kept") from error


def _png(image: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", compress_level=1)
    return content.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
