"""Freezing a model's first part: no gradient, and the behaviour of evaluation in training too."""

from typing import Any

from timm.models import group_parameters
from torch import nn

from pdvit.errors import UserError
from pdvit.models.families import family_of, modules_at
from pdvit.models.tokens import DiverseModel

WHERE = "model.freeze (--freeze)"
BACKBONE = "backbone"


def freeze(network: DiverseModel, part: str) -> None:
    """Freeze the embedding and the first N blocks (`part` is N), or everything but the heads (`backbone`).

    Frozen weights get no gradient, so the optimizer leaves them out. Frozen modules stay in evaluation mode: dropout
    and drop path are off there, and a BatchNorm keeps its statistics. With `backbone` that is the whole model, its
    dropout before the classifier too; what learns is the classifier and the patch head (a linear probe).

    Raises:
        UserError: `part` is neither, there are fewer blocks, or timm does not say what comes before a block.
    """
    model = network.model
    if part == BACKBONE:
        frozen = {name for name, _ in model.named_parameters()} - _classifier(model)
    elif part.isdecimal():
        frozen = _up_to_block(model, int(part))
    else:
        raise UserError(f"'{part}' is no part of a model", WHERE, f"give a number of blocks, or {BACKBONE}")
    for name, weight in model.named_parameters():
        weight.requires_grad_(name not in frozen)
    network.frozen = [model] if part == BACKBONE else _still(model)
    network.train(network.training)


def _classifier(model: Any) -> set[str]:
    """Return the names of the classifier's weights: the head, or both of a distilled model."""
    found = model.get_classifier()
    weights = {id(w) for head in (found if isinstance(found, tuple) else (found,)) for w in head.parameters()}
    return {name for name, weight in model.named_parameters() if id(weight) in weights}


def _up_to_block(model: Any, count: int) -> set[str]:
    """Return the names of the weights before the end of block `count`, by timm's own order of layers."""
    family = family_of(model)
    blocks = modules_at(model, family.blocks)
    if count > len(blocks):
        raise UserError(f"there are no {count} blocks: the model has {len(blocks)}", WHERE, f"or use {BACKBONE}")
    if not hasattr(model, "group_matcher"):
        what = f"timm does not say which layer the weights of a {type(model).__name__} belong to"
        raise UserError(what, WHERE, f"use {BACKBONE}, or leave it out")
    layer: dict[str, int] = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    names = {id(weight): name for name, weight in model.named_parameters()}
    inside = [{names[id(weight)] for weight in block.parameters()} for block in blocks]
    behind = {names[id(w)] for norm in modules_at(model, family.norm) for w in norm.parameters()}
    reach = max(layer[name] for name in inside[count - 1]) if count else min(layer[name] for name in inside[0]) - 1
    before = {name for name, number in layer.items() if number <= reach}
    return before.union(*inside[:count]) - behind.union(*inside[count:])


def _still(model: nn.Module) -> list[nn.Module]:
    """Return the modules all of whose weights are frozen, and the dropout of the embedding."""
    found = [getattr(model, "pos_drop", None)]
    for module in model.modules():
        weights = list(module.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            found.append(module)
    return [module for module in found if isinstance(module, nn.Module)]
