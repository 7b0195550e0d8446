"""Freezing a model's first part: no gradient, and the behaviour of evaluation in training too."""

from typing import Any

import torch
from torch import nn

from pdvit.errors import UserError
from pdvit.models.families import family_of, modules_at
from pdvit.models.layers import evaluating, image_size_of
from pdvit.models.wrapper import Wrapper

WHERE = "model.freeze (--freeze)"
BACKBONE = "backbone"


def freeze(network: Wrapper, part: str) -> None:
    """Freeze the embedding and the first N blocks (`part` is N), or everything but the heads (`backbone`).

    Frozen weights get no gradient, so the optimizer leaves them out. Frozen modules stay in evaluation mode: dropout
    and drop path are off there, and a BatchNorm keeps its statistics. With `backbone` that is the whole model, its
    dropout before the classifier too; what learns is the classifier and the patch head (a linear probe).

    Raises:
        UserError: `part` is neither, or there are fewer blocks.
    """
    model = network.inside
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


def _up_to_block(model: nn.Module, count: int) -> set[str]:
    """Return the names of the weights that a forward pass comes to before the end of block `count`."""
    blocks = modules_at(model, family_of(model).blocks)
    if count > len(blocks):
        raise UserError(f"there are no {count} blocks: the model has {len(blocks)}", WHERE, f"or use {BACKBONE}")
    order = _order(model)
    last = order.index(blocks[count - 1]) if count else order.index(blocks[0]) - 1
    names = {id(weight): name for name, weight in model.named_parameters()}
    before = {names[id(w)] for module in order[: last + 1] for w in module.parameters(recurse=False)}
    inside = [{names[id(weight)] for weight in block.parameters()} for block in blocks]
    return before.union(*inside[:count]).difference(*inside[count:])


def _order(model: nn.Module) -> list[nn.Module]:
    """Return the modules in the order in which a forward pass first calls them."""
    called: dict[nn.Module, None] = {}
    hooks = [part.register_forward_pre_hook(lambda part, _: called.setdefault(part)) for part in model.modules()]
    try:
        with torch.no_grad(), evaluating(model):
            model(next(model.parameters()).new_zeros(1, 3, *image_size_of(model)))
    finally:
        for hook in hooks:
            hook.remove()
    return list(called)


def _still(model: nn.Module) -> list[nn.Module]:
    """Return the modules all of whose weights are frozen, and the dropout of the embedding."""
    found = [getattr(model, "pos_drop", None)]
    for module in model.modules():
        weights = list(module.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            found.append(module)
    return [module for module in found if isinstance(module, nn.Module)]
