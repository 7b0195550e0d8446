"""Per-layer metrics of a model, streamed over images: nothing is kept per image."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from pdvit.analysis.metrics import DEFAULT, METRICS, Attention, Group, LinearCKA, Patches, centred_gram
from pdvit.analysis.metrics.cka import FEWEST
from pdvit.analysis.moments import Curve, Moments
from pdvit.errors import UserError, closest
from pdvit.models.attention import watch_attention
from pdvit.models.layers import Layer, Place, evaluating, exact_float32, places_of, shapes_of, watch_layers

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
    """

    table: "pd.DataFrame"
    images: int
    layers: list[str]
    curves: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def analyze(
    model: nn.Module, images: Images, metrics: str | Iterable[str] = DEFAULT, name: str = "model"
) -> "pd.DataFrame":
    """Measure the patches of every layer of a timm vision transformer.

    Args:
        model: a bare timm model; it is put in evaluation mode while it is measured.
        images: normalised images `(B, 3, H, W)` that the model takes, or an iterable of such batches (or of tuples
            that begin with one).
        metrics: names of groups: `similarity` (P), `similarity_signed`, `norms`, `pairs`, `drift`, `rank`,
            `spectrum`, `attention`, `cka`. docs/analyze.md defines what each gives.
        name: what the `model` column says.

    Returns:
        A tidy table, one row per layer and metric, with the columns model, layer, depth (0 for what enters the first
        block, L + 1 for the final norm), metric, mean, std and ci95 over images (missing for a single image), images,
        and tokens (patches per image). Prefix tokens are left out; the metrics are computed in float32, sums that need
        it in float64. A layer that a metric is not defined at has no row.

    Raises:
        UserError: an unknown metric, no images, a single patch, tokens that are not finite, or a model or images that
            a metric can't be measured with.
    """
    return measure(model, images, metrics, name).table


def measure(model: nn.Module, images: Images, metrics: str | Iterable[str] = DEFAULT, name: str = "model") -> Analysis:
    """Do what `analyze` does, and return the curves too."""
    import pandas as pd

    meter = _Meter(model, _choose(metrics))
    with evaluating(model):
        for batch in batches(images, next(model.parameters()).device):
            meter.add(batch)
    if not meter.images:
        raise UserError("there are no images to measure", "analyze(model, images)", "pass at least one image")
    table = pd.DataFrame(list(meter.rows(name)), columns=list(COLUMNS))
    table = table.astype({"std": float, "ci95": float})  # a missing spread as NaN, not as None
    layers = [layer.name for layer in meter.places]
    return Analysis(table, meter.images, layers, meter.arrays(), meter.notes())


class _Meter:
    """Adds up what is measured; memory grows with layers, not with images."""

    def __init__(self, model: nn.Module, groups: Mapping[str, Group]) -> None:
        self.model = model
        self.groups = groups
        self.places = places_of(model)
        self.start = _first_alike(model, self.places) if "drift" in groups else None
        self.moments: dict[tuple[str, Layer], Moments] = {}
        self.curves: dict[tuple[str, str], Curve] = {}
        self.cka, self.cka_images = LinearCKA(), 0
        self.counts: dict[Layer, int] = {}
        self.images = 0
        self._begin((0, 0))

    def _begin(self, size: tuple[int, int]) -> None:
        """Forget the batch before."""
        self.size = size
        self.first: Tensor | None = None  # tokens of length 1 that drift is measured from
        self.before: Tensor | None = None  # attention of the block before
        self.grams: list[Tensor] = []

    def add(self, images: Tensor) -> None:
        """Run the model on a batch `(B, C, H, W)`, and take in what its layers show."""
        self._begin((images.shape[-2], images.shape[-1]))
        with torch.no_grad(), exact_float32(images.device), ExitStack() as stack:
            stack.enter_context(watch_layers(self.model, self._look))
            if "attention" in self.groups:
                stack.enter_context(watch_attention(self.model, self._attend))
            self.model(images)
        self.images += len(images)
        if self.grams:
            self.cka.add(self.grams, self.grams)
            self.cka_images += len(images)
        self._begin((0, 0))

    def _look(self, layer: Layer, tokens: Tensor) -> None:
        patches = Patches(tokens, self.size)
        check(patches, layer)
        self.counts[layer] = tokens.shape[1]
        if layer == self.start:
            self.first = patches.unit
        if self.first is not None and self.first.shape == tokens.shape:
            patches.first = self.first
        for name in self.groups:
            if name not in ("attention", "cka"):
                self._record(name, layer, patches)
        # a first batch that is too small is refused, a last one is left out
        if "cka" in self.groups and (self.images == 0 or len(tokens) >= FEWEST):
            self.grams.append(centred_gram(patches.tokens))

    def _attend(self, layer: Layer, probabilities: Tensor) -> None:
        attention = Attention(probabilities, self.places[layer].prefix, self.size, self.before)
        self._record("attention", layer, attention)
        self.before = attention.rows

    def _record(self, group: str, layer: Layer, what: Patches | Attention) -> None:
        for name, values in self.groups[group].of(what).items():
            if not bool(values.isfinite().all()):
                raise _broken(layer)
            if name in self.groups[group].columns:
                self.moments.setdefault((name, layer), Moments()).add(values)
            else:
                self.curves.setdefault((group, f"{name}/{layer.name}"), Curve()).add(values)

    def rows(self, name: str) -> Iterator[tuple[object, ...]]:
        """Yield the rows of the table: metric by metric, each by layer."""
        matrix = self.cka.matrix() if "cka" in self.groups else None
        for metric in [column for group in self.groups.values() for column in group.columns]:
            for number, layer in enumerate(self.places):
                found = self.moments.get((metric, layer))
                place = (name, layer.name, layer.depth, metric)
                if found is not None:
                    yield (*place, found.mean, found.std, found.ci95, found.count, self.counts[layer])
                elif metric == "cka_last" and matrix is not None:
                    yield (*place, float(matrix[number, -1]), None, None, self.cka_images, self.counts[layer])

    def arrays(self) -> dict[str, dict[str, np.ndarray]]:
        """Return the means of the curves, by group."""
        found: dict[str, dict[str, np.ndarray]] = {}
        for (group, name), curve in self.curves.items():
            found.setdefault(group, {})[name] = curve.mean.numpy()
        if "cka" in self.groups:
            layers = np.array([layer.name for layer in self.places])
            found["cka"] = {"matrix": self.cka.matrix().cpu().numpy(), "layers": layers}
        return found

    def notes(self) -> list[str]:
        """Say what is missing, and why."""
        found = []
        if self.start is not None:
            found.append(f"drift is measured from {self.start.name}, at the layers of its grid and width from there on")
        if "attention" in self.groups:
            found.append("attention was computed without fused kernels, between patches only; it belongs to blocks")
        if "cka" in self.groups and self.cka_images < self.images:
            found.append(f"cka left {self.images - self.cka_images} images out: a batch of fewer than {FEWEST}")
        return found


def _first_alike(model: nn.Module, places: Mapping[Layer, Place]) -> Layer:
    """Return the first block whose grid and width are those of the last layer: what the losses call first."""
    shapes = shapes_of(model, places)
    last = list(places)[-1]
    return next(layer for layer in places if layer.depth > 0 and shapes[layer] == shapes[last])


def _choose(metrics: str | Iterable[str]) -> dict[str, Group]:
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


def check(patches: Patches, layer: Layer) -> None:
    """Raise UserError where there is a single patch, or tokens are not finite."""
    if patches.tokens.shape[1] < 2:
        raise UserError(
            "one patch has nothing to be alike to",
            "analyze(model, images)",
            "use larger images or smaller patches",
        )
    if not bool(patches.lengths.isfinite().all()):
        raise _broken(layer)


def _broken(layer: Layer) -> UserError:
    return UserError(
        f"the patches at {layer.name} are infinite or not numbers",
        "the model's weights, or its input",
        "the checkpoint is broken, or the images are not normalised as the model expects",
    )
