"""Per-layer metrics of a model, streamed over images: nothing is kept per image."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from pdvit.analysis.meter import Meter, Sums
from pdvit.analysis.metrics import DEFAULT, METRICS, Group
from pdvit.engine.distributed import SINGLE_PROCESS, Ranks
from pdvit.errors import UserError, closest
from pdvit.models.layers import evaluating

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("model", "layer", "depth", "metric", "mean", "std", "ci95", "images", "tokens")
BATCH = 32
Images = Tensor | Iterable[Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Analysis:
    """What was measured.

    Attributes:
        table: as `analyze` returns it.
        images: how many were measured.
        layers: names of all that the model has, in order.
        curves: by group, what is more than a number per layer: arrays by `name/layer`.
        notes: what is missing in the table, and why.
        sampling: by metric and layer, the standard error of an image's value where pairs were sampled.
    """

    table: "pd.DataFrame"
    images: int
    layers: list[str]
    curves: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sampling: dict[str, dict[str, float]] = field(default_factory=dict)


def analyze(
    model: nn.Module,
    images: Images,
    metrics: str | Iterable[str] = DEFAULT,
    name: str = "model",
    pairs: str = "all",
) -> "pd.DataFrame":
    """Measure the patches of every layer of a timm vision transformer.

    Args:
        model: a bare timm model; it is put in evaluation mode while it is measured.
        images: normalised images `(B, 3, H, W)` that the model takes, or an iterable of such batches (or of tuples
            that begin with one).
        metrics: names of groups: `similarity` (P), `similarity_signed`, `norms`, `pairs`, `drift`, `rank`,
            `spectrum`, `attention`, `cka`. docs/analyze.md defines what each gives.
        name: what the `model` column says.
        pairs: `all` pairs of patches, or `sampled`: 32 for each patch, drawn at random, so that the cost of P, its
            percentiles and P without outliers grows with the number of patches, not with its square.

    Returns:
        A tidy table, one row per layer and metric, with the columns model, layer, depth (0 for what enters the first
        block, L + 1 for the final norm), metric, mean, std and ci95 over images (missing for a single image), images,
        and tokens (patches per image). Prefix tokens are left out; the metrics are computed in float32, sums that need
        it in float64. A layer that a metric is not defined at has no row.

    Raises:
        UserError: an unknown metric or way to take pairs, no images, fewer than two patches, tokens that are not
            finite, no memory for a batch, or a model or images that a metric can't be measured with.
    """
    return measure(model, images, metrics, name, pairs).table


def measure(
    model: nn.Module,
    images: Images,
    metrics: str | Iterable[str] = DEFAULT,
    name: str = "model",
    pairs: str = "all",
    ranks: Ranks = SINGLE_PROCESS,
) -> Analysis:
    """Do what `analyze` does, and return the curves too.

    Of several processes each passes its own share of the images, which may be none; all return the same. Whatever one
    of them raises as a UserError, all raise.
    """
    import pandas as pd

    if pairs not in ("all", "sampled"):
        raise UserError(f"there is no way '{pairs}' to take pairs", "--pairs", "choose all or sampled")
    meter = Meter(model, choose(metrics), pairs == "sampled")
    with ranks.failing_together(), evaluating(model):
        for batch in batches(images, next(model.parameters()).device):
            meter.add(batch)
    parts: list[Sums] = ranks.all_gather(meter.sums)
    meter.sums = Sums()
    for part in parts:
        meter.sums.merge(part)
    if not meter.sums.images:
        raise UserError("there are no images to measure", "analyze(model, images)", "pass at least one image")
    meter.check_cka()
    table = pd.DataFrame(list(meter.rows(name)), columns=list(COLUMNS))
    table = table.astype({"std": float, "ci95": float})  # a missing spread as NaN, not as None
    layers = [layer.name for layer in meter.places]
    return Analysis(table, meter.sums.images, layers, meter.arrays(), meter.notes(), meter.sampling_errors())


def choose(metrics: str | Iterable[str]) -> dict[str, Group]:
    """Look up groups by name; a name may be several with commas between."""
    listed = [metrics] if isinstance(metrics, str) else list(metrics)
    names = [name.strip() for part in listed for name in part.split(",")]
    for name in names or [""]:
        if name not in METRICS:
            raise UserError(
                f"there is no metric '{name}'", "analyze(metrics=...)", closest(name, METRICS, len(METRICS))
            )
    return {name: METRICS[name] for name in names}


def batches(images: Images, device: torch.device) -> Iterator[Tensor]:
    """Yield the images by batches on the device; UserError where they have other than four axes."""
    parts: Iterable[Tensor | Sequence[Tensor]] = images.split(BATCH) if isinstance(images, Tensor) else images
    for batch in parts:
        first = batch if isinstance(batch, Tensor) else batch[0]
        if first.ndim != 4:
            raise UserError(
                f"images have four axes (image, channel, height, width), not the shape {tuple(first.shape)}",
                "analyze(model, images)",
                "add the missing axis, for example images[None] for a single one",
            )
        if len(first):
            yield first.to(device)
