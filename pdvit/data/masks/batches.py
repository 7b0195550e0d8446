"""Batches of images and masks, by step, as the loader makes them of images and classes."""

from collections.abc import Generator, Iterator
from dataclasses import replace

from torch.utils.data import Dataset

from pdvit.config.schema import SegmentConfig
from pdvit.data.bad_images import BadImage, Sample
from pdvit.data.batch import Batch
from pdvit.data.loader import LoaderConfig, decode, from_workers, mark_replaced, step_indices
from pdvit.data.masks.split import MaskSplit, try_pair
from pdvit.data.masks.transforms import EvaluationTransform, TrainingTransform, finish
from pdvit.data.preprocessing import Keys


class Pairs(Dataset[Sample]):
    """Images with their masks as a torch data set that is read in batches, of keys (epoch, index)."""

    def __init__(self, split: MaskSplit, transform: TrainingTransform | EvaluationTransform) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, keys: Keys) -> list[Sample]:
        """Return for each key the uint8 image (or what is wrong with it or its mask), its mask and its index."""
        return [self._read(epoch, index) for epoch, index in keys]

    def _read(self, epoch: int, index: int) -> Sample:
        pair = try_pair(self.split, index)
        if isinstance(pair, BadImage):
            return pair, 0, index
        if isinstance(self.transform, EvaluationTransform):
            return self.transform(pair[0]), pair[1], index
        return *self.transform(pair, epoch, index), index


def train_batches(
    split: MaskSplit, how: LoaderConfig, segment: SegmentConfig, crop: int, start: int, hflip: float | None = None
) -> Generator[Batch, None, None]:
    """Yield this process's share of steps start, start + 1, ...: crops `(B, 3, crop, crop)` and `(B, crop, crop)`.

    Targets are training ids, int64, 255 where none counts. `hflip` None flips as the split says.
    """
    flip = split.flip if hflip is None else hflip
    transform = TrainingTransform(segment, how.preprocessing, crop, flip, how.seed)
    raw = from_workers(Pairs(split, transform), how, step_indices(len(split), how, start))
    order = step_indices(len(split), how, start)
    for images, masks, index in raw:
        batch = Batch(*finish(images.to(how.device), masks.to(how.device), how.preprocessing), index)
        yield mark_replaced(batch, order, how) if how.bad.skip else batch


def eval_batches(split: MaskSplit, how: LoaderConfig, segment: SegmentConfig) -> Iterator[Batch]:
    """Yield every image of this process's part of a split exactly once, alone: `(1, 3, h, w)` at the evaluation scale.

    Targets `(1, H, W)` have the mask's own size. Processes may have different numbers of images, or none: whoever
    runs a model that is spread over them makes them wait for one another.
    """
    keys: list[Keys] = [[(-1, index)] for index in range(*how.share(len(split)))]
    transform = EvaluationTransform(segment.short_side, how.preprocessing.interpolation)
    for images, masks, index in decode(Pairs(split, transform), replace(how, processes=1), keys):
        yield Batch(how.preprocessing.normalise(images.to(how.device)), masks.to(how.device).long(), index)
