"""The probe: a fixed set of held-out images on which P is measured while training."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from pdvit.data.loader import LoaderConfig, eval_batches
from pdvit.data.sources.split import Split, subsample
from pdvit.errors import UserError
from pdvit.models.layers import exact_float32, measure_layers
from pdvit.similarity import patch_similarity

BARS = "▁▂▃▄▅▆▇█"


class Probe:
    """Images spread evenly over a split; every rank has all of them."""

    def __init__(self, split: Split, count: int, loader: LoaderConfig) -> None:
        chosen = subsample(split, count)
        batches = [batch.images for batch in eval_batches(chosen, loader)]
        if not batches:
            raise UserError("none of the probe's images decodes", "run.probe_images", "raise it, or replace them")
        self.images: Tensor = torch.cat(batches)

    def similarity(self, network: nn.Module) -> tuple[list[str], list[float]]:
        """Return the layers of the timm model inside a module, and P of each, mean over the images."""
        network.eval()
        model: Any = network.inside
        found = measure_layers(model, self.images, lambda tokens: patch_similarity(tokens).mean(), network)
        return [layer.name for layer in found], torch.stack(list(found.values())).tolist()

    @torch.no_grad()
    def first_last(self, network: nn.Module, **options: Any) -> tuple[float, float]:
        """Return P of the tokens that the losses compare, or would compare; `options` are those of the network."""
        network.eval()
        with exact_float32(self.images.device):
            output = network(self.images, **options)
        return float(patch_similarity(output.first).mean()), float(patch_similarity(output.last).mean())


def describe_similarity(names: list[str], values: list[float], limit: float) -> str:
    """Return a line with P of every layer, and warnings if it is not finite, or above `limit` in the last layer."""
    bars = "".join(BARS[min(7, int(value * 8))] if value >= 0 else "?" for value in values)
    text = f"P {names[0]} {values[0]:.2f} {bars} {names[-1]} {values[-1]:.2f}"
    if broken := [name for name, value in zip(names, values, strict=True) if not math.isfinite(value)]:
        text += (
            f"\nwarning: tokens of {', '.join(broken)} are not finite, so P is undefined. Start a new run with a "
            f"lower --lr, or with --clip-grad 1"
        )
    if values[-1] > limit:
        text += (
            f"\nwarning: P of {names[-1]} is {values[-1]:.2f}: the patches are collapsing. Try a larger "
            f"--cosine, a lower --lr or a longer --warmup-epochs (--warn-similarity sets the threshold)"
        )
    return text
