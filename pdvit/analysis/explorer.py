"""The maps of the patch explorer: cosines between all patches of a few images, layer by layer."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pdvit.analysis.measure import check_count, check_finite, inference
from pdvit.analysis.metrics.patches import Patches
from pdvit.analysis.tables import write_arrays
from pdvit.errors import UserError
from pdvit.models.layers import find_layers, shapes_of, watch

MAX_IMAGES, MAX_PATCHES, MAX_MODELS = 8, 2048, 4  # a map of 2,048 patches takes 2.8 MB of a page
PAGE_BYTES, CODE_BYTES = 10**7, 200_000  # bytes of a page, and the part of its own code and names
LEVELS = 127  # a cosine is stored as an integer from -127 to 127


@dataclass(frozen=True)
class Maps:
    """Cosines of all pairs of patches of a few images, for one model."""

    model: str
    names: list[str]
    images: list[np.ndarray]  # uint8 (H, W, 3), as the model sees them
    grids: dict[str, tuple[int, int]]  # rows and columns of patches by layer, in order
    cosines: list[dict[str, np.ndarray]]  # by image, then by layer: cosines times 127, rounded, int8 (N, N)
    similarity: list[list[float]]  # by image, P of each layer, from the tokens themselves
    notes: list[str]  # missing layers, and why
    depths: list[int]  # of the layers, from 0 (the input of the first block)
    random: list[list[float]] = field(default_factory=list)  # the same with random weights; empty if not measured


def bytes_per_model(models: int) -> int:
    """Return the bytes of a page that each model may use; raises UserError for more than four models."""
    if models > MAX_MODELS:
        raise UserError(f"{models} checkpoints do not fit side by side", "--explore", f"name at most {MAX_MODELS}")
    return (PAGE_BYTES - CODE_BYTES) // models


def read_maps(
    model: nn.Module,
    images: Iterable[tuple[str, Tensor]],
    normalise: Callable[[Tensor], Tensor],
    name: str = "model",
    max_bytes: int = PAGE_BYTES,
    **layout: Any,
) -> Maps:
    """Compute the cosines between all patches of each image at each layer of a model, image by image.

    `images` are names and pixels, uint8 `(3, H, W)`; `normalise` turns them into the model's input. At most 8 are read,
    and no more than fit into `max_bytes` of a page. Layers of more than 2,048 patches are left out; if the rest does
    not fit for one image, layers are left out evenly. UserError if not even two fit. `layout` is that of `find_layers`.
    """
    shown, found = list(islice(images, MAX_IMAGES)), dict[str, Patches]()
    if not shown:
        raise UserError("there is no image to explore", "--images", "name at least one image that decodes")
    (model, places), device = find_layers(model, **layout), next(model.parameters()).device
    first = normalise(shown[0][1][None].to(device))
    counts = {layer: count for layer, (count, _) in shapes_of(model, places, image=first).items()}
    layers, max_images = _fitting(counts, picture_size(*first.shape[-2:]), max_bytes)
    missing = [layer for layer in counts if layer not in layers]
    notes = [f"left out, to keep the page below 10 MB: the maps of {', '.join(missing)}"] if missing else []
    maps = Maps(name, [], [], {}, [], [], notes, [[*places].index(layer) for layer in layers])

    def visit(layer: str, tokens: Tensor) -> None:
        check_count(tokens, layer)
        found[layer] = Patches(tokens, batch.shape[-2:])
        check_finite(found[layer].lengths, layer)

    with watch({layer: places[layer] for layer in layers}, visit):
        for label, pixels in shown[:max_images]:
            batch = normalise(pixels[None].to(device))
            with inference(model, batch):
                model(batch)
            maps.names.append(label)
            maps.images.append(pixels.permute(1, 2, 0).cpu().numpy())
            levels = {layer: LEVELS * (it.unit[0] @ it.unit[0].T).clamp(-1, 1) for layer, it in found.items()}
            maps.cosines.append({layer: part.round().to(torch.int8).cpu().numpy() for layer, part in levels.items()})
            maps.similarity.append([float(patches.similarity[0]) for patches in found.values()])
            maps.grids.update({layer: patches.grid for layer, patches in found.items()})
    return maps


def write_maps(file: Path, maps: Maps) -> None:
    """Write maps as .npz: `names`, `layers`, `image/0` uint8 (H, W, 3), `cos/0/block 1` int8 (N, N), `grid/block 1`."""
    arrays = {"names": np.array(maps.names), "layers": np.array(list(maps.grids))}
    arrays |= {f"grid/{layer}": np.array(grid) for layer, grid in maps.grids.items()}
    for number, (image, cosines) in enumerate(zip(maps.images, maps.cosines, strict=True)):
        arrays[f"image/{number}"] = image
        arrays |= {f"cos/{number}/{layer}": levels for layer, levels in cosines.items()}
    write_arrays(file, arrays)


def map_size(count: int) -> int:
    """Return the bytes of the cosines of all pairs of `count` patches in a page: a byte each, as base64."""
    return 4 * -(-(count * (count - 1) // 2) // 3)


def picture_size(height: int, width: int) -> int:
    """Return the largest size of an image in a page, in bytes: as an incompressible PNG, as base64."""
    return 4 * -(-(3 * height * width * 102 // 100 + 2000) // 3)


def _fitting(counts: dict[str, int], picture: int, max_bytes: int) -> tuple[list[str], int]:
    """Return the layers whose maps fit, and the number of images; UserError if none fits."""
    small = [layer for layer, count in counts.items() if count <= MAX_PATCHES]
    for number in range(len(small), 0, -1):
        kept = [small[index] for index in dict.fromkeys(np.linspace(0, len(small) - 1, number).round().astype(int))]
        size = picture + sum(map_size(counts[layer]) for layer in kept)
        if size <= max_bytes and number >= min(2, len(small)):
            return kept, min(MAX_IMAGES, max_bytes // size)
    tip = f"use smaller images or larger patches (at most {MAX_PATCHES:,}), and explore one checkpoint at a time"
    raise UserError(f"maps of {max(counts.values()):,} patches are too large for a page", "--explore", tip)
