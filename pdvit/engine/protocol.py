"""What the engine asks of a task, and all that it knows about one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class StepOutput:
    """One forward pass: the loss to minimise, and detached scalars on the device, so that nothing waits for it."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Task(Protocol):
    """Something to train. `Batch` objects pass through the engine unopened."""

    steps_per_epoch: int
    batch_size: int
    best_metric: str
    """Name of the number in the `eval` record of which more is better."""

    @property
    def module(self) -> nn.Module:
        """The module to train: its parameters are optimized and saved."""

    def batches(self, start: int) -> Iterator[Any]:
        """Yield the batches of steps start, start + 1, ... without end, in constant time for any start."""

    def step(self, batch: Any) -> StepOutput:
        """Run forward pass and objective on one batch, in training mode."""

    def evaluate(self) -> tuple[Mapping[str, Mapping[str, Any]], str]:
        """Measure the held-out images: records by kind, among them `eval`, and one line that sums them up."""

    def finish(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Return the closing numbers of the module as it is, and the files that export it (name -> content)."""
