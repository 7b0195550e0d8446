import pytest
import torch

from pdvit.analysis.metrics import DEFAULT, DEFINITIONS, METRICS, Patches
from pdvit.analysis.metrics.group import grid_of
from pdvit.errors import UserError


@pytest.mark.parametrize(
    ("count", "image", "grid"),
    [
        (196, (224, 224), (14, 14)),
        (128, (128, 256), (8, 16)),
        (50, (160, 80), (10, 5)),
        (1, (32, 32), (1, 1)),
        (2, (16, 32), (1, 2)),
        (49, (225, 224), (7, 7)),
    ],
)
def test_a_grid_has_the_shape_of_the_image(count, image, grid):
    assert grid_of(count, image) == grid


@pytest.mark.parametrize(("count", "image"), [(197, (224, 224)), (10, (32, 32))])
def test_what_is_no_grid_is_refused(count, image):
    with pytest.raises(UserError, match="no grid"):
        grid_of(count, image)


def test_every_number_has_its_whole_definition():
    assert set(DEFAULT) <= set(METRICS)
    for name, definition in DEFINITIONS.items():
        assert all(vars(definition).values()), name
    for group in METRICS.values():
        assert group.shown.keys() <= group.columns.keys()
    assert len(DEFINITIONS) == sum(len(group.columns) for group in METRICS.values())


def test_half_precision_is_measured_in_float32():
    assert Patches(torch.zeros(1, 4, 3, dtype=torch.bfloat16)).tokens.dtype == torch.float32
