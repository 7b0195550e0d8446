"""Reading masks before the start, so that a run does not meet a bad one in the middle: all, or the first of a split."""

from collections.abc import Callable

from pdvit.data.bad_images import BadImage, BadImages, BadMask, refuse_masks
from pdvit.data.check import look_at_all
from pdvit.data.masks.split import MaskSplit, try_mask, try_pair, wrong_size
from pdvit.data.masks.table import OUTSIDE
from pdvit.data.sources import Source
from pdvit.data.sources.cache import Say
from pdvit.data.sources.split import image_size, some

# What is wrong with a mask, or which classes are in it, by index.
Seen = dict[int, BadMask | frozenset[int]]
TIP = "mend or remove them, or give their values a line in the table of classes (--classes)"


def check_masks(
    source: Source,
    workers: int,
    say: Say,
    share: tuple[int, int] = (0, 1),
    gather: Callable[[Seen], list[Seen]] = lambda seen: [seen],
) -> Source:
    """Read every mask; return the source with a note of what was found: classes that no mask has are said.

    Args:
        source: a source of masks.
        workers: processes that read; 0 reads in this one.
        say: hears how far it is.
        share: number of this process and of all that divide the work.
        gather: returns what each of them saw, to each.

    Raises:
        UserError: naming masks that can't be read, that have values outside of the table or another size than their
            image, and those that ignore every pixel.
    """
    bad, notes = dict[str, str](), ["all masks are sound"]
    for name, split in source.splits.items():
        assert isinstance(split, MaskSplit)
        seen: Seen = {}
        for part in gather(look_at_all(split, name, _look, workers, say, share)):
            seen |= part
        verdicts = [seen[index] for index in sorted(seen)]
        bad |= {item.name: item.reason for item in verdicts if isinstance(item, BadMask)}
        found = frozenset[int]().union(*(item for item in verdicts if not isinstance(item, BadMask)))
        empty = [label for place, label in enumerate(source.classes) if place not in found]
        if empty:
            notes.append(f"{len(empty)} of {len(source.classes)} classes are in no mask of {name}: {some(empty)}")
    refuse_masks(bad, TIP)
    return source.noting(*notes)


def check_first_pairs(source: Source, skip: bool) -> None:
    """Read the first image and mask of every split: what is wrong with all masks shows in any of them.

    Raises UserError as the run would when it met the pair: for a mask that can't be used, and for an image that does
    not decode unless such are left out (`skip`).
    """
    for split in source.splits.values():
        assert isinstance(split, MaskSplit)
        pair = try_pair(split, 0)
        if isinstance(pair, BadImage):
            BadImages(skip).meet([pair])


def _look(split: MaskSplit, index: int) -> BadMask | frozenset[int]:
    """Return what is wrong with a mask, or the classes in it; an image that can't be read is not its fault."""
    mask = try_mask(split, index)
    if isinstance(mask, BadImage):
        return mask
    size = image_size(split, index)
    if size and (wrong := wrong_size(split, index, size, mask)):
        return wrong
    found = frozenset(mask.flatten().bincount()[:OUTSIDE].nonzero().flatten().tolist())
    return found or BadMask(split.mask_name(index), "all of its pixels are ignored")
