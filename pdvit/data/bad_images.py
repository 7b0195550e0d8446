"""Images that do not decode: they end the run and are named, or are skipped and counted."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from pdvit.data.sources.split import printable
from pdvit.errors import UserError

# Images named in an error before the rest is only counted.
NAMED = 10
RUN_TIP = "replace it, or skip it: --on-bad-image skip (to go on with a run: --change data.on_bad_image=skip)"
MASK_TIP = "mend it, or give its values a line in the table of classes (--classes); --check-masks names all of them"


@dataclass(frozen=True)
class BadImage:
    """An image that does not decode: returned, not raised, so that the main process can name all of a batch."""

    name: str
    reason: str


class BadMask(BadImage):
    """A mask that does not fit its image or the classes; it ends the run, for it says that others may be wrong too."""


@dataclass
class BadImages:
    """What is done with images that do not decode, and which those were that this process met.

    `skip` leaves them out: in training another image takes the place, in evaluation none does.
    """

    skip: bool = False
    found: dict[str, str] = field(default_factory=dict)
    """Reason by name."""

    def meet(self, bad: Iterable[BadImage]) -> None:
        """Note images that do not decode; UserError where they are not to be skipped, and for every bad mask."""
        bad = list(bad)
        refuse_masks({item.name: item.reason for item in bad if isinstance(item, BadMask)})
        new = {item.name: item.reason for item in bad}
        if not self.skip:
            refuse_bad(new)
        self.found |= new


def refuse_bad(bad: Mapping[str, str], tip: str = RUN_TIP) -> None:
    """Raise a UserError that names the images that do not decode (name -> reason), if there are any."""
    if bad:
        count = "1 image does" if len(bad) == 1 else f"{len(bad)} images do"
        raise UserError(f"{count} not decode", describe_bad(bad), tip)


def refuse_masks(bad: Mapping[str, str], tip: str = MASK_TIP) -> None:
    """Raise a UserError that names the masks that can't be used (name -> reason), if there are any."""
    if bad:
        count = "1 mask" if len(bad) == 1 else f"{len(bad)} masks"
        raise UserError(f"{count} can't be used", describe_bad(bad), tip)


def describe_bad(bad: Mapping[str, str]) -> str:
    """Name images or masks that can't be used (name -> reason), up to ten, and count the rest."""
    shown = "; ".join(f"{name} ({reason})" for name, reason in list(bad.items())[:NAMED])
    return printable(shown + (f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""))


Sample = tuple[Tensor | BadImage, int | Tensor, int]
"""A uint8 image `(3, H, W)` or why there is none, its class (or the class of every pixel) and its index."""


class Substituted(Dataset[Sample]):
    """Training images, where the next sound one takes the place of one that does not decode.

    Which one is a function of the index, and its augmentation one of seed, epoch and its own index; so batches keep
    their size, and a step is the same whenever it is run.
    """

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Sample]:
        """Return a sound image for each key (epoch, index), then those that gave up their place, to be counted."""
        samples: list[Sample] = self.images.__getitems__(keys)
        bad: list[Sample] = []
        for place, (epoch, index) in enumerate(keys):
            tried = 0
            while isinstance(samples[place][0], BadImage) and tried < len(self):
                tried += 1
                bad.append(samples[place])
                (samples[place],) = self.images.__getitems__([(epoch, (index + tried) % len(self))])
        return samples + bad
