"""Which layers the terms compare, and the hooks that read them in training."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from pdvit.errors import UserError
from pdvit.models.families import family_of, modules_at
from pdvit.models.layers import Place, places_of, shapes_of

R = TypeVar("R")
FIRST, LAST = "diversity.first (--first)", "diversity.last (--last)"
COSINE = "diversity.cosine_layers (--cosine-layers)"


@dataclass(frozen=True)
class Layers:
    """The layers of a model by name: first, last, the final one, and more for the cosine term.

    Attributes:
        first, last, final, others: names; final is what the model's head reads.
        blocks: names of all blocks.
        places: where each layer is.
        shapes: number and width of the patch tokens of each, on an image of the model's own size.
    """

    first: str
    last: str
    final: str
    others: tuple[str, ...]
    blocks: list[str]
    places: Mapping[str, Place]
    shapes: Mapping[str, tuple[int, int]]


def layers_to_read(model: nn.Module, first: str | int, last: str, cosine_layers: Sequence[int]) -> Layers:
    """Find the layers that `DiverseModel` describes; UserError where they can't be compared or are not there."""
    family = family_of(model)
    places = {layer.name: place for layer, place in places_of(model).items()}
    if family.plain and (embed := modules_at(model, family.embed)):
        places["patches"] = Place(embed[0])
    shapes = shapes_of(model, places)
    blocks = [name for name in places if name.startswith("block")]
    final = "norm" if "norm" in places else blocks[-1]
    last = _last(last, final, blocks)
    others = tuple(_block(number, blocks, COSINE) for number in cosine_layers)
    return Layers(_first(first, last, blocks, shapes), last, final, others, blocks, places, shapes)


class Tap:
    """A slot that a hook fills; open during a forward pass only, so that recomputing activations does not fill it.

    Copied with its model, it is the copy's own slot.
    """

    def __init__(self, place: Place) -> None:
        self.place, self.open = place, False
        self.value: Any = None
        place.hook(self.fill)

    def fill(self, value: Any) -> None:
        """Keep what the hook sees."""
        if self.open:
            self.value = value


def taps_at(places: Mapping[str, Place], names: Iterable[str]) -> dict[str, Tap]:
    """Hook a slot to each of the layers."""
    _let_hooks_through_checkpoints()
    return {name: Tap(places[name]) for name in dict.fromkeys(names)}


def tapped(taps: Mapping[str, Tap], run: Callable[[Tensor], R], images: Tensor) -> tuple[R, dict[str, Tensor]]:
    """Return `run(images)`, and the patch tokens of each slot from that forward pass."""
    for tap in taps.values():
        tap.open = True
    try:
        result = run(images)
        tokens = {name: tap.place.tokens(tap.value) for name, tap in taps.items()}
    finally:  # an error must not leave activations behind
        for tap in taps.values():
            tap.open, tap.value = False, None
    return result, tokens


def layer_numbers(text: str) -> list[int]:
    """Read the numbers of blocks, with commas between: `6,12`. Raises UserError."""
    numbers = [part.strip() for part in text.split(",") if part.strip()]
    if not all(number.isdecimal() for number in numbers):
        raise UserError(f"'{text}' is not a list of blocks", COSINE, "give their numbers with commas: 6,12")
    return [int(number) for number in numbers]


def _let_hooks_through_checkpoints() -> None:
    """Let compiled code fill a slot from inside a checkpointed block, in the forward pass only.

    Without it torch.compile refuses a hook in there, because recomputing could not repeat what it does. It need not: a
    slot is closed by then.
    """
    import torch._dynamo  # slow to import

    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


def _last(last: str, final: str, blocks: list[str]) -> str:
    if last not in ("norm", "block"):
        raise UserError(f"there is no last called '{last}'", LAST, "choose norm or block")
    return final if last == "norm" else blocks[-1]


def _block(number: Any, blocks: list[str], where: str) -> str:
    name = f"block {number}"
    if name not in blocks:
        raise UserError(f"there is no {name}: the model has {len(blocks)}", where, f"choose from 1 to {len(blocks)}")
    return name


def _first(first: str | int, last: str, blocks: list[str], shapes: Mapping[str, tuple[int, int]]) -> str:
    """Return the layer that `first` means; UserError where its grid or width are not those of last."""
    alike = [name for name in blocks if shapes[name] == shapes[last] and name != last]
    if first == "block":
        if not alike:
            tip = "use --last block" if last != blocks[-1] else "choose a model with two blocks of one grid at its end"
            if shapes.get("embed") == shapes[last]:
                tip = "use --first embed or a deeper model"
            raise UserError(f"no block before {last} has its grid and width, so none can be first", FIRST, tip)
        return alike[0]
    if first not in ("embed", "patches") and not str(first).isdecimal():
        what = f"there is no first called '{first}'"
        raise UserError(what, FIRST, f"choose block, embed, patches, or a number from 1 to {len(blocks)}")
    name = str(first) if first in ("embed", "patches") else _block(first, blocks, FIRST)
    if name not in shapes:
        what = f"first is '{name}', but this model's patch embedding is not to be compared with last"
        raise UserError(what, FIRST, "use --first block, whatever the preset says")
    if shapes[name] != shapes[last]:
        (count, width), (last_count, last_width) = shapes[name], shapes[last]
        raise UserError(
            f"{name} has {count} patches of width {width}, but {last} has {last_count} of width {last_width}",
            FIRST,
            f"choose one from {alike[0]} on" if alike else "use --last block",
        )
    if name == last:
        raise UserError(f"first and last are both {name}", FIRST, "choose an earlier one")
    return name
