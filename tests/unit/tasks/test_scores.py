import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score

from pdvit.data.batch import Batch
from pdvit.engine.distributed import Ranks
from pdvit.tasks.scores import BINS, Tally, measure

CPU = torch.device("cpu")


def made(images: int, classes: int, seed: int = 0, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (images,), generator=generator)
    logits = torch.randn(images, classes, generator=generator) * scale
    logits[torch.arange(images), targets] += scale
    return logits, targets


def scores_of(logits: torch.Tensor, targets: torch.Tensor, batch: int = 1000):
    tally = Tally(logits.shape[1], CPU, confusion=True)
    for part, answers in zip(logits.split(batch), targets.split(batch), strict=True):
        tally.add(part, answers)
    return tally.scores()


def slow_calibration_error(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Sort images into the bins ((m - 1) / 15, m / 15] one by one."""
    error = 0.0
    for m in range(1, 16):
        inside = [i for i, row in enumerate(probabilities) if (m - 1) / 15 < row.max() <= m / 15]
        if inside:
            accuracy = sum(probabilities[i].argmax() == targets[i] for i in inside) / len(inside)
            confidence = sum(float(probabilities[i].max()) for i in inside) / len(inside)
            error += len(inside) / len(targets) * abs(accuracy - confidence)
    return error


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(6, 12), st.floats(0.1, 20), st.integers(1, 40))
def test_the_numbers_are_those_of_scikit_learn_and_of_a_slow_loop(seed, images, classes, scale, batch):
    logits, targets = made(images, classes, seed, scale)
    found, every = scores_of(logits, targets, batch), list(range(classes))
    shares = logits.softmax(1).double().numpy()
    assert found.images == images
    assert found.accuracy == accuracy_score(targets, logits.argmax(1))
    assert found.accuracy_top5 == pytest.approx(top_k_accuracy_score(targets, logits, k=5, labels=every), abs=1e-12)
    assert (found.confusion.numpy() == confusion_matrix(targets, logits.argmax(1), labels=every)).all()
    assert found.loss == pytest.approx(
        -logits.double().log_softmax(1)[range(images), targets].mean().item(), rel=1e-4, abs=1e-6
    )
    assert found.calibration_error == pytest.approx(slow_calibration_error(shares, targets.numpy()), abs=1e-9)


def test_the_loss_is_the_log_loss_of_scikit_learn():
    logits, targets = made(500, 7)
    expected = log_loss(targets, logits.double().softmax(1).numpy(), labels=list(range(7)))
    assert scores_of(logits, targets).loss == pytest.approx(expected, rel=1e-6)


def test_the_calibration_error_by_hand():
    # two images at 0.8 of which one is right, two at 0.6 of which both are
    shares = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.6, 0.4], [0.6, 0.4]])
    found = scores_of(shares.log(), torch.tensor([0, 1, 0, 0]))
    assert found.calibration_error == pytest.approx((2 * 0.3 + 2 * 0.4) / 4, abs=1e-6)


def test_sure_and_right_is_calibrated_and_sure_and_wrong_is_not():
    logits = torch.eye(3) * 1e4
    assert scores_of(logits, torch.arange(3)).calibration_error == 0
    assert scores_of(logits, torch.tensor([1, 2, 0])).calibration_error == 1


def test_an_edge_belongs_to_the_bin_below_it():
    tally = Tally(5, CPU)
    tally.add(torch.zeros(1, 5), torch.tensor([0]))  # a confidence of 0.2, which in float32 is above 3 / 15
    tally.add(torch.tensor([[50.0, 0, 0, 0, 0]]), torch.tensor([0]))  # 1 is the end of the last bin
    assert tally.bins[0].nonzero().flatten().tolist() == [3, BINS - 1]


def test_fewer_than_five_classes_have_no_top_five():
    assert scores_of(*made(20, 4)).accuracy_top5 is None
    assert scores_of(*made(20, 5)).accuracy_top5 == 1


def test_how_images_are_batched_changes_no_count():
    logits, targets = made(100, 6)
    one, other = scores_of(logits, targets, 100), scores_of(logits, targets, 7)
    assert (one.accuracy, one.accuracy_top5) == (other.accuracy, other.accuracy_top5)
    assert torch.equal(one.confusion, other.confusion)
    assert one.loss == pytest.approx(other.loss, rel=1e-6)


def test_the_parts_of_several_processes_add_up():
    logits, targets = made(100, 6)
    parts = [Tally(6, CPU, confusion=True) for _ in range(3)]
    for tally, part, answers in zip(parts, logits.split(34), targets.split(34), strict=True):
        tally.add(part, answers)
    attributes = ("counts", "loss", "bins", "confusion")
    sums = {id(getattr(parts[0], name)): sum(getattr(tally, name) for tally in parts) for name in attributes}

    class Three(Ranks):
        def all_reduce(self, tensor):
            return sums[id(tensor)]

    together, alone = parts[0].scores(Three()), scores_of(logits, targets)
    assert torch.equal(together.confusion, alone.confusion)
    assert replace(together, confusion=None, loss=0, calibration_error=0) == replace(
        alone, confusion=None, loss=0, calibration_error=0
    )
    assert together.loss == pytest.approx(alone.loss, rel=1e-6)
    assert together.calibration_error == pytest.approx(alone.calibration_error, rel=1e-9)


def test_logits_that_are_no_numbers_are_counted():
    logits, targets = made(10, 5)
    logits[3, 2], logits[4, 0], logits[4, 1] = math.nan, math.inf, -math.inf
    assert scores_of(logits, targets).broken == 2


def test_without_a_confusion_matrix_memory_does_not_grow_with_the_square_of_the_classes():
    tally = Tally(10**6, CPU)
    tally.add(torch.zeros(1, 10**6), torch.tensor([0]))
    assert tally.scores().confusion is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_measure_runs_the_model_in_the_precision_asked_for(precision):
    seen = []

    def logits_of(images: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        logits = images.flatten(1) @ weight
        seen.append(logits.dtype)
        return logits

    weight = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    images = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(8) % 5
    batches = [Batch(images[i : i + 3], targets[i : i + 3], torch.arange(i, min(i + 3, 8))) for i in (0, 3, 6)]
    found = measure(logits_of, batches, Tally(5, CPU), precision)
    assert found.images == 8
    assert set(seen) == {torch.float32 if precision == "fp32" else torch.bfloat16}
