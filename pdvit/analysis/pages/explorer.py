"""The patch explorer: the maps of one or more models as one HTML file."""

import base64
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from pdvit import __version__
from pdvit.analysis.maps import Maps
from pdvit.analysis.pages.page import data_uri, json_block, page
from pdvit.errors import UserError

# Bytes of a page, and what its own code and names may take of them.
LIMIT, OWN = 10**7, 200_000
# Maps that are still told apart side by side.
MODELS = 4


def room(models: int) -> int:
    """Return the bytes that each of so many models may take; UserError for more than four."""
    if models > MODELS:
        raise UserError(f"{models} checkpoints do not fit side by side", "--explore", f"name at most {MODELS}")
    return (LIMIT - OWN) // models


def explorer_page(models: list[Maps], notes: list[str]) -> str:
    """Return the explorer as HTML, below 10 MB.

    Args:
        models: maps of the same images, as `read_maps` returns them in the `room` that there is for each.
        notes: what a reader should know of the images.
    """
    count = min(len(maps.names) for maps in models)
    pictures: dict[str, int] = {}  # models that see the same pixels share them
    block = {
        "names": models[0].names[:count],
        "models": [_model(maps.first(count), pictures) for maps in models],
        "pictures": list(pictures),
        "notes": [*notes, *(f"{maps.model}: {note}" for maps in models for note in maps.notes), f"pdvit {__version__}"],
    }
    title = f"Patch explorer: {', '.join(maps.model for maps in models)}"
    return page("explorer.html", title, ["page.css", "explorer.css"], "explorer.js", data=json_block(block))


def _model(maps: Maps, pictures: dict[str, int]) -> dict[str, Any]:
    return {
        "name": maps.model,
        "layers": list(maps.grids),
        "depths": maps.depths,
        "deepest": maps.deepest,
        "grids": list(maps.grids.values()),
        "pictures": [pictures.setdefault(_png(image), len(pictures)) for image in maps.images],
        "similarity": [[round(value, 5) for value in values] for values in maps.similarity],
        "cosines": [[_triangle(levels) for levels in by_layer.values()] for by_layer in maps.cosines],
    }


def _triangle(levels: np.ndarray) -> str:
    """Return the entries above the diagonal of `(N, N)`, row by row, as base64.

    Not compressed: cosines of trained models lose 7 to 9 % by zlib, and every browser reads this at once.
    """
    return base64.b64encode(levels[np.triu_indices(len(levels), 1)].tobytes()).decode()


def _png(image: np.ndarray) -> str:
    packed = BytesIO()
    Image.fromarray(image).save(packed, "PNG", optimize=True)
    return data_uri(packed.getvalue(), "image/png")
