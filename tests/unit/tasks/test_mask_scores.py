import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdvit.data.batch import Batch
from pdvit.engine.distributed import Ranks
from pdvit.errors import UserError
from pdvit.tasks import windows
from pdvit.tasks.mask_scores import MaskTally, measure_masks
from pdvit.tasks.segmentation import numbers_of
from pdvit.tasks.windows import SlidingWindowConfig

CPU = torch.device("cpu")
ONE = torch.tensor([0])


def counted(predicted: np.ndarray, masks: np.ndarray, classes: int):
    """The definition, class by class and pixel by pixel: IoU per class, mIoU, pixel and mean accuracy."""
    ious, recalls, right, pixels = [], [], 0, 0
    for c in range(classes):
        both = of_class = taken = 0
        for p, t in zip(predicted.ravel(), masks.ravel(), strict=True):
            if t == 255:
                continue
            both += p == c and t == c
            of_class += t == c
            taken += p == c
        ious.append(both / (of_class + taken - both) if of_class + taken else math.nan)
        recalls.append(both / of_class if of_class else math.nan)
        right, pixels = right + both, pixels + of_class
    return ious, float(np.nanmean(ious)), right / pixels, float(np.nanmean(recalls))


def tally_of(scores: torch.Tensor, masks: torch.Tensor) -> MaskTally:
    tally = MaskTally(scores.shape[1], CPU)
    for one, mask in zip(scores, masks, strict=True):
        tally.end_image(tally.add(one, mask), large=False)
    return tally


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 7), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
def test_the_numbers_are_those_of_a_slow_count(seed, classes, images, height, width):
    rng = np.random.default_rng(seed)
    there = rng.integers(0, classes, rng.integers(1, classes + 1))  # some classes are nowhere
    masks = rng.choice([*there, 255], (images, height, width)).astype(np.int64)
    masks[0, 0, 0] = there[0]
    scores = torch.from_numpy(rng.normal(size=(images, classes, height, width))).float()
    found = tally_of(scores, torch.from_numpy(masks)).scores()
    ious, miou, accuracy, accuracy_mean = counted(scores.argmax(1).numpy(), masks, classes)
    assert found.iou.tolist() == pytest.approx(ious, abs=1e-12, nan_ok=True)
    assert (found.miou, found.accuracy, found.accuracy_mean) == pytest.approx(
        (miou, accuracy, accuracy_mean), abs=1e-12
    )
    assert int(found.confusion.sum()) == int((masks != 255).sum())
    logs, valid = scores.double().log_softmax(1), masks != 255
    picked = [-logs[n, masks[n, y, x], y, x].item() for n, y, x in np.argwhere(valid)]
    assert found.loss == pytest.approx(np.mean(picked), rel=1e-5)


def test_a_class_that_is_predicted_and_never_there_counts_as_nothing_found():
    scores = torch.zeros(1, 3, 1, 2)
    scores[0, 0, 0, 0] = scores[0, 2, 0, 1] = 1.0
    found = tally_of(scores, torch.zeros(1, 1, 2, dtype=torch.long)).scores()
    assert found.iou.tolist() == pytest.approx([0.5, math.nan, 0.0], nan_ok=True)
    assert found.miou == 0.25
    assert found.accuracy_mean == 0.5


def test_more_pixels_than_float32_can_count():
    tally = MaskTally(2, CPU)
    tally.confusion += torch.tensor([[2**24 + 1, 0], [1, 2**24]])
    assert tally.scores().confusion.tolist() == [[2**24 + 1, 0], [1, 2**24]]


def test_no_pixel_with_a_class_is_an_error():
    with pytest.raises(UserError, match="none of the pixels of 1 masks"):
        tally_of(torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2), 255)).scores()
    with pytest.raises(UserError, match="no image decodes"):
        MaskTally(2, CPU).scores()


def test_images_with_scores_that_are_no_numbers_are_counted():
    scores = torch.zeros(3, 2, 2, 2)
    scores[1, 0, 0, 0] = math.nan
    assert tally_of(scores, torch.zeros(3, 2, 2, dtype=torch.long)).scores().broken == 1


def test_deterministic_mode_counts_the_same_in_little_memory():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 150, 200, 200, generator=generator)
    masks = torch.randint(150, (1, 200, 200), generator=generator)
    expected = tally_of(scores, masks).scores()
    torch.use_deterministic_algorithms(True)
    try:
        found = tally_of(scores, masks).scores()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found.confusion, expected.confusion)
    assert found.miou == expected.miou


class Pretended(Ranks):
    """Two processes, of which the other has found the same."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor


def test_processes_are_added_up():
    scores, masks = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    alone, both = tally_of(scores, masks).scores(), tally_of(scores, masks).scores(Pretended(0, 2))
    assert both.images == 4
    assert torch.equal(both.confusion, 2 * alone.confusion)
    assert (both.miou, both.loss) == (alone.miou, alone.loss)


def test_a_model_is_measured_on_masks_of_their_own_size():
    images = torch.randn(1, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    masks = torch.randint(3, (1, 18, 31), generator=torch.Generator().manual_seed(1))
    masks[0, :4] = 255
    batch = Batch(images, masks, torch.tensor([0]))
    found = measure_masks(lambda seen: seen * 3, [batch], MaskTally(3, CPU), SlidingWindowConfig("slide", 8, 4), "fp32")
    resized = torch.nn.functional.interpolate(images * 3, size=(18, 31), mode="bilinear", align_corners=False)
    ious, miou, accuracy, _ = counted(resized.argmax(1).numpy(), masks.numpy(), 3)
    assert found.iou.tolist() == pytest.approx(ious)
    assert (found.miou, found.accuracy, found.images) == (pytest.approx(miou), pytest.approx(accuracy), 1)


def test_images_that_are_too_large_to_be_evaluated_whole_are_counted_and_seen_in_windows(monkeypatch):
    def network(seen):  # it sees all of what it is given, so that windows differ from the whole
        return seen * 3 + seen.mean((2, 3), keepdim=True) * 5

    generator = torch.Generator().manual_seed(0)
    batches = [
        Batch(torch.randn(1, 3, *size, generator=generator), torch.randint(3, (1, 9, 14), generator=generator), ONE)
        for size in ((12, 20), (6, 10), (11, 25))
    ]

    def measured(mode, chosen):
        return measure_masks(network, chosen, MaskTally(3, CPU), SlidingWindowConfig(mode, 8, 4), "fp32")

    large = batches[::2]
    whole, in_windows = measured("whole", large), measured("slide", large)
    assert whole.large == 0
    assert whole.loss != in_windows.loss
    monkeypatch.setattr(windows, "WHOLE", 200)  # of 240, 60 and 275 pixels
    found = measured("whole", large)
    assert (found.large, found.loss) == (2, in_windows.loss)
    assert torch.equal(found.confusion, in_windows.confusion)
    assert numbers_of(measured("whole", batches))["in_windows"] == 2
    assert "in_windows" not in numbers_of(measured("slide", batches))


def test_processes_that_share_a_model_make_as_many_passes():
    answers = iter([[True, True], [True, False], [True, False], [False, False]])

    class Asked(Ranks):
        def all_gather(self, value):
            return next(answers)

        def all_reduce(self, tensor):
            return tensor

    passes = []

    def network(images: torch.Tensor) -> torch.Tensor:
        passes.append(images.shape)
        return images

    batch = Batch(torch.randn(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.long), torch.tensor([0]))
    measure_masks(
        network, [batch], MaskTally(3, CPU), SlidingWindowConfig("whole", 4, 4), "fp32", Asked(0, 2), together=True
    )
    assert passes == [(1, 3, 8, 8), (1, 3, 4, 4), (1, 3, 4, 4)]
