"""Models of other libraries against the timm models that their files give: P of every block, logits, images."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import pdvit
from pdvit.data.preprocessing import Preprocessing
from pdvit.models.resolved_checkpoint import ResolvedCheckpoint
from tests.unit.models.support import load

# Borders around the crops are even: of an odd one, transformers cuts the larger half elsewhere than torchvision.
PHOTO = Image.fromarray((np.random.default_rng(0).random((50, 64, 3)) * 255).astype(np.uint8))


def perturbed(model: nn.Module, seed: int = 0) -> Any:
    """Change every parameter: biases, norms, layer scales, tokens and positions too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)
    return model.eval()


def random_images(side: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def modules_named(model: nn.Module, pattern: str) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if re.fullmatch(pattern, name)]


def similarity_of(tokens: Tensor) -> float:
    """P by its definition, in float64."""
    tokens = tokens.double().flatten(1, -2)
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    cosines = (unit @ unit.mT).abs()
    count = tokens.shape[1]
    return float((cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)).mean() / (count * (count - 1)))


def check(
    path: Path,
    blocks: Iterable[nn.Module],
    images: Tensor,
    forward: Callable[[Tensor], Any],
    prefix: int = 0,
    weights: str | None = None,
) -> ResolvedCheckpoint:
    """Compare P of the blocks, whose tokens begin with `prefix` others, and the logits if `forward` returns any."""
    loaded, seen = load(path, weights=weights), list[Tensor]()

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        seen.append(output[:, prefix:] if output.ndim == 3 else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    with torch.no_grad():
        output = forward(images)
        logits = loaded.model(images)
    for handle in handles:
        handle.remove()
    output = getattr(output, "logits", output)
    if isinstance(output, Tensor) and output.shape == logits.shape:
        torch.testing.assert_close(logits, output, rtol=0, atol=1e-4)
    table = pdvit.analyze(loaded.model, images, metrics=["similarity"]).table
    ours = table[table["layer"].str.startswith("block")]["mean"].tolist()
    assert ours == pytest.approx([similarity_of(tokens) for tokens in seen], abs=1e-5)
    assert 0.05 < min(ours) < max(ours) < 0.95  # neither collapsed nor random
    return loaded


def prepared(loaded: ResolvedCheckpoint) -> Tensor:
    """Return the photo as pdvit prepares it for the model, `(3, H, W)`."""
    preprocessing = Preprocessing.for_model(loaded.model)
    return preprocessing.normalise(preprocessing.evaluation()(PHOTO)[None])[0]
