"""Weights on disk: written as a timm folder whose `model.safetensors` describes itself, and read from any form."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save
from timm.models._hub import save_config_for_hf
from torch import nn

from pdvit.errors import UserError
from pdvit.models.build import create_model
from pdvit.models.checkpoints import CONFIG, HEADER_KEY, WEIGHTS
from pdvit.models.description import describe, expect_input, weights_told
from pdvit.models.matching import Match, match
from pdvit.models.memory import check_fits
from pdvit.models.segmentation.backbone import prune


@dataclass(frozen=True)
class Loaded:
    """A model read from disk, and what is known about it.

    Attributes:
        model: with the weights of the checkpoint.
        name: what the checkpoint is called.
        config: what it says of itself, as timm's config.json.
        architecture: timm's name of the model.
        arguments: timm's arguments of it.
    """

    model: nn.Module
    name: str
    config: dict[str, Any]
    architecture: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> str:
        """Which weights these are: `raw`, `ema`, or `unknown` where the file does not say."""
        return weights_told(self.config)

    def with_random_weights(self, seed: int = 0) -> nn.Module:
        """Return the same model with timm's own initialisation, on the CPU; no generator of the process moves on."""
        where = f"{self.architecture} with random weights"
        check_fits(self.model.state_dict().values(), where)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return create_model(self.architecture, dict(self.arguments), where).eval()


def export(
    model: nn.Module,
    classes: list[str],
    data_config: dict[str, Any],
    weights: str,
    state: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, bytes]:
    """Return the files of a timm folder (name -> content) for a bare timm model built by `timm.create_model`.

    `state` holds the weights where they are not the model's own (a moving average), and `weights` says which they are.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, and the header of the weights carries the text of
    config.json, so that the file alone is enough. Neither holds a name, path or time.
    """
    extra = {"label_names": classes, "pdvit": {"weights": weights}}
    return files(model, state or model.state_dict(), extra, data_config)


def files(
    model: nn.Module, state: Mapping[str, torch.Tensor], extra: dict[str, Any], data_config: dict[str, Any]
) -> dict[str, bytes]:
    """Return config.json with more entries, and the weights with its text in their header, of a timm model."""
    text = _config_text(model, extra, data_config)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    return {
        CONFIG: text.encode(),
        WEIGHTS: _in_order(save(tensors, metadata={"format": "pt", HEADER_KEY: text})),
    }


def _in_order(file: bytes) -> bytes:
    """Return a safetensors file with sorted metadata: the library writes them in an order that changes by chance."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items()))} | header
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format keeps the tensors aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


def _config_text(model: nn.Module, extra: dict[str, Any], data_config: dict[str, Any]) -> str:
    with TemporaryDirectory() as folder:
        # timm's public save_for_hf writes the model's weights too: twice, and not where they are spread over processes.
        save_config_for_hf(model, str(Path(folder) / CONFIG), model_config=extra, data_config=data_config)
        config = json.loads((Path(folder) / CONFIG).read_text())
    for foreign in ("tag", "license"):  # of the published weights of this architecture, which these are not
        config["pretrained_cfg"].pop(foreign, None)
    return json.dumps(config, indent=2) + "\n"


def load(path: str | Path, model_name: str | None = None, weights: str | None = None) -> Loaded:
    """Read a checkpoint with its model: everything that `read_checkpoint` takes; of a segmentation model the backbone.

    Args:
        path: a run directory, a timm folder, a file, or the name of published weights.
        model_name: timm's name for the architecture, for a file that does not say it.
        weights: `raw` or `ema`, where the file holds both; None takes the moving average.

    Raises:
        UserError: nothing is there, the file is truncated, foreign or of another format, weights and model differ, or
            the model is too big for memory.
    """
    described = describe(path, model_name, weights)
    where = described.where
    found = match(described.chosen.tensors, described.sketch, where)
    refuse_difference(found, where)  # by shape, before the model takes any memory
    check_fits(described.sketch.state_dict().values(), where)
    model = create_model(described.architecture, described.arguments, where)
    if described.adapter is not None:
        prune(model, described.adapter)
    model.load_state_dict(found.tensors)
    expect_input(model, described)
    facts = {"weights": described.weights} | ({"prefix": prefix} if (prefix := described.chosen.prefix) else {})
    config = described.config | {"pdvit": facts}
    return Loaded(model.eval(), described.name, config, described.architecture, described.arguments)


def refuse_difference(found: Match, where: str) -> None:
    """Raise UserError unless the weights are those of the model, no more and no less, in its very shapes."""
    shapes = sorted([*found.misshapen, *found.resampled])
    for names, what in ((found.missing, "lack"), (found.left, "hold an unknown"), (shapes, "have another shape of")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"the weights {what} '{names[0]}'{more}",
                where,
                "the file belongs to another architecture; name the right one with --model",
            )
