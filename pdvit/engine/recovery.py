"""Runs that fail: errors with advice, checks of the weights, the replay of a bad step, and what fits in memory."""

import json
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.distributed.tensor import DTensor

from pdvit.engine.checkpoint import Checkpoints
from pdvit.engine.device import is_out_of_memory
from pdvit.engine.distributed import is_lost_rank
from pdvit.engine.protocol import TrainBatch
from pdvit.engine.run_logger import RunLogger
from pdvit.engine.state import TrainState, named
from pdvit.engine.update import Updater
from pdvit.errors import RunFailed, UserError
from pdvit.tracking import Status, to_json, write_file

REPLAY = "replay.safetensors"
SPARE_MEMORY = 0.1  # fraction of the memory: no two steps need exactly the same


def with_advice(error: BaseException, run: Path, updater: Updater, batch: TrainBatch | None) -> BaseException:
    """Wrap errors of torch in messages with advice; `batch` is the last one."""
    if is_out_of_memory(error):
        traceback.clear_frames(error.__traceback__)  # they hold the step's activations
        return _out_of_memory(run, updater, batch)
    if is_lost_rank(error):
        tip = f"see its own message, then resume with: --resume {run}"
        return RunFailed("another process of the run no longer answers", tip)
    return error


def record_failure(error: BaseException, logger: RunLogger, checkpoints: Checkpoints) -> None:
    """Write into status.json how the run ended; a second error becomes a note of the first."""
    status: Status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
    reason = error.what if isinstance(error, UserError | RunFailed) else f"{type(error).__name__}: {error}"
    reason = "interrupted" if isinstance(error, KeyboardInterrupt) else reason
    # The checkpoint that is being written is from before the error.
    for action in (checkpoints.wait, lambda: logger.write_status(status, reason=reason)):
        try:
            action()
        except UserError as second:
            error.add_note(f"and {second.what}")


def check_weights(state: TrainState) -> None:
    """Raise RunFailed on all ranks if weights are not finite, so that they are neither evaluated nor saved."""
    buffers = [(name, buffer) for name, buffer in state.module.named_buffers() if buffer.is_floating_point()]
    weights = [*state.module.named_parameters(), *buffers]  # running statistics can break alone
    shards = [weight.to_local() if isinstance(weight, DTensor) else weight for _, weight in weights]
    broken = state.ranks.all_reduce(torch.stack([(~shard.isfinite()).any() for shard in shards]).int())
    if bool(broken.any()):
        names = [name for (name, _), count in zip(weights, broken.tolist(), strict=True) if count]
        raise RunFailed(
            f"{', '.join(names[:3])} became infinite or not a number by step {state.progress.step}",
            "start a new run with a lower --lr, or with --clip-grad 1",
        )


class ReplayedStep(NamedTuple):
    """A replayed step; `broken` names the weights whose gradient is not finite."""

    step: int
    metrics: dict[str, float]
    broken: list[str]


def save_replay(
    run: Path, state: TrainState, batch: TrainBatch, generators: Mapping[str, Tensor], in_a_row: int
) -> RunFailed:
    """Save the step that was skipped last for a replay, and return the error that ends the run.

    `batch` is this rank's part of it, `generators` are the states before it, `in_a_row` counts the skipped steps.
    """
    own = {f"batch.{name}": value.detach().cpu() for name, value in batch.tensors().items()}
    own |= {f"generator.{name}": value for name, value in generators.items()}
    snapshot, parts = state.state_dict(), state.ranks.all_gather(own)
    if state.ranks.main:
        scaler = dict(snapshot.metadata["scaler"])
        if scaler:  # the step was computed with the scale before it was lowered
            scaler["scale"] /= scaler["backoff_factor"]
        # It was skipped, so the weights are those before it.
        tensors = {f"module.{name}": value for name, value in snapshot.tensors["module"].items()}
        for rank, part in enumerate(parts):
            tensors |= {f"{rank}.{name}": value.clone().contiguous() for name, value in part.items()}
        metadata = {"step": snapshot.step, "scaler": scaler, "ranks": len(parts)}
        try:
            write_file(run / REPLAY, save(tensors, {"replay": to_json(metadata)}))
        except OSError as error:
            what = f"the step can't be saved for a replay: {error.strerror}"
            raise UserError(what, str(run), "make room") from error
    state.ranks.all_gather(None)  # torchrun ends the others as soon as one is done
    return RunFailed(
        f"loss or gradient was infinite or not a number in {in_a_row} steps in a row, up to step {snapshot.step}",
        f"see where: --replay {run}; then start a new run with a lower --lr, or with --clip-grad 1",
    )


def remove_replay(run: Path, step: int) -> None:
    """Remove the saved step if it is before `step`: a run that saves a later checkpoint has recovered."""
    with suppress(OSError, SafetensorError, ValueError, LookupError):
        if _read_replay(run)[0]["step"] < step:
            (run / REPLAY).unlink()


def _read_replay(run: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(run / REPLAY, framework="pt") as file:
        return json.loads(file.metadata()["replay"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def replay(run: Path, state: TrainState, updater: Updater) -> ReplayedStep:
    """Compute the saved step again, without an update; raises UserError if there is none or it is damaged."""
    try:
        metadata, tensors = _read_replay(run)
        parts = [named(tensors, f"{rank}.") for rank in range(metadata["ranks"])]
        state.module.load_state_dict(named(tensors, "module."))
        if state.scaler.is_enabled():
            state.scaler.load_state_dict(metadata["scaler"])
        on_device = [{name: value.to(state.device) for name, value in named(part, "batch.").items()} for part in parts]
        batches = [updater.task.batch_of(tensors) for tensors in on_device]
    except FileNotFoundError as error:
        tip = "only a run that stopped after several bad steps has one"
        raise UserError("the run has no step to replay", str(run / REPLAY), tip) from error
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the saved step is damaged: {error}", str(run / REPLAY), "resume the run instead") from error
    metrics: dict[str, float] = {}
    broken: dict[str, None] = {}  # in the order of weights
    for part, batch in zip(parts, batches, strict=True):
        state.set_generators(named(part, "generator."))
        found = updater.backward(batch)
        for name, value in (found | {"grad_norm": updater.clip()}).items():
            metrics[name] = metrics.get(name, 0.0) + float(value) / len(parts)
        for name, weight in state.module.named_parameters():
            if weight.grad is not None and not bool(weight.grad.isfinite().all()):
                broken[name] = None
    return ReplayedStep(metadata["step"], metrics, list(broken))


def _out_of_memory(run: Path, updater: Updater, batch: TrainBatch | None) -> RunFailed:
    """Find by trial how many images fit at a time."""
    world_size, device = updater.state.ranks.world_size, updater.state.device
    images = min(updater.micro_batch, updater.task.batch_size // world_size)
    if batch is None or world_size > 1:  # a trial would disturb the collectives of the other ranks
        tip = f"resume with smaller parts: --resume {run} --change data.micro_batch={max(1, images // 2)}"
        return RunFailed(f"{device} is out of memory", tip)
    updater.state.optimizer.zero_grad(set_to_none=True)
    size = largest(lambda size: fits(updater, batch, size), images // 2)
    tip = "no single image fits: use a smaller model or image, --grad-checkpointing or --precision bf16"
    if size:
        tip = f"{size} fit; resume the same batches in parts: --resume {run} --change data.micro_batch={size}"
    return RunFailed(f"{device} has no memory for {images} images at a time", tip)


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest power of two up to `limit` that fits, or `limit` itself; 0 if not even 1 fits."""
    size, trial = 0, 1
    while trial <= limit and fits(trial):
        size, trial = trial, 2 * trial
    return limit if 0 < size < limit < trial and fits(limit) else size


def fits(updater: Updater, batch: TrainBatch, size: int) -> bool:
    """Try to compute the gradient of `size` images: the batch's own, repeated if there are too few."""
    try:
        updater.backward(batch.repeat(size), micro_batch=size)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        updater.state.optimizer.zero_grad(set_to_none=True)
        if updater.state.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def largest_batch(updater: Updater, batches: Iterator[TrainBatch], limit: int) -> int:
    """Return how many images a GPU can hold in one update with `SPARE_MEMORY` left; 0 if not even one.

    It makes an update first, because the optimizer needs memory too: discard the weights afterwards.
    """
    device = updater.state.device
    torch.cuda.set_per_process_memory_fraction(1 - SPARE_MEMORY, device)
    try:
        batch = next(batches)
        updater(batch, 1)
        return largest(lambda size: fits(updater, batch, size), limit)
    except torch.OutOfMemoryError:
        return 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
