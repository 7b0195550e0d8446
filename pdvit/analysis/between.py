"""Two models side by side."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pdvit.analysis.measure import Images, batches
from pdvit.analysis.meter import check, memory_for
from pdvit.analysis.metrics import LinearCKA, Patches, centred_gram
from pdvit.analysis.metrics.cka import FEWEST
from pdvit.engine.distributed import SINGLE_PROCESS, Ranks
from pdvit.errors import UserError
from pdvit.models.layers import Layer, evaluating, exact_float32, places_of, watch_layers

if TYPE_CHECKING:
    import pandas as pd


def cka_between(
    model: nn.Module,
    other: nn.Module,
    images: Images,
    other_images: Images | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> "pd.DataFrame":
    """Return the linear CKA between the layers of two models on the same images.

    Args:
        model: a bare timm model, whose layers are the rows.
        other: another on the same device, whose layers are the columns; grids, widths and depths may differ.
        images: as for `analyze`, in batches of at least 4, smaller ones are left out.
        other_images: the same images in the same batches, as the other model takes them; None where that is alike.
        ranks: of several processes each passes its own share of the images; all return the same.

    Returns:
        CKA in [-1, 1], as the metric `cka` defines it; 0 where a layer does not tell the images apart.

    Raises:
        UserError: no batch of 4 images, a single patch, or tokens that are not finite.
    """
    import pandas as pd

    cka, device = LinearCKA(), next(model.parameters()).device
    both = (
        ((batch, batch) for batch in batches(images, device))
        if other_images is None
        else zip(batches(images, device), batches(other_images, device), strict=True)
    )
    with ranks.failing_together(), evaluating(model), evaluating(other):
        for ours, theirs in both:
            if len(ours) >= FEWEST:
                cka.add(_grams(model, ours), _grams(other, theirs))
    whole = LinearCKA()
    for part in ranks.all_gather(cka):
        whole.merge(part)
    if isinstance(whole.cross, float):
        where = "cka_between(model, other, images)"
        raise UserError(f"there are no images to measure, or no {FEWEST} at once", where, f"pass at least {FEWEST}")
    names = [[layer.name for layer in places_of(each)] for each in (model, other)]
    return pd.DataFrame(whole.matrix().numpy(), index=names[0], columns=names[1])


def _grams(model: nn.Module, images: Tensor) -> list[Tensor]:
    found: list[Tensor] = []

    def look(layer: Layer, tokens: Tensor) -> None:
        patches = Patches(tokens)
        check(patches, layer)
        found.append(centred_gram(patches.tokens))

    with memory_for(images), torch.no_grad(), exact_float32(images.device), watch_layers(model, look):
        model(images)
    return found
