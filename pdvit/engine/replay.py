"""The replay bundle: batch, weights and generators of a step that went wrong, and running it again."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def write_bundle(run: Path, snapshot: Snapshot, batch: Batch, generators: Mapping[str, Tensor]) -> Path:
    """Write what the step began with that the snapshot was taken after: it was skipped, so the weights are the same.

    Raises OSError where the disk refuses.
    """
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    parts = {"batch": batch.tensors(), "generators": generators}
    for name, tensors in parts.items():
        kept = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
        save_file(kept, folder / f"{name}.safetensors")
    save_file(snapshot.tensors["module"], folder / "module.safetensors")
    write_file(folder / "step.json", to_json({"step": snapshot.step, "scaler": snapshot.facts["scaler"]}))
    return folder


def replay(run: Path, state: State, updater: Updater) -> Replayed:
    """Run the step of a bundle forwards and backwards again, without an update.

    Raises UserError where the run has no bundle, or a damaged one.
    """
    folder = run / FOLDER
    try:
        facts: dict[str, Any] = json.loads((folder / "step.json").read_text())
        parts = {name: load_file(folder / f"{name}.safetensors") for name in ("batch", "generators", "module")}
        step = int(facts["step"])
        state.module.load_state_dict(parts["module"])
        state.set_generators(parts["generators"])
        if state.scaler.is_enabled():
            state.scaler.load_state_dict(facts["scaler"])
        batch = updater.task.batch_of({name: value.to(state.device) for name, value in parts["batch"].items()})
    except FileNotFoundError as error:
        tip = "only a run that stopped after several bad steps has one"
        raise UserError("the run has no step to replay", str(folder), tip) from error
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the replay bundle is damaged: {error}", str(folder), "resume the run instead") from error
    metrics = updater.backward(batch)
    broken = [
        name
        for name, weight in state.module.named_parameters()
        if weight.grad is not None and not bool(weight.grad.isfinite().all())
    ]
    return Replayed(step, {name: float(value) for name, value in metrics.items()}, broken)
