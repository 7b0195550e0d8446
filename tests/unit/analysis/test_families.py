"""All metrics of every family, on those that have what they measure."""

import numpy as np
import pytest

from pdvit.analysis import METRICS, measure
from pdvit.definitions import GROUPS
from pdvit.errors import UserError
from pdvit.similarity import patch_similarity
from tests.unit.models.support import tokens_of
from tests.unit.models.test_families import CASES, all_families, make, pictures

# Attention is read between patches, of plain models whose softmax is all that mixes them.
ATTENTION = {
    *("vit", "vit-mean", "vit-mean-after-the-norm", "vit-without-class-token", "deit-distilled", "deit3"),
    *("dinov2-registers", "dinov3", "siglip", "relpos", "hybrid", "eva02", "rope", "beit"),
    "naflexvit",
}


@all_families
def test_every_group_is_finite_at_every_layer_or_refused_with_the_reason(name):
    model, images = make(CASES[name]), pictures(CASES[name], 4)
    groups = [group for group in METRICS if group != "attention" or name in ATTENTION]
    found = measure(model, images, groups)
    columns = {column for group in groups for column in GROUPS[group]["columns"]}
    assert set(found.table["metric"]) == columns - {"similarity_random"}
    assert np.isfinite(found.table["mean"]).all()
    arrays = [array for curves in found.curves.values() for array in curves.values() if array.dtype.kind == "f"]
    assert all(np.isfinite(array).all() for array in arrays)
    rows = found.table.set_index(["metric", "layer"])
    seen = tokens_of(model, images)
    assert list(rows.loc["similarity"].index) == list(seen)
    assert list(rows.loc["similarity"]["tokens"]) == [tokens.shape[1] for tokens in seen.values()]
    exact = [patch_similarity(tokens.double()).mean().item() for tokens in seen.values()]
    assert list(rows.loc["similarity"]["mean"]) == pytest.approx(exact, abs=1e-5)
    if name not in ATTENTION:
        with pytest.raises(UserError, match="attention"):
            measure(model, images, "attention")
