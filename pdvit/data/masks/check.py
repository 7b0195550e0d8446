"""Reading masks before the start, so that a run does not meet a bad one in the middle."""

from collections.abc import Callable, Sequence

import torch

from pdvit.data.bad_images import BadMask, refuse_masks
from pdvit.data.check import look_at_all
from pdvit.data.masks.split import MaskFiles, MaskSplit, try_mask, wrong_size
from pdvit.data.masks.table import OUTSIDE
from pdvit.data.sources import Source
from pdvit.data.sources.cache import Say
from pdvit.data.sources.split import image_size, some
from pdvit.errors import UserError

# What is wrong with a mask, or which classes are in it, by index.
Seen = dict[int, BadMask | frozenset[int]]
TIP = "mend or remove them; ids or colours outside of the table need a line in it (--classes)"


def check_masks(
    source: Source,
    every: bool,
    workers: int,
    say: Say,
    share: tuple[int, int] = (0, 1),
    gather: Callable[[Seen], list[Seen]] = lambda seen: [seen],
) -> Source:
    """Read masks before the start; return the source with a note of what was found.

    Those that are held out are read always: a fault of theirs would end a run whose training is done. Of those to learn
    from the first is, in which what is wrong with all of them shows.

    Args:
        source: a source of masks; of those that are made there is nothing to read.
        every: read all of them. Those that ignore every pixel are faults then, and classes that no mask of a split has
            are said.
        workers: processes that read; 0 reads in this one.
        say: hears how far it is.
        share: number of this process and of all that divide the work.
        gather: returns what each of them saw, to each.

    Raises:
        UserError: naming masks that can't be read, that have values outside of the table or another size than their
            image; and a held-out split of which no pixel has a class.
    """
    bad, notes = dict[str, str](), list[str]()
    for name, split in source.splits.items():
        if not isinstance(split, MaskFiles):
            continue
        looked = split if every or name != "train" else split.take(torch.tensor([0]))
        seen: Seen = {}
        for part in gather(look_at_all(looked, name, _look, workers if len(looked) > 1 else 0, say, share)):
            seen |= part
        verdicts = {index: seen[index] for index in sorted(seen)}
        bad |= {item.name: item.reason for item in verdicts.values() if isinstance(item, BadMask)}
        found = frozenset[int]().union(*(item for item in verdicts.values() if not isinstance(item, BadMask)))
        if every:
            ignoring = [split.mask_name(index) for index, item in verdicts.items() if item == frozenset()]
            bad |= dict.fromkeys(ignoring, "all of its pixels are ignored")
            notes += _empty(source.classes, found, name)
        elif name != "train" and verdicts and not found and not bad:
            what = f"no pixel of the {len(split)} masks of {name} has a class"
            raise UserError(what, "data.source (--data)", f"give {name} masks with labels, or move it away")
    refuse_masks(bad, TIP)
    return source.noting("all masks are sound", *notes) if every else source


def _empty(classes: Sequence[str], found: frozenset[int], name: str) -> list[str]:
    """Return a note of the classes of which a split has no pixel, if there are any."""
    empty = [label for place, label in enumerate(classes) if place not in found]
    return [f"{len(empty)} of {len(classes)} classes are in no mask of {name}: {some(empty)}"] if empty else []


def _look(split: MaskSplit, index: int) -> BadMask | frozenset[int]:
    """Return what is wrong with a mask, or the classes in it; an image that can't be read is not its fault."""
    mask = try_mask(split, index)
    if isinstance(mask, BadMask):
        return mask
    size = image_size(split, index)
    if size and (wrong := wrong_size(split, index, size, mask)):
        return wrong
    return frozenset(mask.flatten().bincount()[:OUTSIDE].nonzero().flatten().tolist())
