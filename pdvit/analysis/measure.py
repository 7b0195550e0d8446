"""Per-layer metrics of a model, streamed over images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pdvit.analysis.moments import Moments
from pdvit.errors import UserError, closest
from pdvit.models.layers import Layer, evaluating, layers_of, measure_layers
from pdvit.similarity import patch_similarity

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Metric:
    """A function from patch tokens `(B, N, D)` to one value per image `(B,)`, and what it is in words."""

    of: Callable[[Tensor], Tensor]
    definition: str


METRICS = {
    "similarity": Metric(patch_similarity, "P, the mean of |cos| over all pairs of different patches of an image"),
    "similarity_signed": Metric(
        partial(patch_similarity, signed=True), "the mean of cos over all pairs of different patches of an image"
    ),
}
COLUMNS = ("model", "layer", "depth", "metric", "mean", "std", "ci95", "images", "tokens")
BATCH = 32


def analyze(
    model: nn.Module,
    images: Tensor | Iterable[Tensor | Sequence[Tensor]],
    metrics: str | Iterable[str] = tuple(METRICS),
    name: str = "model",
) -> "pd.DataFrame":
    """Measure the patches of every layer of a timm vision transformer.

    Args:
        model: a bare timm model; it is put in evaluation mode while it is measured.
        images: normalised images `(B, 3, H, W)` that the model takes, or an iterable of such batches (or of tuples
            that begin with one).
        metrics: names out of `similarity` (P) and `similarity_signed`.
        name: what the `model` column says.

    Returns:
        A tidy table, one row per layer and metric, with the columns model, layer, depth (0 for what enters the first
        block, L + 1 for the final norm), metric, mean, std and ci95 over images (missing for a single image), images,
        and tokens (patches per image). Prefix tokens are left out; the metrics are computed in float32.

    Raises:
        UserError: an unknown metric, no images, a single patch, or tokens that are not finite.
    """
    import pandas as pd

    chosen = _choose(metrics)
    found: dict[tuple[Layer, str], Moments] = {}
    counts: dict[Layer, int] = {}
    with evaluating(model):
        for batch in _batches(images, next(model.parameters()).device):
            for layer, (counts[layer], values) in measure_layers(model, batch, partial(_measure, chosen)).items():
                for metric, value in values.items():
                    _check(value, counts[layer], layer)
                    found.setdefault((layer, metric), Moments()).add(value)
    if not found:
        raise UserError("there are no images to measure", "analyze(model, images)", "pass at least one image")
    rows = [
        (name, layer.name, layer.depth, metric, m.mean, m.std, m.ci95, m.count, counts[layer])
        for metric in chosen
        for layer in layers_of(model)
        for m in [found[layer, metric]]
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype({"std": float, "ci95": float})  # a missing spread as NaN, not as None


def _measure(chosen: dict[str, Metric], tokens: Tensor) -> tuple[int, dict[str, Tensor]]:
    return tokens.shape[1], {name: metric.of(tokens.float()) for name, metric in chosen.items()}


def _choose(metrics: str | Iterable[str]) -> dict[str, Metric]:
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    for name in names or [""]:
        if name not in METRICS:
            raise UserError(f"there is no metric '{name}'", "analyze(metrics=...)", closest(name, METRICS))
    return {name: METRICS[name] for name in names}


def _batches(images: Tensor | Iterable[Tensor | Sequence[Tensor]], device: torch.device) -> Iterator[Tensor]:
    batches: Iterable[Tensor | Sequence[Tensor]] = images.split(BATCH) if isinstance(images, Tensor) else images
    for batch in batches:
        first = batch if isinstance(batch, Tensor) else batch[0]
        if first.ndim != 4:
            raise UserError(
                f"images have four axes (image, channel, height, width), not the shape {tuple(first.shape)}",
                "analyze(model, images)",
                "add the missing axis, for example images[None] for a single one",
            )
        if len(first):
            yield first.to(device)


def _check(values: Tensor, tokens: int, layer: Layer) -> None:
    if tokens < 2:
        raise UserError(
            "one patch has nothing to be alike to",
            "analyze(model, images)",
            "use larger images or smaller patches",
        )
    if not bool(values.isfinite().all()):
        raise UserError(
            f"the patches at {layer.name} are infinite or not numbers",
            "the model's weights, or its input",
            "the checkpoint is broken, or the images are not normalised as the model expects",
        )
