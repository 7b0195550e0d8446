"""Taking in what the layers of a model show, batch by batch: nothing is kept per image."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from pdvit.analysis.metrics import Attention, Group, LinearCKA, Patches, centred_gram
from pdvit.analysis.metrics.cka import FEWEST, too_few
from pdvit.analysis.metrics.sample import PER_PATCH, draw_pairs
from pdvit.analysis.moments import Curve, Moments
from pdvit.engine.device import is_out_of_memory
from pdvit.errors import UserError
from pdvit.models.attention import watch_attention
from pdvit.models.layers import Layer, Place, exact_float32, places_of, shapes_of, watch


@dataclass
class Sums:
    """What was added up over images; memory grows with layers, not with images."""

    images: int = 0
    moments: dict[tuple[str, Layer], Moments] = field(default_factory=dict)
    errors: dict[tuple[str, Layer], Moments] = field(default_factory=dict)
    """Standard errors of sampled values."""
    curves: dict[tuple[str, str], Curve] = field(default_factory=dict)
    counts: dict[Layer, int] = field(default_factory=dict)
    cka: LinearCKA = field(default_factory=LinearCKA)
    cka_images: int = 0
    largest: int = 0
    """Images of the largest batch."""

    def merge(self, other: "Sums") -> None:
        """Take in what another process added up."""
        for name in ("moments", "errors", "curves"):
            for key, value in getattr(other, name).items():
                getattr(self, name).setdefault(key, type(value)()).merge(value)
        self.cka.merge(other.cka)
        self.counts |= other.counts
        self.images += other.images
        self.cka_images += other.cka_images
        self.largest = max(self.largest, other.largest)


class Meter:
    """Measures a model, batch by batch.

    Args:
        model: a bare timm model.
        groups: what to measure.
        sampled: whether some pairs of patches stand for all, where there are many.
    """

    def __init__(self, model: nn.Module, groups: Mapping[str, Group], sampled: bool = False) -> None:
        self.model = model
        self.groups = groups
        self.sampled = sampled
        self.places = places_of(model)
        self.start = _first_alike(model, self.places) if "drift" in groups else None
        self.sums = Sums()
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
        with memory_for(images), torch.no_grad(), exact_float32(images.device), ExitStack() as stack:
            stack.enter_context(watch(self.places, self._look))
            if "attention" in self.groups:
                stack.enter_context(watch_attention(self.model, self._attend))
            self.model(images)
        self.sums.images += len(images)
        self.sums.largest = max(self.sums.largest, len(images))
        if self.grams:
            self.sums.cka.add(self.grams, self.grams)
            self.sums.cka_images += len(images)
        self._begin((0, 0))

    def _look(self, layer: Layer, tokens: Tensor) -> None:
        pairs = draw_pairs(tokens.shape[1], tokens.device) if self.sampled else None
        patches = Patches(tokens, self.size, pairs=pairs)
        check(patches, layer)
        self.sums.counts[layer] = tokens.shape[1]
        if layer == self.start:
            self.first = patches.unit
        if self.first is not None and self.first.shape == tokens.shape:
            patches.first = self.first
        for name in self.groups:
            if name not in ("attention", "cka"):
                self._record(name, layer, patches)
        if "cka" in self.groups and len(tokens) >= FEWEST:
            self.grams.append(centred_gram(patches.tokens))

    def _attend(self, layer: Layer, probabilities: Tensor) -> None:
        attention = Attention(probabilities, self.places[layer].prefix, self.size, self.before)
        self._record("attention", layer, attention)
        self.before = attention.rows

    def _record(self, group: str, layer: Layer, what: Patches | Attention) -> None:
        for name, values in self.groups[group].of(what).items():
            if not bool(values.isfinite().all()):
                raise _broken(layer)
            if name.startswith("error/"):
                self.sums.errors.setdefault((name.removeprefix("error/"), layer), Moments()).add(values)
            elif name in self.groups[group].columns:
                self.sums.moments.setdefault((name, layer), Moments()).add(values)
            else:
                self.sums.curves.setdefault((group, f"{name}/{layer.name}"), Curve()).add(values)

    def check_cka(self) -> None:
        """Raise UserError where CKA is wanted and no batch was large enough for it."""
        if "cka" in self.groups and self.sums.images and not self.sums.cka_images:
            raise too_few(self.sums.largest)

    def rows(self, name: str) -> Iterator[tuple[object, ...]]:
        """Yield the rows of the table: metric by metric, each by layer."""
        sums = self.sums
        matrix = sums.cka.matrix() if "cka" in self.groups else None
        for metric in [column for group in self.groups.values() for column in group.columns]:
            for number, layer in enumerate(self.places):
                found = sums.moments.get((metric, layer))
                place = (name, layer.name, layer.depth, metric)
                if found is not None:
                    yield (*place, found.mean, found.std, found.ci95, found.count, sums.counts[layer])
                elif metric == "cka_last" and matrix is not None:
                    yield (*place, float(matrix[number, -1]), None, None, sums.cka_images, sums.counts[layer])

    def arrays(self) -> dict[str, dict[str, np.ndarray]]:
        """Return the means of the curves, by group."""
        found: dict[str, dict[str, np.ndarray]] = {}
        for (group, name), curve in self.sums.curves.items():
            found.setdefault(group, {})[name] = curve.mean.numpy()
        if "cka" in self.groups:
            layers = np.array([layer.name for layer in self.places])
            found["cka"] = {"matrix": self.sums.cka.matrix().numpy(), "layers": layers}
        return found

    def sampling_errors(self) -> dict[str, dict[str, float]]:
        """Return the standard error of an image's value by metric and layer, where pairs were sampled."""
        found: dict[str, dict[str, float]] = {}
        for (metric, layer), error in self.sums.errors.items():
            found.setdefault(metric, {})[layer.name] = error.mean
        return found

    def notes(self) -> list[str]:
        """Say what is missing, and why."""
        found = []
        if self.start is not None:
            found.append(f"drift is measured from {self.start.name}, at the layers of its grid and width from there on")
        if "attention" in self.groups:
            found.append("attention was computed without fused kernels, between patches only; it belongs to blocks")
        if left := self.sums.images - self.sums.cka_images if "cka" in self.groups else 0:
            found.append(f"cka left {left} images out: a batch of fewer than {FEWEST}")
        if self.sampled:
            found.append(self._sampling())
        return found

    def _sampling(self) -> str:
        errors = self.sampling_errors()
        if not errors:
            return f"no layer has more pairs of patches than a sample ({PER_PATCH} for each patch): all were measured"
        largest = ", ".join(f"{name} {max(layers.values()):.2g}" for name, layers in errors.items())
        return (
            f"some pairs of patches stand for all: {PER_PATCH} for each patch, drawn at random (seed 0); the standard "
            f"error of an image's value by that is at most, over layers: {largest} (analysis.json has each layer)"
        )


def _first_alike(model: nn.Module, places: Mapping[Layer, Place]) -> Layer:
    """Return the first block whose grid and width are those of the last layer: what the losses call first."""
    shapes = shapes_of(model, places)
    last = list(places)[-1]
    return next(layer for layer in places if layer.depth > 0 and shapes[layer] == shapes[last])


@contextmanager
def memory_for(images: Tensor) -> Iterator[None]:
    """Raise UserError where the device has no memory for a forward pass of so many images."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        tip = "choose a smaller --batch-size, or fewer --metrics" if len(images) > 1 else "choose a larger device"
        count = f"{len(images)} images at a time" if len(images) > 1 else "a single image"
        raise UserError(f"there is no memory for {count}", str(images.device), tip) from error


def check(patches: Patches, layer: Layer) -> None:
    """Raise UserError where there are fewer than two patches, or tokens are not finite."""
    count = patches.tokens.shape[1]
    if count < 2:
        raise UserError(
            f"{'one patch has' if count else 'there is no patch, which has'} nothing to be alike to",
            f"{layer.name}, analyze(model, images)",
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
