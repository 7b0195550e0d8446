"""The probe: a few held-out images, always the same, on which P is measured while training."""

import math

import torch
from torch import Tensor, nn

from pdvit.data.loader import LoaderConfig, eval_batches
from pdvit.data.pictures import Pictures
from pdvit.data.sources import Split
from pdvit.errors import UserError
from pdvit.models.layers import measure_layers
from pdvit.similarity import patch_similarity

BARS = "▁▂▃▄▅▆▇█"


class Probe:
    """Images spread evenly over a split; every process has all of them."""

    def __init__(self, split: Split, count: int, loading: LoaderConfig) -> None:
        self.split, self.count, self.loading = split, count, loading
        self._images: Tensor | None = None

    @property
    def images(self) -> Tensor:
        """The images, `(B, 3, H, W)`; UserError where none of them decodes."""
        if self._images is None:
            chosen = Pictures("probe", self.split).subsample(self.count).split
            batches = [batch.images for batch in eval_batches(chosen, self.loading)]
            if not batches:
                raise UserError("none of the probe's images decodes", "run.probe_images", "raise it, or replace them")
            self._images = torch.cat(batches)
        return self._images

    def similarity(self, model: nn.Module, network: nn.Module) -> tuple[list[str], list[float]]:
        """Return the layers of a timm model and P of each, mean over the images; `network` is what holds the model."""
        network.eval()
        found = measure_layers(model, self.images, lambda tokens: patch_similarity(tokens).mean(), network)
        return [layer.name for layer in found], torch.stack(list(found.values())).tolist()


def describe_similarity(names: list[str], values: list[float], most: float) -> tuple[str, str]:
    """Show P of every layer in a line, and warn where it is no number, or in the last one above `most`."""
    bars = "".join(BARS[min(7, int(value * 8))] if value >= 0 else "?" for value in values)
    line = f"P {names[0]} {values[0]:.2f} {bars} {names[-1]} {values[-1]:.2f}"
    warnings = ""
    broken = [name for name, value in zip(names, values, strict=True) if not math.isfinite(value)]
    if broken:
        warnings += (
            f"\nwarning: tokens are infinite or no numbers in {', '.join(broken)}, so there is no P. Start a new "
            f"run with a lower --lr, or with --clip-grad 1"
        )
    if values[-1] > most:
        warnings += (
            f"\nwarning: P of {names[-1]} is {values[-1]:.2f}: the patches are collapsing into one another. Try a "
            f"larger --cosine, a lower --lr or a longer --warmup-epochs (--warn-similarity sets the threshold)"
        )
    return line, warnings
