"""The replay bundle: batch, weights and generators of a step that went wrong, and running it again."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pdvit.engine.protocol import Batch
from pdvit.engine.state import Snapshot, State
from pdvit.engine.update import Updater
from pdvit.errors import UserError
from pdvit.tracking import to_json, write_file

FOLDER = "replay"


@dataclass(frozen=True)
class Replayed:
    """What a step gave when it was run again: its metrics, and the weights whose gradient is not finite."""

    step: int
    metrics: dict[str, float]
    broken: list[str]


def share_of(batch: Batch, generators: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what one process did a step with: its part of the batch, and its generators before."""
    named = {f"batch.{name}": value for name, value in batch.tensors().items()}
    named |= {f"generator.{name}": value for name, value in generators.items()}
    return {name: value.detach().cpu().clone().contiguous() for name, value in named.items()}


def write_bundle(run: Path, snapshot: Snapshot, shares: Sequence[dict[str, Tensor]]) -> None:
    """Write what the step began with that the snapshot was taken after: it was skipped, so the weights are the same.

    Raises UserError where the disk refuses.
    """
    folder, scaler = run / FOLDER, dict(snapshot.facts["scaler"])
    if scaler:  # the step was computed with the scale before it was lowered
        scaler["scale"] /= scaler["backoff_factor"]
    try:
        folder.mkdir(exist_ok=True)
        for rank, share in enumerate(shares):
            save_file(share, folder / f"share-{rank}.safetensors")
        save_file(snapshot.tensors["module"], folder / "module.safetensors")
        write_file(folder / "step.json", to_json({"step": snapshot.step, "scaler": scaler, "shares": len(shares)}))
    except (OSError, SafetensorError) as error:
        raise UserError(f"the step can't be kept for a replay: {error}", str(folder), "make room") from error


def drop_bundle(run: Path, step: int) -> None:
    """Remove the bundle of a step before `step`: a run that saves a sound state after it got over what went wrong."""
    try:
        over = json.loads((run / FOLDER / "step.json").read_text())["step"] < step
    except (OSError, ValueError, LookupError, TypeError):
        return  # there is none, or it is not whole
    if over:
        shutil.rmtree(run / FOLDER, ignore_errors=True)


def replay(run: Path, state: State, updater: Updater) -> Replayed:
    """Run the step of a bundle forwards and backwards again, without an update.

    Raises UserError where the run has no bundle, or a damaged one.
    """
    folder = run / FOLDER
    try:
        facts: dict[str, Any] = json.loads((folder / "step.json").read_text())
        step = int(facts["step"])
        shares = [load_file(folder / f"share-{rank}.safetensors") for rank in range(facts["shares"])]
        state.module.load_state_dict(load_file(folder / "module.safetensors"))
        if state.scaler.is_enabled():
            state.scaler.load_state_dict(facts["scaler"])
        batches = [updater.task.batch_of(_named(share, "batch.", state.device)) for share in shares]
    except FileNotFoundError as error:
        tip = "only a run that stopped after several bad steps has one"
        raise UserError("the run has no step to replay", str(folder), tip) from error
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the replay bundle is damaged: {error}", str(folder), "resume the run instead") from error
    metrics: dict[str, float] = {}
    broken: dict[str, None] = {}
    for share, batch in zip(shares, batches, strict=True):
        state.set_generators(_named(share, "generator.", torch.device("cpu")))
        found = updater.backward(batch)
        for name, value in (found | {"grad_norm": updater.clip()}).items():
            metrics[name] = metrics.get(name, 0.0) + float(value) / len(shares)
        for name, weight in state.module.named_parameters():
            if weight.grad is not None and not bool(weight.grad.isfinite().all()):
                broken[name] = None
    return Replayed(step, metrics, list(broken))


def _named(share: Mapping[str, Tensor], prefix: str, device: torch.device) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value.to(device) for name, value in share.items() if name.startswith(prefix)}
