"""Finding by trial what fits in memory."""

from collections.abc import Callable, Iterator

import torch

from pdvit.engine.device import is_out_of_memory
from pdvit.engine.protocol import Batch
from pdvit.engine.update import Updater

SPARE = 0.1  # of the memory: no two steps need exactly the same


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest power of two up to `most` that fits, or `most` itself; 0 where not even 1 does."""
    size = 0
    trial = 1
    while trial <= most and fits(trial):
        size, trial = trial, 2 * trial
    return most if 0 < size < most < trial and fits(most) else size


def fits(updater: Updater, batch: Batch, size: int) -> bool:
    """Try to compute the gradient of `size` images, the batch's own, repeated where there are too few."""
    try:
        updater.backward(batch.repeat(size), micro_batch=size)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        updater.optimizer.zero_grad(set_to_none=True)
        if updater.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def largest_batch(updater: Updater, batches: Iterator[Batch], most: int) -> int:
    """Return how many images a GPU holds in one update, `SPARE` of its memory left free; 0 where not even one.

    Makes an update first, because the optimizer keeps something too: throw the weights away afterwards.
    """
    torch.cuda.set_per_process_memory_fraction(1 - SPARE, updater.device)
    try:
        batch = next(batches)
        updater(batch, 1)
        return largest(lambda size: fits(updater, batch, size), most)
    except torch.OutOfMemoryError:
        return 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, updater.device)
