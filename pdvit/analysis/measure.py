"""Metrics of every layer of a model, streamed over images: memory does not grow with their number."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from html import escape
from itertools import product, tee
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import stdtrit
from torch import Tensor, nn

from pdvit.analysis.metrics import METRICS
from pdvit.analysis.metrics.attention import patch_rows
from pdvit.analysis.metrics.cka import MIN_IMAGES, LinearCKA, centred_gram
from pdvit.analysis.metrics.patches import Patches
from pdvit.analysis.verdict import verdict
from pdvit.definitions import DEFAULT, GROUPS
from pdvit.engine.device import is_out_of_memory
from pdvit.engine.distributed import SINGLE_PROCESS, Ranks
from pdvit.errors import UserError, closest
from pdvit.files import reason_of
from pdvit.models.layers import (
    BATCH_FIRST,
    NOT_IMAGES,
    Place,
    evaluating,
    exact_float32,
    find_layers,
    image_size_of,
    shapes_of,
    watch,
    watch_attention,
)
from pdvit.similarity import at_least_float32, unit_tokens

COLUMNS = ["model", "layer", "depth", "metric", "mean", "std", "ci95", "images", "tokens"]
WHERE = "analyze(model, images)"
BATCH_SIZE = 32  # if images come as one tensor
Images = Tensor | Iterable[Tensor | Sequence[Tensor] | Mapping[str, Tensor]] | Mapping[str, Tensor]
Names = str | Iterable[str]
Key = tuple[str, str, str]  # metric group, column or curve, layer


@dataclass(frozen=True, repr=False)
class Analysis:
    """The metrics of one model. A notebook shows verdict and numbers."""

    table: pd.DataFrame  # one row per layer and metric: `pdvit.analyze` has the columns
    images: int  # their number
    layers: list[str]  # all names, in order
    curves: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # by group, arrays by `name/layer`
    notes: list[str] = field(default_factory=list)  # values that are missing in the table, and why

    def with_random(self, random: "Analysis") -> "Analysis":
        """Add P of the same model with random weights, as the metric `similarity_random`."""
        rows = random.table[random.table["metric"] == "similarity"]
        rows = rows.assign(metric="similarity_random", model=self.table["model"].iloc[0])
        return replace(self, table=pd.concat([self.table, rows], ignore_index=True))

    @property
    def random(self) -> pd.DataFrame:
        """The rows of P of random weights; none if these were not measured."""
        return self.table[self.table["metric"] == "similarity_random"]

    @property
    def verdict(self) -> str:
        """Whether the patches are alike and P climbs, beside random weights; empty if P was not measured."""
        return verdict(self.table, "", "")[0] if (self.table["metric"] == "similarity").any() else ""

    def plot(self, ax: Any = None) -> Any:
        """Draw P by layer on matplotlib's axes, by default new ones, and return them; see `pdvit.plots.similarity`."""
        from pdvit.plots.depth import similarity  # imports matplotlib

        return similarity(self, ax=ax)

    def _text(self) -> str:
        return "\n".join([self.verdict, *(f"note: {note}" for note in self.notes)]).strip()

    def __repr__(self) -> str:
        return f"{self._text()}\n{self.table}"

    def _repr_html_(self) -> str:
        from pdvit.analysis.tables import columns_of

        lines, columns = escape(self._text()).replace("\n", "<br>"), dict(columns_of(self.table))
        return f"<p>{lines}</p>{pd.DataFrame(columns).to_html(index=False, border=0)}"


def measure(
    model: nn.Module,
    images: Images,
    metrics: Names = DEFAULT,
    name: str = "model",
    ranks: Ranks = SINGLE_PROCESS,
    **layout: Any,
) -> Analysis:
    """Measure the patch tokens of every layer of a model, in evaluation mode, by `metrics`, names of groups.

    `images` are normalised `(B, 3, H, W)`, or an iterable of such batches (or of tuples that begin with one, or of
    tables with `pixel_values`). `name` goes to the column `model`, `layout` is that of `find_layers`.

    Each of several ranks passes its part of the images, which may be empty; all return the same, or raise the same.
    """
    layer_metrics = LayerMetrics(*find_layers(model, **layout, where=WHERE), select_metrics(metrics))
    with ranks.raise_on_all_ranks():
        for batch in batches(images, next(layer_metrics.model.parameters())):
            layer_metrics.update(batch)
    sums = MetricSums()
    for part in ranks.all_gather(layer_metrics.sums):
        sums.add(part)
    return layer_metrics.analysis(sums, name)


def cka_between(
    model: nn.Module,
    other: nn.Module,
    images: Images,
    other_images: Images | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> pd.DataFrame:
    """Return the linear CKA between the layers of a model (rows) and of another on the same device (columns).

    `images` are those of `analyze`, in batches of at least 4; smaller ones are left out. `other_images` are the same
    batches as the other model takes them, if that differs. Ranks as in `measure`. UserError if no batch is left.
    """
    cka, weight = LinearCKA(), next(model.parameters())
    rows, columns = (LayerMetrics(*find_layers(each, where=WHERE), ["cka"]) for each in (model, other))
    own, others = tee(batches(images, weight))
    if other_images is not None:
        others = batches(other_images, weight)
    with ranks.raise_on_all_ranks():
        for batch, other_batch in zip(own, others, strict=False):
            if len(batch) >= MIN_IMAGES:
                cka += LinearCKA.of(rows.update(batch), columns.update(other_batch))
    total = sum(ranks.all_gather(cka), LinearCKA())
    if not total.images:
        raise UserError(f"there are no images, or no batch of {MIN_IMAGES}", "cka_between(...)", "pass larger batches")
    names, other_names = ([*side.places] for side in (rows, columns))
    return pd.DataFrame(total.compute().numpy(), index=names, columns=other_names)


def select_metrics(metrics: Names) -> list[str]:
    """Return the names of groups; a name may be several, separated by commas. UserError for an unknown one."""
    listed = [metrics] if isinstance(metrics, str) else metrics
    names = [name.strip() for part in listed for name in part.split(",")]
    for name in names or [""]:
        if name not in METRICS:
            tip = closest(name, METRICS, len(METRICS))
            raise UserError(f"there is no metric '{name}'", "--metrics, in Python analyze(metrics=...)", tip)
    return list(dict.fromkeys(names))


def batches(images: Images, weight: Tensor) -> Iterator[Tensor]:
    """Yield batches with the device and type of a weight; UserError unless they are floating-point with four axes."""
    images = _pixel_values(images)
    parts: Any = images.split(BATCH_SIZE) if isinstance(images, Tensor) else images
    for part in parts if isinstance(parts, Iterable) else [parts]:
        batch = _pixel_values(part[0] if isinstance(part, list | tuple) and part else part)
        if not (isinstance(batch, Tensor) and batch.is_floating_point() and batch.ndim == 4):
            found = f"{batch.dtype} {tuple(batch.shape)}" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"
            what = f"images are floating-point tensors (image, channel, height, width), not {found}"
            tip = "normalise and stack them: torch.stack(images), or images[None] for a single image"
            if isinstance(batch, np.ndarray):
                tip = "normalise them, (B, 3, H, W), and pass torch.as_tensor(np.stack(images)).float()"
            raise UserError(what, WHERE, tip)
        if len(batch):
            yield batch.to(weight)


def _pixel_values(images: Any) -> Any:
    """Return the images of a table, as the processors of transformers return it."""
    return images.get("pixel_values", images) if isinstance(images, Mapping) else images


@contextmanager
def inference(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Evaluate a model in exact float32; UserError for images of a wrong size, or if memory is too small."""
    try:
        with torch.no_grad(), evaluating(model), exact_float32(images.device):
            yield
    except (RuntimeError, AssertionError, ValueError) as error:
        if not is_out_of_memory(error):
            if images.shape[1:] == (3, *image_size_of(model)):
                raise
            what = f"the model can't take images of the shape {tuple(images.shape)}: {reason_of(error)}"
            raise UserError(what, WHERE, "pass images of the shape that the model was built for") from error
        tip = "choose a smaller --batch-size, fewer --metrics or a larger device"
        raise UserError(f"there is no memory for a batch of {len(images)}", str(images.device), tip) from error


def check_count(tokens: Tensor, layer: str) -> None:
    """Raise UserError if there are fewer than two patches."""
    if tokens.shape[1] < 2:
        what = f"similarity needs at least two patches, not {tokens.shape[1]}"
        raise UserError(what, f"{layer}, {WHERE}", "use larger images or smaller patches")


def check_finite(values: Tensor, layer: str) -> None:
    """Raise UserError if values are not finite."""
    if not bool(values.isfinite().all()):
        tip = "the checkpoint is damaged, or the images are not normalised for this model"
        where = "the model's weights, or its input"
        raise UserError(f"the patches at {layer} are infinite or not numbers", where, tip)


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations over images, of values of one shape, in float64 on the CPU."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor) -> "Moments":
        """Return the moments of values `(B, ...)` of images, in float64 on the CPU."""
        mean = values.mean(0)
        return cls(len(values), mean, (values - mean).square().sum(0))

    def __add__(self, other: "Moments") -> "Moments":
        """Return the moments with those of other images (Chan, Golub and LeVeque 1979)."""
        total, difference = self.count + other.count, other.mean - self.mean
        squares = self.squares + (other.squares + difference**2 * self.count * other.count / total)
        return Moments(total, self.mean + difference * other.count / total, squares)

    @property
    def std(self) -> float:
        """Standard deviation over images (n - 1) of a scalar; NaN for a single image."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else math.nan

    @property
    def ci95(self) -> float:
        """Half-width of the 95 % confidence interval of the mean (Student's t); NaN for a single image."""
        return float(stdtrit(self.count - 1, 0.975)) * self.std / math.sqrt(self.count)


@dataclass
class MetricSums:
    """Sums over images, which processes exchange; their size depends on the layers alone."""

    images: int = 0
    moments: dict[Key, Moments] = field(default_factory=dict)  # of columns and curves
    tokens: dict[str, int] = field(default_factory=dict)
    cka: LinearCKA = field(default_factory=LinearCKA)

    def add(self, other: "MetricSums") -> None:
        """Add the sums over more images."""
        for key, more in other.moments.items():
            self.moments[key] = self.moments[key] + more if key in self.moments else more
        self.cka += other.cka
        self.tokens |= other.tokens
        self.images += other.images


class LayerMetrics:
    """Metrics of the layers of a model at some places, updated by hooks during forward passes."""

    def __init__(self, model: nn.Module, places: dict[str, Place], groups: list[str]) -> None:
        self.model = model
        self.groups = groups
        self.places = places
        self.sums = MetricSums()
        self.first_layer: str | None = None
        self.batch = torch.empty(0)  # images
        self.first: Tensor | None = None  # unit tokens of `first_layer`
        self.previous: Tensor | None = None  # attention of the previous block
        self.grams: list[Tensor] = []
        self.values: dict[Key, Tensor] = {}  # of the batch

    def update(self, images: Tensor) -> list[Tensor]:
        """Read every layer in the forward pass of a batch `(B, C, H, W)`; return the Gram matrices for CKA."""
        self.batch, self.grams = images, []
        if "drift" in self.groups and self.first_layer is None:
            # the losses' first: the first block whose grid and width are those of the last layer
            shapes = shapes_of(self.model, self.places, WHERE, images[:1])
            last = shapes[list(self.places)[-1]]
            self.first_layer = next(layer for layer in [*self.places][1:] if shapes[layer] == last)
        attention = "attention" in self.groups
        watching = watch_attention(self.places, self._visit_attention) if attention else nullcontext()
        with inference(self.model, images), watch(self.places, self._visit), watching:
            self.model(images)
        self._read()
        self.sums.images += len(images)
        if self.grams:
            self.sums.cka += LinearCKA.of(self.grams, self.grams)
        self.first = self.previous = None
        return self.grams

    def _visit(self, layer: str, tokens: Tensor) -> None:
        if len(tokens) != len(self.batch):
            what = NOT_IMAGES.format(tuple(tokens.shape), len(self.batch))
            raise UserError(what, f"{layer}, {WHERE}", BATCH_FIRST)
        if ("", "length", layer) in self.values:
            what = f"the model calls {layer} several times for an image, as if it were several layers"
            raise UserError(what, WHERE, "use a model with a module for each layer")
        self.sums.tokens[layer] = tokens.shape[1]
        if layer == self.first_layer:
            self.first = unit_tokens(tokens)
        first = self.first if self.first is not None and self.first.shape == tokens.shape else None
        check_count(tokens, layer)
        parts = Patches(tokens, self.batch.shape[-2:], first).split()
        # Not a metric, but for `_read` to find infinite tokens: here each layer would wait for the device.
        self._add("", layer, {"length": torch.cat([part.lengths.amax(1) for part in parts])})
        for name in self.groups:
            if name not in ("attention", "cka"):
                found = [METRICS[name](part) for part in parts]
                self._add(name, layer, {key: torch.cat([values[key] for values in found]) for key in found[0]})
        if "cka" in self.groups and len(tokens) >= MIN_IMAGES:
            self.grams.append(centred_gram(at_least_float32(tokens)))

    def _visit_attention(self, layer: str, probabilities: Tensor) -> None:
        rows = patch_rows(probabilities, self.places[layer].prefix)
        self._add("attention", layer, METRICS["attention"](rows, self.batch.shape[-2:], self.previous))
        self.previous = rows

    def _add(self, group: str, layer: str, results: dict[str, Tensor]) -> None:
        self.values |= {(group, name, layer): values for name, values in results.items()}

    def _read(self) -> None:
        """Add the moments of the batch's values, which are read from the device together; UserError if not finite."""
        count, device = len(self.batch), self.batch.device
        columns = [values.to(device, torch.float64).reshape(count, -1) for values in self.values.values()]
        whole = torch.cat([torch.empty(count, 0, device=device), *columns], 1).cpu()
        sizes = [column.shape[1] for column in columns]
        for (key, values), part in zip(self.values.items(), whole.split(sizes, 1), strict=True):
            check_finite(part, key[2])
            self.sums.add(MetricSums(moments={key: Moments.of(part.reshape(values.shape))}))
        self.values = {}

    def analysis(self, sums: MetricSums, model: str) -> Analysis:
        """Return the metrics of a model of that name; UserError if there were no images."""
        if not sums.images:
            raise UserError("there are no images to measure", WHERE, "pass at least one image")
        curves: dict[str, dict[str, np.ndarray]] = {}
        rows: list[tuple[object, ...]] = []
        if "cka" in self.groups:
            if not sums.cka.images:
                tip = f"pass batches of at least {MIN_IMAGES} images; more make it less noisy (--images, --batch-size)"
                raise UserError("CKA compares images with one another: batches are too small", "metrics='cka'", tip)
            curves["cka"] = {"matrix": sums.cka.compute().numpy(), "layers": np.array([*self.places])}
        named = [(group, name) for group in self.groups for part in GROUPS[group].values() for name in part]
        for (group, metric), (depth, layer) in product(named, enumerate(self.places)):
            place, moments = (model, layer, depth, metric), sums.moments.get((group, metric, layer))
            if metric == "cka_last":
                value = float(curves["cka"]["matrix"][depth, -1])
                rows.append((*place, value, math.nan, math.nan, sums.cka.images, sums.tokens[layer]))
            elif moments and metric in GROUPS[group]["columns"]:
                spread = (moments.std, moments.ci95)
                rows.append((*place, float(moments.mean), *spread, moments.count, sums.tokens[layer]))
            elif moments:
                curves.setdefault(group, {})[f"{metric}/{layer}"] = moments.mean.numpy()
        table = pd.DataFrame(rows, columns=COLUMNS)
        notes, count = list[str](), sums.tokens["embed"]
        extra, sides = count - math.isqrt(count) ** 2, {*self.batch.shape[-2:]}  # a rank may have no images
        if not self.places["embed"].prefix and len(sides) == 1 and 0 < extra <= 8:  # published models have up to 5
            notes.append(f"{count} patches fill no square; with class or register tokens, pass prefix_tokens={extra}")
        if "drift" in self.groups:
            start = next(layer for layer in self.places if ("drift", "drift_cosine", layer) in sums.moments)
            notes.append(f"drift is measured from {start}, at later layers of its grid and width")
        if "attention" in self.groups:
            notes.append("attention was computed without fused kernels, between patches only, at blocks only")
        if "cka" in self.groups and (left := sums.images - sums.cka.images):
            notes.append(f"cka left {left} images out: a batch of fewer than {MIN_IMAGES}")
        return Analysis(table, sums.images, [*self.places], curves, notes)
