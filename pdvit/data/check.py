"""Reading all images before the start, so that a run does not meet a bad one in the middle."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from pdvit.data.bad_images import BadImage, describe_bad, refuse_bad
from pdvit.data.loader import leave_signals
from pdvit.data.preprocessing import try_read
from pdvit.data.sources import ArraySplit, LazySplit, Source, Split
from pdvit.data.sources.cache import Say
from pdvit.data.sources.labels import missing_classes
from pdvit.errors import UserError

# Images that a worker reads at a time, and seconds between two lines that say how far it is.
CHUNK, SECONDS = 64, 10.0
Found = dict[int, BadImage]


def check_images(
    source: Source,
    skip: bool,
    workers: int,
    say: Say,
    share: tuple[int, int] = (0, 1),
    gather: Callable[[Found], list[Found]] = lambda found: [found],
) -> Source:
    """Decode every image; return the source, without those that do not decode where `skip` leaves them out.

    Args:
        source: the source.
        skip: whether to leave them out, and not to refuse them.
        workers: processes that decode; 0 decodes in this one.
        say: hears how far it is.
        share: number of this process and of all that divide the work.
        gather: returns what each of them found, to each.

    Raises:
        UserError: naming those that do not decode, unless they are skipped and each split has others.
    """
    bad: dict[str, str] = {}
    counts, splits = [], dict[str, Split]()
    for name, split in source.splits.items():
        found: Found = {}
        if isinstance(split, LazySplit):
            for part in gather(look_at_all(split, name, _verdict, workers, say, share)):
                found |= part
        bad |= {found[index].name: found[index].reason for index in sorted(found)}
        splits[name] = _without(split, found)
        counts += [f"{len(found):,} of {name}"] * bool(found)
    if not bad:
        return source.noting("all images decode")
    if not skip:
        refuse_bad(bad)
    for name, split in splits.items():
        if not len(split):
            raise UserError(f"no image of {name} decodes: {describe_bad(bad)}", "data.source (--data)", "replace them")
    left_out = f"left out {' and '.join(counts)}, which do not decode: {describe_bad(bad)}"
    missing = (
        ()
        if source.palette
        else (missing_classes(split.labels, source.classes, name) for name, split in splits.items())
    )
    return replace(source, splits=splits).noting(left_out, *(note for note in missing if note not in source.notes))


def _verdict(split: LazySplit, index: int) -> BadImage | None:
    image = try_read(split, index)
    return image if isinstance(image, BadImage) else None


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


def _without(split: Split, found: Found) -> Split:
    if isinstance(split, ArraySplit) or not found:
        return split
    sound = torch.ones(len(split), dtype=torch.bool)
    sound[list(found)] = False
    return split.take(sound.nonzero().flatten())
