"""Published weights: timm's by the model's name, and those of the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from pdvit.errors import UserError, closest
from pdvit.models.build import sketch_model
from pdvit.models.memory import check_fits

OFFLINE = "check the network, or get the folder where there is one and name it"


def published(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights that timm publishes for a model, and their configuration; UserError where it has none."""
    sketch = sketch_model(name, {}, name)  # refuse what pdvit can't read before anything is fetched
    check_fits(sketch.state_dict().values(), name)
    family, _, tag = name.partition(".")
    known = timm.list_pretrained(f"{family}.*")
    if not known or (tag and name not in known):
        tip = closest(name, known, shown=3) if known else "name a file, or train one from the start: --model"
        raise UserError(f"timm publishes no weights of {name}", name, tip)
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # of the network, the hub, the cache or the file
        raise _out_of_reach(name, error) from error
    parts: Any = model
    config = {"architecture": name, "num_classes": parts.num_classes, "pretrained_cfg": _plain(parts.pretrained_cfg)}
    return model.state_dict(), config


def downloaded(repository: str, names: tuple[str, ...]) -> Path:
    """Fetch config.json and the first of the files of weights, `OWNER/NAME` or `OWNER/NAME@REVISION`; their folder."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    owner_and_name, _, revision = repository.partition("@")
    config, *weights = names
    try:
        hf_hub_download(owner_and_name, config, revision=revision or None)
        for name in weights:
            try:
                return Path(hf_hub_download(owner_and_name, name, revision=revision or None)).parent
            except EntryNotFoundError:
                continue
    except Exception as error:
        raise _out_of_reach(f"hf-hub:{repository}", error) from error
    raise UserError(f"it holds none of {', '.join(weights)}", f"hf-hub:{repository}", "name a model of timm's form")


def _out_of_reach(name: str, error: Exception) -> UserError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return UserError(f"its weights can't be fetched: {reason}", name, OFFLINE)


def _plain(told: dict[str, Any]) -> dict[str, Any]:
    """Return what JSON can say of timm's configuration: as a config.json would have it."""
    keys = ("input_size", "mean", "std", "crop_pct", "interpolation", "crop_mode", "label_names")
    plain: dict[str, Any] = json.loads(json.dumps({key: told[key] for key in keys if told.get(key) is not None}))
    return plain
