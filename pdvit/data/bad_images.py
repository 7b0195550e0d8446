"""Images that do not decode: errors that end the run, or skipped, counted and named."""

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from pdvit.data.sources.split import Split, printable
from pdvit.errors import UserError

NAMED = 10  # images named in a message; the others are counted
RUN_TIP = "replace it, or skip it: --on-bad-image skip (to resume a run: --change data.on_bad_image=skip)"
MASK_TIP = "fix it, or add its values to the table of classes (--classes); --check-masks names all of them"
OUT_OF_RESOURCES = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)  # errors of the machine, not of the image
Result = TypeVar("Result")


@dataclass(frozen=True)
class BadImage:
    """An image that does not decode: returned, not raised, so that the main process can name all of a batch."""

    name: str
    reason: str


class BadMask(BadImage):
    """A mask that does not fit its image or the classes; always an error, because other masks may be wrong too."""


@dataclass
class BadImages:
    """The policy (`skip` or error) for images that do not decode, and the reasons of those `found`, by name."""

    skip: bool = False
    found: dict[str, str] = field(default_factory=dict)

    def add(self, bad: Sequence[BadImage]) -> None:
        """Record images that do not decode; raises UserError unless they are skipped, and for every bad mask."""
        new = {item.name: item.reason for item in bad}
        refuse_bad({item.name: item.reason for item in bad if isinstance(item, BadMask)}, MASK_TIP, "mask")
        if not self.skip:
            refuse_bad(new)
        self.found |= new


def refuse_bad(bad: Mapping[str, str], tip: str = RUN_TIP, what: str = "image") -> None:
    """Raise a UserError that names images, or masks, that can't be used (reason by name), if there are any."""
    if bad:
        fault = ("do not decode" if len(bad) > 1 else "does not decode") if what == "image" else "can't be used"
        raise UserError(f"{len(bad)} {what}{'s' * (len(bad) > 1)} {fault}", describe_bad(bad), tip)


def describe_bad(bad: Mapping[str, str]) -> str:
    """Return up to ten names with their reasons, and the number of the others."""
    listed = "; ".join(f"{name} ({reason})" for name, reason in list(bad.items())[:NAMED])
    return printable(listed + (f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""))


def attempt(split: Split, index: int, read: Callable[..., Result], *arguments: Any) -> Result | BadImage:
    """Return `read(*arguments)`, which reads image `index` of the split, or its fault."""
    try:
        return read(*arguments)
    except UnidentifiedImageError:
        return BadImage(split.name(index), "not an image")
    except Exception as error:  # decoders raise almost any error on a damaged file
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in OUT_OF_RESOURCES:
            raise
        return BadImage(split.name(index), str(error) or type(error).__name__)


Sample = tuple[Tensor | BadImage, int | Tensor, int]
"""A uint8 image `(3, H, W)` or its fault, its class (or the class of every pixel) and its index."""


class SkipBadImages(Dataset[Sample]):
    """Training images in which the next sound image replaces one that does not decode.

    The replacement is a function of the index, and its augmentation of seed, epoch and its own index; so batches keep
    their size, and a repeated step gets the same images.
    """

    def __init__(self, images: Any) -> None:
        self.images = images

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Sample]:
        """Return a sound image for each key (epoch, index), followed by the bad ones, to be counted."""
        samples: list[Sample] = self.images.__getitems__(keys)
        bad: list[Sample] = []
        for place, (epoch, index) in enumerate(keys):
            for tried in range(1, len(self.images) + 1):
                if not isinstance(samples[place][0], BadImage):
                    break
                bad.append(samples[place])
                (samples[place],) = self.images.__getitems__([(epoch, (index + tried) % len(self.images))])
        return samples + bad
