"""Two models side by side."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pdvit.analysis.measure import Images, batches, check
from pdvit.analysis.metrics import LinearCKA, Patches, centred_gram
from pdvit.analysis.metrics.cka import FEWEST
from pdvit.errors import UserError
from pdvit.models.layers import Layer, evaluating, exact_float32, layers_of, watch_layers

if TYPE_CHECKING:
    import pandas as pd


def cka_between(model: nn.Module, other: nn.Module, images: Images) -> "pd.DataFrame":
    """Return the linear CKA between the layers of two models on the same images.

    Args:
        model: a bare timm model, whose layers are the rows.
        other: another on the same device, whose layers are the columns; grids, widths and depths may differ.
        images: as for `analyze`, such as both models take; in batches of at least 4, smaller last ones are left out.

    Returns:
        CKA in [-1, 1], as the metric `cka` defines it; 0 where a layer does not tell the images apart.

    Raises:
        UserError: no batch of 4 images, a single patch, or tokens that are not finite.
    """
    import pandas as pd

    cka = LinearCKA()
    with evaluating(model), evaluating(other):
        for number, batch in enumerate(batches(images, next(model.parameters()).device)):
            if number == 0 or len(batch) >= FEWEST:
                cka.add(_grams(model, batch), _grams(other, batch))
    if isinstance(cka.cross, float):
        raise UserError("there are no images to measure", "cka_between(model, other, images)", "pass at least 4 images")
    names = [[layer.name for layer in layers_of(each)] for each in (model, other)]
    return pd.DataFrame(cka.matrix().cpu().numpy(), index=names[0], columns=names[1])


def _grams(model: nn.Module, images: Tensor) -> list[Tensor]:
    found: list[Tensor] = []

    def look(layer: Layer, tokens: Tensor) -> None:
        patches = Patches(tokens)
        check(patches, layer)
        found.append(centred_gram(patches.tokens))

    with torch.no_grad(), exact_float32(images.device), watch_layers(model, look):
        model(images)
    return found
