"""Batches of images and masks, by step, as the loader makes them of images and classes."""

from collections.abc import Generator, Iterator
from itertools import count

import torch
from torch.utils.data import Dataset

from pdvit.config.schema import SegmentConfig
from pdvit.data.bad_images import BadImage, Sample
from pdvit.data.batch import Batch
from pdvit.data.images import Keys
from pdvit.data.loader import Loading, decode, from_workers, mark_replaced, step_indices
from pdvit.data.masks.split import MaskSplit, try_pair
from pdvit.data.masks.table import IGNORED
from pdvit.data.masks.transforms import EvaluationTransform, TrainingTransform, finish


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
    split: MaskSplit, how: Loading, segment: SegmentConfig, crop: int, start: int, hflip: float | None = None
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


def eval_batches(split: MaskSplit, how: Loading, segment: SegmentConfig) -> Iterator[Batch]:
    """Yield every image of this process's part of a split exactly once, alone: `(1, 3, h, w)` at the evaluation scale.

    Targets `(1, H, W)` have the mask's own size. All processes take the same number of turns, as FSDP needs: one that
    has no image left repeats one with all of it ignored, and index -1.
    """
    mine = list(range(*how.share(len(split))))
    turns = -(-len(split) // how.processes)
    keys: list[Keys] = [[(-1, index)] for index in mine + [0] * (turns - len(mine))]
    transform = EvaluationTransform(segment.short_side, how.preprocessing.interpolation)
    for turn, (images, masks, index) in zip(count(), decode(Pairs(split, transform), how, keys), strict=False):
        images, targets = how.preprocessing.normalise(images.to(how.device)), masks.to(how.device).long()
        if how.processes > 1 and turn >= len(mine):
            targets, index = torch.full_like(targets, IGNORED), torch.full_like(index, -1)
        yield Batch(images, targets, index)
