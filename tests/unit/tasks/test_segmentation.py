from contextlib import closing
from itertools import islice

import pytest
import torch

from pdvit.config import build, resolve
from pdvit.config.schema import DataConfig, SegmentConfig
from pdvit.data.masks.folders import open_masks
from pdvit.errors import UserError
from pdvit.tasks.segmentation import SegmentationTask

CPU = torch.device("cpu")
SCENES = open_masks(DataConfig(source="scenes"), SegmentConfig())
PLAIN = {"depth": 2, "width": 16, "heads": 2, "patch_size": 8}
SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 2], "num_heads": [1, 2, 2, 4], "window_size": 7}
HIERA = {"embed_dim": 16, "num_heads": 1, "stages": [1, 1, 1, 2]}


def task_of(model: dict, crop: int = 32, diversity: str = "paper", **segment) -> SegmentationTask:
    sections = {"model": model | {"drop_path": 0.0}, "data": {"source": "scenes", "batch_size": 2, "workers": 0}}
    sections |= {"segment": {"head": "upernet", "width": 8, "crop": crop} | segment, "optim": {"epochs": "2st"}}
    config = resolve(build(("flags", sections | {"diversity": {"preset": diversity}})))
    return SegmentationTask(config, SCENES, CPU)


@pytest.mark.parametrize(
    ("model", "segment", "mode"),
    [
        (PLAIN, {}, "slide"),
        (PLAIN, {"mode": "whole"}, "whole"),
        ({"name": "swin_tiny_patch4_window7_224", "args": SWIN}, {}, "whole"),
        ({"name": "hiera_tiny_224", "args": HIERA}, {}, "slide"),  # it takes the crop's size alone
    ],
)
def test_plain_models_and_those_of_one_size_are_evaluated_in_windows(model, segment, mode):
    windows = task_of(model, 64, **segment).windows
    assert (windows.mode, windows.window, windows.stride) == (mode, 64, 42)


def test_whole_images_are_refused_for_a_backbone_of_one_size():
    with pytest.raises(UserError, match="images of 64x64 pixels alone") as error:
        task_of({"name": "hiera_tiny_224", "args": HIERA}, 64, mode="whole")
    assert error.value.where == "segment.mode (--eval-mode)"


def test_a_model_without_layers_to_compare_is_refused_before_training_though_it_has_no_terms():
    swin = {"name": "swin_tiny_patch4_window7_224", "args": SWIN | {"depths": [1, 1, 1, 1]}}
    with pytest.raises(UserError, match="no block before"):
        task_of(swin, 64, diversity="none")


@pytest.mark.parametrize("mode", [{}, {"mode": "whole"}])
def test_a_stride_without_effect_is_noted(mode):
    note = "note: segment.stride = 8 has no effect: images are evaluated whole"
    swin = {"name": "swin_tiny_patch4_window7_224", "args": SWIN}
    for task, expected in ((task_of(swin, 64, stride=8, **mode), True), (task_of(PLAIN, stride=8), False)):
        assert (note in task.describe().splitlines()) == expected


def test_windows_that_leave_gaps_are_refused():
    assert task_of(PLAIN, stride=32).windows.stride == 32
    with pytest.raises(UserError, match="leave gaps"):
        task_of(PLAIN, stride=33)


@pytest.mark.slow
@pytest.mark.parametrize("crop", [64, 44])
def test_the_compiled_step_is_the_same_with_a_swin_whose_windows_do_not_fit(crop):
    """As the engine compiles it, in one piece; the last backend, which writes C++, would take minutes."""
    task = task_of({"name": "swin_tiny_patch4_window7_224", "args": SWIN}, crop)
    task.module.eval()  # without dropout, which each of them draws
    with closing(task.batches(0)) as batches:
        (batch,) = islice(batches, 1)
    torch.compiler.reset()
    results = []
    for step in (task.step, torch.compile(task.step, fullgraph=True, dynamic=False, backend="aot_eager")):
        task.module.zero_grad()
        loss = step(task.module, batch).loss
        loss.backward()
        results.append(
            {name: weight.grad for name, weight in task.module.named_parameters() if weight.grad is not None}
        )
        results[-1]["loss"] = loss.detach()
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
