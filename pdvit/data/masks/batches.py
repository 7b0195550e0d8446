"""Batches of images and masks by step, like those of images and classes in `pdvit.data.loader`."""

from collections.abc import Generator, Iterator
from dataclasses import replace

from torch.utils.data import Dataset

from pdvit.config.schema import SegmentConfig
from pdvit.data.batch import Batch
from pdvit.data.images import BadImage, Keys, Sample
from pdvit.data.loader import LoaderConfig, decode, from_workers, step_indices
from pdvit.data.masks.split import MaskSplit, try_pair
from pdvit.data.masks.transforms import EvaluationTransform, TrainingTransform, normalise_and_pad


class ImageMaskPairs(Dataset[Sample]):
    """Images with their masks as a torch data set, read by batches of keys (epoch, index)."""

    def __init__(self, split: MaskSplit, transform: TrainingTransform | EvaluationTransform) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, keys: Keys) -> list[Sample]:
        """Return for each key the uint8 image (or its fault, or its mask's), its mask and its index."""
        return [self._read(epoch, index) for epoch, index in keys]

    def _read(self, epoch: int, index: int) -> Sample:
        pair = try_pair(self.split, index)
        if isinstance(pair, BadImage):
            return pair, 0, index
        if isinstance(self.transform, EvaluationTransform):
            return self.transform(pair[0]), pair[1], index
        return *self.transform(pair, epoch, index), index


def train_batches(
    split: MaskSplit, loader: LoaderConfig, segment: SegmentConfig, crop: int, start: int, hflip: float | None = None
) -> Generator[Batch, None, None]:
    """Yield this rank's part of steps start, start + 1, ...: crops `(B, 3, crop, crop)` and targets `(B, crop, crop)`.

    Targets are training ids, int64, 255 for pixels without a class. `hflip` None is the split's default.
    """
    transform = TrainingTransform(
        segment, loader.preprocessing, crop, split.flip if hflip is None else hflip, loader.seed
    )
    samples = from_workers(ImageMaskPairs(split, transform), loader, step_indices(len(split), loader, start))
    for batch in samples:
        images, targets = normalise_and_pad(batch.images, batch.targets, loader.preprocessing)
        yield replace(batch, images=images, targets=targets)


def eval_batches(split: MaskSplit, loader: LoaderConfig, segment: SegmentConfig) -> Iterator[Batch]:
    """Yield each image of this rank's part of a split once, by itself: `(1, 3, h, w)` at the evaluation size.

    Targets `(1, H, W)` have the mask's own size. Ranks may have different numbers of images, or none.
    """
    keys: list[Keys] = [[(-1, index)] for index in range(*loader.share(len(split)))]
    transform = EvaluationTransform(segment.short_side, loader.preprocessing.interpolation)
    for images, masks, index in decode(ImageMaskPairs(split, transform), replace(loader, processes=1), keys):
        yield Batch(loader.preprocessing.normalise(images.to(loader.device)), masks.to(loader.device).long(), index)
