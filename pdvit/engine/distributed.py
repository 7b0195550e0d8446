"""Several processes as one run: collectives, and the process group of torchrun."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pdvit.engine.terminal import Stopped, StopRequest
from pdvit.errors import UserError
from pdvit.files import reading


@dataclass(frozen=True)
class Ranks:
    """The processes of a run; alone by default. `local_rank` is the number of this one on its machine, if not alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    stop: StopRequest = field(default_factory=StopRequest)  # of the command

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes, on each of them."""
        if self.world_size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, value: Any) -> list[Any]:
        """Return every process's value, in the order of ranks, on each of them."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Raise a UserError of one rank, or Stopped, on all ranks. Nothing inside may communicate."""
        error: UserError | Stopped | None = None
        try:
            yield
        except (UserError, Stopped) as found:
            error = found
        self.exchange(error, stoppable=False)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A signal also raises Stopped inside, at any line, and then on all ranks."""
        with self.raise_on_all_ranks(), self.stop.interruptible():
            yield

    def exchange(self, status: Any, stoppable: bool = True) -> list[Any]:
        """Return each rank's status; raises on all ranks the first UserError or Stopped: of a stop, if `stoppable`."""
        statuses = self.all_gather(Stopped() if stoppable and self.stop else status)
        for error in statuses:
            if isinstance(error, UserError | Stopped):
                raise error
        return statuses


SINGLE_PROCESS = Ranks()


class AnyRank:
    """Returns for each flag whether any of several ranks raised it in the call before, so that no rank waits."""

    def __init__(self, flags: int) -> None:
        self.group: Any = dist.new_group(backend="gloo")  # of its own, so that a GPU's queue is not waited for
        self._send((False,) * flags)

    def __call__(self, *flags: bool) -> tuple[bool, ...]:
        """Send the flags and return the answer."""
        self.pending.wait()
        answer = tuple(map(bool, self.sent.tolist()))
        self._send(flags)
        return answer

    def _send(self, flags: tuple[bool, ...]) -> None:
        self.sent = torch.tensor(flags, dtype=torch.int32)
        self.pending: Any = dist.all_reduce(self.sent, dist.ReduceOp.MAX, group=self.group, async_op=True)


def init_process_group(stop: StopRequest | None = None) -> Ranks:
    """Join the processes that torchrun or a job started; raises UserError if its variables are not valid."""
    stop = StopRequest() if stop is None else stop
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks(stop=stop)
    tip = "start with torchrun, or unset RANK and WORLD_SIZE"
    with reading("the environment", tip, "the processes can't connect"):
        rank, size, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if size > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return Ranks(rank, size, local if size > 1 else None, stop)
