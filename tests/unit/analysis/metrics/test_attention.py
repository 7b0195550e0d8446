import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pdvit.analysis.metrics import METRICS
from pdvit.analysis.metrics.attention import patch_rows
from pdvit.definitions import GROUPS

PREFIX = 2


def maps(seed: int = 0, sharp: float = 2.0) -> Tensor:
    """Attention of 2 images, 3 heads and 6 patches."""
    generator = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(2, 3, 6 + PREFIX, 6 + PREFIX, generator=generator)).softmax(-1)


def slow(image: np.ndarray, before: np.ndarray, columns: int) -> dict[str, float]:
    """One image, query by query, from the whole matrices `(heads, T, T)`."""
    entropies, distances, spreads, likeness = [], [], [], []
    for head, old in zip(image.astype(np.float64), before.astype(np.float64), strict=True):
        rows = [row[PREFIX:] / row[PREFIX:].sum() for row in head[PREFIX:]]
        old_rows = [row[PREFIX:] / row[PREFIX:].sum() for row in old[PREFIX:]]
        for i, row in enumerate(rows):
            entropies.append(stats.entropy(row))
            spreads.append(np.std(row))
            distances.append(sum(w * math.dist(divmod(i, columns), divmod(j, columns)) for j, w in enumerate(row)))
        for key in range(len(rows)):
            a, b = [row[key] for row in rows], [row[key] for row in old_rows]
            likeness.append(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
    found = {"entropy": entropies, "distance": distances, "std": spreads, "similarity": likeness}
    return {f"attention_{name}": np.mean(values) for name, values in found.items()}


def measure(probabilities: Tensor, before: Tensor | None = None, image=(20, 30)) -> dict[str, Tensor]:
    previous = None if before is None else patch_rows(before, PREFIX)
    return METRICS["attention"](patch_rows(probabilities, PREFIX), image, previous)


@pytest.mark.parametrize("sharp", [0.1, 2.0, 20.0])
def test_equals_a_count_query_by_query(sharp):
    now, before = maps(sharp=sharp), maps(seed=1, sharp=sharp)
    found = measure(now, before)
    assert "attention_similarity" not in measure(now)  # of the first block
    assert set(found) == {*GROUPS["attention"]["columns"], *GROUPS["attention"]["curves"]}
    for index in range(len(now)):
        for name, value in slow(now[index].numpy(), before[index].numpy(), columns=3).items():
            assert found[name][index].item() == pytest.approx(value, abs=1e-5), name
            assert found[name.removeprefix("attention_")][index].mean() == pytest.approx(value, abs=1e-5)


def test_uniform_and_one_hot_attention():
    uniform = torch.full((1, 1, 6 + PREFIX, 6 + PREFIX), 1 / 8)
    names = [f"attention_{name}" for name in ("entropy", "std", "similarity", "distance")]
    found = [measure(uniform, uniform)[name].item() for name in names[:3]]
    assert found == pytest.approx([math.log(6), 0, 1], abs=1e-6)
    uniform = torch.full((1, 1, 198, 198), 1 / 198)  # docs/analyze.md
    assert measure(uniform, image=(224, 224))["attention_distance"].item() == pytest.approx(7.28, abs=0.005)
    own = torch.eye(8)[None, None]
    found = [measure(own, own)[name].item() for name in names]
    assert found == pytest.approx([0, math.sqrt(5) / 6, 1, 0], abs=1e-6)


def test_a_patch_that_looks_at_prefix_tokens_only_counts_as_zeros():
    blind = torch.zeros(1, 1, 8, 8)
    blind[..., 0] = 1
    assert all(value.isfinite().all() for value in measure(blind, blind).values())
