"""The replay of a bad step, and advice on memory."""

import shutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pdvit.engine.checkpoint import Checkpoints
from pdvit.engine.device import is_out_of_memory
from pdvit.engine.protocol import TrainBatch
from pdvit.engine.recipe import check_data
from pdvit.engine.state import TrainState
from pdvit.engine.update import Updater
from pdvit.errors import RunFailed, UserError, command

REPLAY = "replay"
SPARE_MEMORY = 0.1  # fraction of the memory: no two steps need exactly the same


def save_replay(run: Path, state: TrainState, generators: Mapping[str, Tensor]) -> None:
    """Save the state before the step that was skipped last; `generators` are their states before it."""
    snapshot = state.state_dict(generators)  # the step was skipped, so the weights are those before it
    if state.ranks.main:
        scaler = snapshot.metadata["scaler"]
        if scaler:  # the step was computed with the scale before it was lowered
            scaler["scale"] /= scaler["backoff_factor"]
        shutil.rmtree(run / REPLAY, ignore_errors=True)  # the same step of an earlier attempt would stay
        Checkpoints(run / REPLAY).write(snapshot)
    state.ranks.all_gather(None)  # torchrun ends the others as soon as one is done


def replay(run: Path, state: TrainState, updater: Updater) -> tuple[int, dict[str, float], list[str]]:
    """Compute the saved step of all ranks again, without an update: its number, metrics, weights of bad gradients."""
    tip = f"a run that stops after several bad steps has one; resume this one: {command('train', '--resume', run)}"
    snapshot = Checkpoints(run / REPLAY).load(state, lambda saved: check_data(saved["data"], state.data, str(run)), tip)
    if snapshot is None:
        raise UserError("the run has no step to replay", str(run / REPLAY), tip)
    saved = snapshot.tensors["state"]
    ranks = sum(name.endswith(".generator.cpu") for name in saved)
    with closing(updater.task.batches(snapshot.step - 1)) as batches:
        parts = (batch := next(batches)).split(len(batch) // ranks)
    metrics: dict[str, float] = {}
    broken: dict[str, None] = {}  # in the order of weights
    for rank, part in enumerate(parts):
        state.set_generators(saved, rank)
        found = updater.backward(part)
        for name, weight in state.module.named_parameters():
            if weight.grad is not None and not bool(weight.grad.isfinite().all()):
                broken[name] = None
        state.scaler.unscale_(state.optimizer)
        for name, value in (found | {"grad_norm": updater.clip()}).items():  # last: it scales the gradient
            metrics[name] = metrics.get(name, 0.0) + float(value) / ranks
        state.scaler.update()
    return snapshot.step, metrics, list(broken)


def with_advice(error: BaseException, run: Path, updater: Updater, batch: TrainBatch | None) -> BaseException:
    """Wrap errors of torch in messages with advice; `batch` is the last one."""
    lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
    if lost and dist.is_initialized():
        tip = f"see its own message, then resume: {command('train', '--resume', run)}"
        return RunFailed("another process of the run no longer answers", tip)
    if not is_out_of_memory(error):
        return error
    traceback.clear_frames(error.__traceback__)  # they hold the step's activations
    ranks = updater.state.ranks.world_size
    share = updater.task.batch_size // ranks
    images = min(updater.config.data.micro_batch or share, share)
    size, found = max(1, images // 2), ""
    if batch is not None and ranks == 1:  # with several ranks, a trial would disturb the collectives of the others
        size = largest(updater, batch, images // 2)
        found = f"{size} fit; "
    parts = command("train", "--resume", run, "--change", f"data.micro_batch={size}")
    tip = f"{found}resume the same batches in parts: {parts}"
    if size == 0:
        tip = "no single image fits: use a smaller model or image, --grad-checkpointing or --precision bf16"
    return RunFailed(f"{updater.state.device} has no memory for {images} images at a time", tip)


def largest(updater: Updater, batch: TrainBatch, limit: int) -> int:
    """Return the largest power of two, or `limit`, of images whose gradient fits into memory; 0 if none does."""
    fits = 0
    for size in sorted({*(2**power for power in range(limit.bit_length())), limit} - {0}):
        try:
            with torch.compiler.set_stance("force_eager"):  # each size would be compiled
                updater.backward(batch.repeat(size), micro_batch=size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        fits = size
    return fits


def largest_batch(updater: Updater, batches: Iterator[TrainBatch], limit: int) -> int:
    """Return how many images a GPU holds in an update with `SPARE_MEMORY` left, at least 0; it changes the weights."""
    device = updater.state.device
    torch.cuda.set_per_process_memory_fraction(1 - SPARE_MEMORY, device)
    try:
        batch = next(batches)
        updater(batch, 1)
        return largest(updater, batch, limit)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
