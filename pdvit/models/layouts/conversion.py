"""Names of tensors: sets of weights by their prefix, renames by regular expression, joined projections."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
# Regular expression -> replacement, applied in order to every name; None removes the tensors that match.
Rules = Sequence[tuple[str, str | None]]
IN_MEMORY = "measure the model in memory, in Python: pdvit.analyze(model, images, blocks='encoder.layers')"


@dataclass(frozen=True)
class Converted:
    """Weights of another library under timm's names."""

    tensors: Tensors
    config: dict[str, Any] = field(default_factory=dict)  # the model and its images in the form of timm's config.json
    notes: list[str] = field(default_factory=list)  # what the file leaves open


def convert_each(
    tensors: Mapping[str, Tensor], anchor: str, convert: Callable[[Tensors, str], Converted | None]
) -> Converted | None:
    """Convert each set of weights in a file: `convert(tensors, prefix)`, names without the prefix; None if none is known.

    A prefix is the text before the name `anchor` (a regular expression). Other tensors stay as they are.
    """
    pattern = re.compile(rf"((?:.+\.)?)(?:{anchor})")
    prefixes = sorted({match[1] for name in tensors if (match := pattern.fullmatch(name))}, key=len)
    owners = {name: next((p for p in reversed(prefixes) if name.startswith(p)), None) for name in tensors}
    result, found = {name: value for name, value in tensors.items() if owners[name] is None}, None
    for prefix in prefixes:
        inside = {name.removeprefix(prefix): tensors[name] for name, owner in owners.items() if owner == prefix}
        converted = convert(dict(inside), prefix)
        found = converted or found
        result |= {prefix + name: value for name, value in (converted.tensors if converted else inside).items()}
    return found and replace(found, tensors=result)


def rename(tensors: Mapping[str, Tensor], rules: Rules) -> Tensors:
    """Return the tensors by their new names."""
    renamed: Tensors = {}
    for name, value in tensors.items():
        for pattern, new in rules:
            if new is not None:
                name = re.sub(pattern, new, name)
            elif re.search(pattern, name):
                break
        else:
            renamed[name] = value
    return renamed


def join_qkv(tensors: Tensors, split_bias: bool = False) -> None:
    """Join `attn.q`, `attn.k` and `attn.v` in place: to `attn.qkv`, or with `split_bias` the biases to `q_bias`, `v_bias`.

    A missing bias is zero if another one of the three exists.
    """
    for name in [name for name in tensors if name.endswith("attn.q.weight")]:
        stem = name.removesuffix("q.weight")
        tensors[f"{stem}qkv.weight"] = torch.cat([tensors.pop(f"{stem}{part}.weight") for part in "qkv"])
        biases = {part: value for part in "qkv" if (value := tensors.pop(f"{stem}{part}.bias", None)) is not None}
        if split_bias and "k" not in biases:
            tensors |= {f"{stem}{part}_bias": value for part, value in biases.items()}
        elif biases:
            zero = torch.zeros_like(next(iter(biases.values())))
            tensors[f"{stem}qkv.bias"] = torch.cat([biases.get(part, zero) for part in "qkv"])


def fold_position(tensors: Tensors) -> None:
    """Add the class token's position to it, in place, if there are registers: these have no position (DINOv2)."""
    if "reg_token" in tensors:
        tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
