"""Reading every image or mask of a split before the start, in worker processes."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from pdvit.data.bad_images import BadImage
from pdvit.data.loader import leave_signals
from pdvit.data.sources import LazySplit
from pdvit.data.sources.cache import Say

# Images that a worker reads at a time, and seconds between two lines that say how far it is.
CHUNK, SECONDS = 64, 10.0


class _Looked(Dataset[tuple[int, Any]]):
    """What `look` finds in each image of a split, by index."""

    def __init__(self, split: LazySplit, look: Callable[..., Any]) -> None:
        self.split, self.look = split, look

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.look(self.split, index)


def look_at_all(
    split: LazySplit, name: str, look: Callable[..., Any], workers: int, say: Say, share: tuple[int, int]
) -> dict[int, Any]:
    """Return what `look(split, index)` finds in this process's part of a split, by index, where it is not None."""
    rank, processes = share
    mine = list(range(rank, len(split), processes))
    loader: Any = DataLoader(
        _Looked(split, look),
        batch_size=CHUNK,
        sampler=mine,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=leave_signals,
        generator=torch.Generator(),  # else it draws from the process generator
    )
    found: dict[int, Any] = {}
    done, said = 0, time.monotonic()
    for seen in loader:
        found |= {index: verdict for index, verdict in seen if verdict is not None}
        done += len(seen)
        if time.monotonic() - said > SECONDS:
            said = time.monotonic()
            bad = sum(isinstance(verdict, BadImage) for verdict in found.values())
            say(f"checked {done:,} of {len(mine):,} images of {name}, {bad} bad")
    return found
