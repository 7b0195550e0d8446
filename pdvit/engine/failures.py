"""What becomes of a run that breaks down: the error that says what to do, and what is kept to look into it."""

import traceback
from pathlib import Path

import torch

from pdvit.engine.checkpoint import Checkpoints
from pdvit.engine.device import is_out_of_memory
from pdvit.engine.distributed import lost_another
from pdvit.engine.journal import Journal
from pdvit.engine.memory import fits, largest
from pdvit.engine.parallel import to_local
from pdvit.engine.protocol import Batch
from pdvit.engine.replay import share_of, write_bundle
from pdvit.engine.state import State
from pdvit.engine.update import Updater
from pdvit.errors import RunFailed, UserError
from pdvit.tracking import Status


def explain(error: BaseException, run: Path, updater: Updater, batch: Batch | None) -> BaseException:
    """Return the error that says what to do, for those of torch that don't; `batch` is what was computed last."""
    if is_out_of_memory(error):
        traceback.clear_frames(error.__traceback__)  # they hold the step's activations
        return _out_of_memory(run, updater, batch)
    if lost_another(error):
        tip = f"its own message says why; go on with: --resume {run}"
        return RunFailed("another process of the run does not answer any more", tip)
    return error


def _out_of_memory(run: Path, updater: Updater, batch: Batch | None) -> RunFailed:
    """Find out what would fit, and say it."""
    processes, device = updater.ranks.world_size, updater.device
    most = min(updater.micro_batch, updater.task.batch_size // processes)
    if batch is None or processes > 1:  # a trial would mix with what the other processes still exchange
        tip = f"go on in parts: --resume {run} --change data.micro_batch={max(1, most // 2)}"
        return RunFailed(f"{device} has no memory left", tip)
    updater.optimizer.zero_grad(set_to_none=True)
    size = largest(lambda size: fits(updater, batch, size), most // 2)
    tip = "no single image fits: use a smaller model or image, --grad-checkpointing or --precision bf16"
    if size:
        tip = f"{size} fit; the same batches in parts: --resume {run} --change data.micro_batch={size}"
    return RunFailed(f"{device} has no memory for {most} images at a time", tip)


def mark(error: BaseException, journal: Journal, checkpoints: Checkpoints) -> None:
    """Write into status.json how the run ended; a broken disk must not hide the error that came first."""
    status: Status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
    reason = error.what if isinstance(error, UserError | RunFailed) else f"{type(error).__name__}: {error}"
    reason = "interrupted" if isinstance(error, KeyboardInterrupt) else reason
    # What was begun before the error is sound, so wait for it.
    for leave in (checkpoints.wait, lambda: journal.status(status, reason=reason)):
        try:
            leave()
        except UserError as second:
            error.add_note(f"and {second.what}")


def check_weights(state: State) -> None:
    """End a run before it measures or saves broken weights, so that the last sound checkpoint stays.

    Raises RunFailed, on every process.
    """
    buffers = [(name, buffer) for name, buffer in state.module.named_buffers() if buffer.is_floating_point()]
    weights = [*state.module.named_parameters(), *buffers]  # running statistics can break where no weight does
    unsound = state.ranks.all_reduce(torch.stack([(~to_local(weight).isfinite()).any() for _, weight in weights]).int())
    if bool(unsound.any()):
        broken = [name for (name, _), count in zip(weights, unsound.tolist(), strict=True) if count]
        raise RunFailed(
            f"{', '.join(broken[:3])} became infinite or not a number by step {state.progress.step}",
            "start a new run with a lower --lr, or with --clip-grad 1",
        )


def give_up(run: Path, state: State, batch: Batch, generators: dict[str, torch.Tensor], in_a_row: int) -> RunFailed:
    """Keep the step that was skipped last for a replay, and return the error to end with.

    Args:
        run: its directory.
        state: after the step.
        batch: this process's share of the step.
        generators: before the step.
        in_a_row: how many steps have been skipped up to it.
    """
    snapshot, shares = state.snapshot(), state.ranks.all_gather(share_of(batch, generators))
    if state.ranks.main:
        write_bundle(run, snapshot, shares)
    state.ranks.all_gather(None)  # torchrun ends the others as soon as one is done
    return RunFailed(
        f"loss or gradient was infinite or not a number in {in_a_row} steps in a row, up to step {snapshot.step}",
        f"see where: --replay {run}; then start a new run with a lower --lr, or with --clip-grad 1",
    )
