import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support, top_k_accuracy_score
from torch import nn

from pdvit.data.loader import Batch
from pdvit.engine.distributed import Ranks
from pdvit.errors import UserError
from pdvit.tasks import metrics, windows
from pdvit.tasks.metrics import BINS, ClassificationMetric, SegmentationMetric
from pdvit.tasks.windows import SlidingWindowConfig

CPU = torch.device("cpu")
SIZES = [(12, 20), (11, 25), (6, 10)]  # two of them are more than 200 pixels
MATRIX = torch.tensor([[5, 2, 2, 0], [0, 7, 0, 0], [4, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.int32)
NAMES = ["a", "b", "c", "d"]


def random_logits(images: int, classes: int, seed: int = 0, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (images,), generator=generator)
    logits = torch.randn(images, classes, generator=generator) * scale
    logits[torch.arange(images), targets] += scale
    return logits, targets


def classification(logits: torch.Tensor, targets: torch.Tensor, batch: int = 1000) -> ClassificationMetric:
    metric = ClassificationMetric(logits.shape[1], CPU, confusion=True)
    for part, labels in zip(logits.split(batch), targets.split(batch), strict=True):
        metric.update(nn.Identity(), Batch(part, labels, labels))
    return metric


def segmentation(scores: torch.Tensor, masks: torch.Tensor) -> SegmentationMetric:
    metric = SegmentationMetric(scores.shape[1], SlidingWindowConfig("whole", 8, 8), scores.device)
    metric.update(nn.Identity(), Batch(scores, masks, torch.arange(len(scores))))
    return metric


def calibration_error_of_a_loop(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Sort images into the bins ((m - 1) / 15, m / 15] one by one."""
    error = 0.0
    for m in range(1, 16):
        inside = [i for i, row in enumerate(probabilities) if (m - 1) / 15 < row.max() <= m / 15]
        if inside:
            accuracy = sum(probabilities[i].argmax() == targets[i] for i in inside) / len(inside)
            confidence = sum(float(probabilities[i].max()) for i in inside) / len(inside)
            error += len(inside) / len(targets) * abs(accuracy - confidence)
    return error


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(6, 12), st.floats(0.1, 20), st.integers(1, 40))
def test_classification_scores_equal_scikit_learn_and_a_plain_loop(seed, images, classes, scale, batch):
    logits, targets = random_logits(images, classes, seed, scale)
    found, labels = classification(logits, targets, batch).compute(), list(range(classes))
    assert found.images == images
    assert (found.confusion.numpy() == confusion_matrix(targets, logits.argmax(1), labels=labels)).all()
    assert found.numbers["accuracy"] == accuracy_score(targets, logits.argmax(1))
    top = top_k_accuracy_score(targets, logits, k=5, labels=labels)
    assert found.numbers["accuracy_top5"] == pytest.approx(top, abs=1e-12)
    loss = -logits.double().log_softmax(1)[range(images), targets].mean().item()
    assert found.numbers["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)
    error = calibration_error_of_a_loop(logits.softmax(1).double().numpy(), targets.numpy())
    assert found.numbers["calibration_error"] == pytest.approx(error, abs=1e-9)


def test_an_edge_belongs_to_the_bin_below_it():
    # 0.2, which in float32 is above 3 / 15, and 1, the end of the last bin
    metric = classification(torch.tensor([[0.0, 0, 0, 0, 0], [50, 0, 0, 0, 0]]), torch.tensor([0, 0]))
    assert metric.bins[0].nonzero().flatten().tolist() == [3, BINS - 1]


def test_few_classes_have_no_top_five_and_many_need_no_square_without_a_confusion_matrix():
    assert ClassificationMetric(10**6, CPU).confusion is None
    assert classification(*random_logits(20, 4)).compute().numbers["accuracy_top5"] is None
    assert classification(*random_logits(20, 5)).compute().numbers["accuracy_top5"] == 1


def test_logits_that_are_not_finite_are_counted():
    logits, targets = random_logits(10, 5)
    logits[3, 2], logits[4, 0], logits[4, 1] = math.nan, math.inf, -math.inf
    assert classification(logits, targets).compute().broken == 2
    scores = torch.zeros(3, 2, 2, 2)
    scores[1, 0, 0, 0] = math.nan
    assert segmentation(scores, torch.zeros(3, 2, 2, dtype=torch.long)).compute().broken == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_models_run_in_the_configured_precision_without_gradients(precision):
    def network(images: torch.Tensor) -> torch.Tensor:
        logits = images.flatten(1) @ weight
        assert not logits.requires_grad
        assert logits.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
        return logits

    weight = torch.randn(12, 5, requires_grad=True)
    batches = [Batch(torch.randn(n, 3, 2, 2), torch.arange(n) % 5, torch.arange(n)) for n in (3, 3, 2)]
    assert metrics.evaluate(network, batches, ClassificationMetric(5, CPU), precision).images == 8


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 7), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
def test_segmentation_scores_equal_the_matrix_of_scikit_learn(seed, classes, images, height, width):
    rng = np.random.default_rng(seed)
    present = rng.integers(0, classes, rng.integers(1, classes + 1))  # some classes occur nowhere
    masks = rng.choice([*present, 255], (images, height, width)).astype(np.int64)
    masks[0, 0, 0] = present[0]
    scores = torch.from_numpy(rng.normal(size=(images, classes, height, width))).float()
    found = segmentation(scores, torch.from_numpy(masks)).compute()
    labelled = masks != 255
    matrix = confusion_matrix(masks[labelled], scores.argmax(1).numpy()[labelled], labels=range(classes))
    both, present = np.diag(matrix), matrix.any(1)
    unions = matrix.sum(0) + matrix.sum(1) - both
    ious = [inside / union if union else math.nan for inside, union in zip(both, unions, strict=True)]
    means = [np.nanmean(ious), both.sum() / labelled.sum(), (both[present] / matrix.sum(1)[present]).mean()]
    assert np.array_equal(found.confusion, matrix)
    table = metrics.class_table(found.confusion, list(map(str, range(classes))), pixels=True)
    assert table["iou"].tolist() == pytest.approx(ious, abs=1e-12, nan_ok=True)
    assert [found.numbers[name] for name in ("miou", "accuracy", "accuracy_mean")] == pytest.approx(means, abs=1e-12)
    logs = scores.double().log_softmax(1)
    losses = [-logs[n, masks[n, y, x], y, x].item() for n, y, x in np.argwhere(labelled)]
    assert found.numbers["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_split_without_images_or_labelled_pixels_is_an_error():
    with pytest.raises(UserError, match="none of the images decodes"):
        ClassificationMetric(5, CPU).compute()
    with pytest.raises(UserError, match="no image decodes"):
        SegmentationMetric(2, SlidingWindowConfig("whole", 8, 8), CPU).compute()
    with pytest.raises(UserError, match="none of the pixels of 1 masks"):
        segmentation(torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2), 255)).compute()


@pytest.mark.gpu
def test_deterministic_mode_counts_the_same():
    """On a GPU torch has no deterministic kernel for the cross-entropy of pixels."""
    scores, masks = torch.randn(1, 150, 50, 50, device="cuda"), torch.randint(150, (1, 50, 50), device="cuda")
    expected = segmentation(scores, masks).compute()
    torch.use_deterministic_algorithms(True)
    try:
        assert segmentation(scores, masks).compute().numbers == expected.numbers
    finally:
        torch.use_deterministic_algorithms(False)


def test_images_that_are_evaluated_in_windows_are_counted(monkeypatch):
    monkeypatch.setattr(windows, "MAX_WHOLE", 200)
    batches = [Batch(torch.randn(1, 3, *size), torch.ones(1, 9, 14).long(), torch.zeros(1)) for size in SIZES]
    found = [
        metrics.evaluate(nn.Identity(), batches, SegmentationMetric(3, SlidingWindowConfig(mode, 8, 4), CPU), "fp32")
        for mode in ("whole", "slide")
    ]
    assert found[0].numbers == found[1].numbers | {"in_windows": 2}


class OtherRank(Ranks):
    """Two ranks, the other with these statuses for its forward passes, and the same sums."""

    def __init__(self, *statuses):
        super().__init__(0, 2)
        object.__setattr__(self, "statuses", iter(statuses))

    def all_gather(self, value):
        return [value, next(self.statuses)]

    def all_reduce(self, tensor):
        return 2 * tensor


def in_lockstep(*statuses):
    """Evaluate one image beside another rank; return its passes and the images, or the error."""
    passes, ranks = [], OtherRank(*statuses)
    batch = Batch(torch.randn(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.long), torch.tensor([0]))
    metric = SegmentationMetric(3, SlidingWindowConfig("whole", 4, 4), CPU)

    def network(images: torch.Tensor) -> torch.Tensor:
        passes.append(images.shape[-1])
        return images

    try:
        scores = metrics.evaluate(network, [batch], metric, "fp32", ranks, sharded_side=4)
        return passes, scores.images
    except UserError as error:
        return passes, error.what
    finally:
        assert list(ranks.statuses) == []


def test_ranks_that_share_a_model_make_the_same_number_of_passes():
    assert in_lockstep(True, True, True, False) == ([8, 4, 4], 2)


def test_an_error_of_one_rank_ends_all_that_share_a_model(monkeypatch):
    error = UserError("too large", "an image", "cut it")
    assert in_lockstep(error) == ([], "too large")  # while this rank has images
    assert in_lockstep(True, error) == ([8], "too large")  # and after
    monkeypatch.setattr(windows, "MAX_SCORES", 3 * 8 * 8 - 1)
    passes, what = in_lockstep(True)  # the other one gets the error
    assert passes == []
    assert "more than 191 scores" in what


def test_class_tables_equal_scikit_learn():
    before = MATRIX.clone()
    targets, predicted = (
        torch.repeat_interleave(index, MATRIX.flatten()) for index in (torch.arange(16) // 4, torch.arange(16) % 4)
    )
    precision, recall, _, support = precision_recall_fscore_support(
        targets, predicted, labels=list(range(4)), zero_division=math.nan
    )
    table = metrics.class_table(MATRIX, NAMES)
    assert table["accuracy"].tolist() == pytest.approx(recall.tolist(), nan_ok=True)
    assert table["precision"].tolist() == pytest.approx(precision.tolist(), nan_ok=True)
    assert table["images"].tolist() == support.tolist()
    assert table["confused_with"].dropna().to_dict() == {0: "b", 2: "a"}  # of several the first
    assert table["confused"].tolist() == [2, 0, 4, 0]
    assert metrics.class_table(MATRIX, NAMES, pixels=True).columns.tolist()[:3] == ["class", "pixels", "iou"]
    rows = metrics.confusion_table(MATRIX, NAMES).itertuples(index=False)
    assert [tuple(row) for row in rows] == [
        *[("a", "a", 5), ("a", "b", 2), ("a", "c", 2), ("b", "b", 7)],
        *[("c", "a", 4), ("c", "c", 1), ("d", "d", 0)],
    ]
    assert torch.equal(MATRIX, before)


def test_names_that_occur_twice_get_their_index():
    assert metrics.unique_names(["crane", "dog", "crane"]) == ["crane (0)", "dog", "crane (2)"]
