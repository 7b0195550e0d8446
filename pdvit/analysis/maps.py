"""The cosines between all patches of a few images, layer by layer: what the patch explorer and the map figure show."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pdvit.analysis.meter import check, memory_for
from pdvit.analysis.metrics import Patches
from pdvit.analysis.report import write_arrays
from pdvit.errors import UserError
from pdvit.models.layers import Layer, Place, evaluating, exact_float32, image_size_of, places_of, shapes_of, watch

# Images whose maps are kept, and the patches of a layer, at most. A map of 2,048 patches is 2.8 MB of a page.
MOST_IMAGES, MOST_PATCHES = 8, 2048
# A cosine is kept as an integer from -127 to 127.
LEVELS = 127


@dataclass(frozen=True)
class Maps:
    """Cosines of all pairs of patches of a few images, for one model.

    Attributes:
        model: its name.
        names: of the images.
        images: uint8 `(H, W, 3)`, as the model saw them.
        grids: rows and columns of patches by layer, in order.
        cosines: by image, then by layer: signed cosines times 127, rounded, int8 `(N, N)`.
        similarity: by image, P of each layer, of the tokens themselves.
        notes: which layers are missing, and why.
        depths: of the layers that are here, from 0 (what enters the first block).
        deepest: depth of the model's last layer.
    """

    model: str
    names: list[str]
    images: list[np.ndarray]
    grids: dict[str, tuple[int, int]]
    cosines: list[dict[str, np.ndarray]]
    similarity: list[list[float]]
    notes: list[str]
    depths: list[int]
    deepest: int

    def first(self, count: int) -> "Maps":
        """Return those of the first images only."""
        return replace(
            self,
            names=self.names[:count],
            images=self.images[:count],
            cosines=self.cosines[:count],
            similarity=self.similarity[:count],
        )


def read_maps(
    model: nn.Module,
    images: Iterable[tuple[str, Tensor]],
    normalise: Callable[[Tensor], Tensor],
    name: str = "model",
    room: int = 10**7,
) -> Maps:
    """Read the cosines between all patches of each image at each layer, one image at a time.

    Args:
        model: a bare timm model, on the device to use; it is put in evaluation mode meanwhile.
        images: their names, and pixels, uint8 `(3, H, W)`; no more are taken than fit, and at most 8.
        normalise: what makes the model's input `(B, 3, H, W)` of pixels.
        name: what to call the model.
        room: bytes that the maps and images may take in a page (base64). Layers of more than 2,048 patches are left
            out; where the rest does not fit for one image, layers are left out evenly.

    Raises:
        UserError: no image, or maps that are too large for a page.
    """
    places = places_of(model)
    counts = {layer: count for layer, (count, _) in shapes_of(model, places).items()}
    layers, most = _that_fit(counts, picture_size(*image_size_of(model)), room)
    kept = {layer: places[layer] for layer in layers}
    depths, deepest = [layer.depth for layer in layers], max(layer.depth for layer in counts)
    device = next(model.parameters()).device
    found = Maps(name, [], [], {}, [], [], _left_out(list(counts), layers), depths, deepest)
    with evaluating(model):
        for label, pixels in islice(images, most):
            patches = _patches(model, kept, normalise(pixels[None].to(device)))
            found.names.append(label)
            found.images.append(pixels.permute(1, 2, 0).cpu().numpy())
            found.cosines.append({layer.name: as_levels(seen.unit[0]) for layer, seen in patches.items()})
            found.similarity.append([float(seen.similarity[0]) for seen in patches.values()])
            found.grids.update({layer.name: seen.grid for layer, seen in patches.items()})
    if not found.names:
        raise UserError("there is no image to explore", "--images", "name at least one image that decodes")
    return found


def _patches(model: nn.Module, places: Mapping[Layer, Place], images: Tensor) -> dict[Layer, Patches]:
    """Return the patches of one batch at each place."""
    found: dict[Layer, Patches] = {}

    def look(layer: Layer, tokens: Tensor) -> None:
        found[layer] = Patches(tokens, (images.shape[-2], images.shape[-1]))
        check(found[layer], layer)

    with memory_for(images), torch.no_grad(), exact_float32(images.device), watch(places, look):
        model(images)
    return found


def as_levels(unit: Tensor) -> np.ndarray:
    """Return the cosines between tokens `(N, D)` of length 1 as integers from -127 to 127, int8 `(N, N)`."""
    levels: np.ndarray = ((unit @ unit.T).clamp(-1, 1) * LEVELS).round().to(torch.int8).cpu().numpy()
    return levels


def write_maps(file: Path, maps: Maps) -> None:
    """Write maps as .npz: `names`, `layers`, `image/0` uint8 (H, W, 3), `cos/0/block 1` int8 (N, N), `grid/block 1`.

    Raises OSError.
    """
    arrays = {"names": np.array(maps.names), "layers": np.array(list(maps.grids))}
    arrays |= {f"grid/{layer}": np.array(grid) for layer, grid in maps.grids.items()}
    for number, (image, cosines) in enumerate(zip(maps.images, maps.cosines, strict=True)):
        arrays[f"image/{number}"] = image
        arrays |= {f"cos/{number}/{layer}": levels for layer, levels in cosines.items()}
    write_arrays(file, arrays)


def map_size(count: int) -> int:
    """Return the bytes that the cosines of all pairs of `count` patches take in a page: a byte each, as base64."""
    return 4 * -(-(count * (count - 1) // 2) // 3)


def picture_size(height: int, width: int) -> int:
    """Return the most bytes that an image takes in a page: as PNG that could not be compressed, as base64."""
    return 4 * -(-(3 * height * width * 102 // 100 + 2000) // 3)


def _that_fit(counts: dict[Layer, int], picture: int, room: int) -> tuple[list[Layer], int]:
    """Return which layers are kept, and of how many images; UserError where it is none."""
    small = [layer for layer, count in counts.items() if count <= MOST_PATCHES]
    for number in range(len(small), 0, -1):
        kept = [small[index] for index in dict.fromkeys(np.linspace(0, len(small) - 1, number).round().astype(int))]
        size = picture + sum(map_size(counts[layer]) for layer in kept)
        if size <= room and number >= min(2, len(small)):
            return kept, min(MOST_IMAGES, room // size)
    raise UserError(
        f"maps of {max(counts.values()):,} patches are too large for a page",
        "--explore",
        f"use smaller images or larger patches (at most {MOST_PATCHES:,}), and explore one checkpoint at a time",
    )


def _left_out(layers: list[Layer], kept: list[Layer]) -> list[str]:
    missing = [layer.name for layer in layers if layer not in kept]
    if not missing:
        return []
    return [f"left out, to keep the page below 10 MB: the maps of {', '.join(missing)}"]
