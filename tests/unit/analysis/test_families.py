"""All metrics of every family, on those that have what they measure."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pdvit.analysis import METRICS, measure
from pdvit.errors import UserError
from pdvit.models.layers import Layer, evaluating, places_of, watch
from tests.unit.models.test_families import CASES, all_families, make, pictures
from tests.unit.test_similarity import literal

# Attention is read between patches, of plain models whose softmax is all that mixes them.
ATTENTION = {
    *("vit", "vit-mean", "vit-mean-after-the-norm", "vit-without-class-token", "deit-distilled", "deit3"),
    *("dinov2-registers", "dinov3", "siglip", "relpos", "hybrid", "eva02", "rope", "beit"),
    "naflexvit",
}


def tokens_of(model: nn.Module, images: Tensor) -> dict[Layer, Tensor]:
    found: dict[Layer, Tensor] = {}
    with torch.no_grad(), evaluating(model), watch(places_of(model), found.__setitem__):
        model(images)
    return found


@all_families
def test_p_is_that_of_a_plain_loop_and_every_group_is_finite_or_refused_with_the_reason(name):
    model, images = make(CASES[name]), pictures(CASES[name], 4)
    groups = [group for group in METRICS if group != "attention" or name in ATTENTION]
    found = measure(model, images, groups)
    columns = {column for group in groups for column in METRICS[group].columns}
    assert set(found.table["metric"]) == columns - {"similarity_random"}
    assert np.isfinite(found.table["mean"]).all()
    arrays = [array for curves in found.curves.values() for array in curves.values() if array.dtype.kind == "f"]
    assert all(np.isfinite(array).all() for array in arrays)
    rows = found.table.set_index(["metric", "layer"])
    seen = tokens_of(model, images)
    assert list(rows.loc["similarity"].index) == [layer.name for layer in seen]
    # every layer is one function of its tokens, so the loop, which is slow, takes those with few
    few = [layer for layer in seen if seen[layer].shape[1] <= 16]
    assert few
    for layer in few:
        assert rows.loc[("similarity", layer.name), "tokens"] == seen[layer].shape[1]
        for metric in ("similarity", "similarity_signed"):
            expected = np.array(literal(seen[layer].double(), metric == "similarity_signed"))
            mean_std = tuple(rows.loc[(metric, layer.name), ["mean", "std"]])
            assert mean_std == pytest.approx((expected.mean(), expected.std(ddof=1)), abs=1e-5)
    if name not in ATTENTION:
        with pytest.raises(UserError, match="attention"):
            measure(model, images, "attention")
