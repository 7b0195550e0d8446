"""What the engine asks of a task and its batches, and all that it knows about them."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class StepOutput:
    """One forward pass: the loss to minimise, and detached scalars on the device, so that nothing waits for it.

    Loss and metrics are means over the images of the batch, so that those of its parts can be averaged by size.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class Batch(Protocol):
    """What one step learns from; the engine only divides it and keeps it."""

    def __len__(self) -> int:
        """Return the number of images."""

    def split(self, size: int) -> Sequence["Batch"]:
        """Divide it into parts of `size` images; the last may be shorter."""

    def repeat(self, size: int) -> "Batch":
        """Return a batch of `size` images, its own over and over."""

    def tensors(self) -> dict[str, Tensor]:
        """Return everything in it by name."""


class Task(Protocol):
    """Something to train.

    `network` below is the module to call: the task's own or its moving average.
    """

    steps_per_epoch: int
    batch_size: int
    best_metric: str
    """Name of the number in the `eval` record of which more is better."""

    @property
    def module(self) -> nn.Module:
        """The module to train: its parameters are optimized and saved."""

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What the training data are, by name: a run goes on only with the same."""

    def load(self, log: Callable[[str], None]) -> None:
        """Bring the data where the steps find them fastest, which can take long; say where, and why."""

    def batches(self, start: int) -> Generator[Any, None, None]:
        """Yield this process's share of steps start, start + 1, ... without end, in constant time for any start."""

    def batch_of(self, tensors: Mapping[str, Tensor]) -> Any:
        """Return the batch that gave these tensors."""

    def step(self, network: nn.Module, batch: Any) -> StepOutput:
        """Run forward pass and objective on one batch, in training mode."""

    def evaluate(self, network: nn.Module) -> tuple[Mapping[str, Mapping[str, Any]], str]:
        """Measure the held-out images: records by kind, among them `eval`, and what to show of them.

        Every process calls it at the same time, and every one gets the same answer.
        """

    def finish(self, network: nn.Module, weights: str) -> dict[str, Any]:
        """Return the closing numbers of the weights (`raw` or `ema`) as they are."""

    def export(self, state: Mapping[str, Tensor], weights: str) -> dict[str, bytes]:
        """Return the files that hold these weights of the module for others (name -> content)."""
