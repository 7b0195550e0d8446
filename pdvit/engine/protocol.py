"""Interfaces of tasks and batches: all that the engine needs from them."""

from collections.abc import Generator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class TrainBatch(Protocol):
    """A training batch. The engine only splits and repeats it."""

    def __len__(self) -> int:
        """Return the number of images."""

    def split(self, size: int) -> Sequence["TrainBatch"]:
        """Split into batches of `size` images; the last may be shorter."""

    def repeat(self, size: int) -> "TrainBatch":
        """Return a batch of `size` images, these over and over."""


class Task(Protocol):
    """A model to train on data. `network` below is the module to call: the task's own or its moving average."""

    steps_per_epoch: int
    batch_size: int
    best_metric: str
    """Name of the metric in the `eval` record that chooses the best checkpoint: the higher, the better."""

    @property
    def module(self) -> nn.Module:
        """The module whose parameters are optimized and saved."""

    @property
    def anchor(self) -> nn.Module | None:
        """A frozen module that the loss reads, or None: a copy of `module` as it begins, saved once with the run."""

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """Description of the training data: a run resumes only on the same data."""

    def batches(self, start: int) -> Generator[Any]:
        """Yield this process's part of steps start, start + 1, ... without end, in constant time for any start."""

    def step(self, network: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and detached metrics of one batch, scalars on the device, means over the images; in training."""

    def evaluate(self, network: nn.Module) -> tuple[Mapping[str, Mapping[str, Any]], str]:
        """Return records of the validation images by type, `eval` among them, and a headline; the same on all ranks."""

    def finish(self, network: nn.Module, weights: str) -> dict[str, Any]:
        """Return the closing metrics of the weights (`raw` or `ema`); the run fails if `loss` is not finite."""

    def export(self, state: Mapping[str, Tensor], weights: str) -> dict[str, bytes]:
        """Return the files (name -> content) that hold these weights of the module."""
