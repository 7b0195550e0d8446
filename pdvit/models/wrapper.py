"""The base of modules around a timm model: frozen parts, and timm's parameter groups for the optimizer."""

import copy
from abc import abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pdvit.errors import UserError
from pdvit.models.families import family_of, modules_at
from pdvit.models.layers import evaluating, image_size_of

FREEZE = "model.freeze (--freeze)"
BACKBONE = "backbone"


class Wrapper(nn.Module):
    """A module with a bare timm model, and heads of its own."""

    inner: ClassVar[str]  # name of the attribute that holds the timm model

    def __init__(self) -> None:
        super().__init__()
        self.frozen: list[nn.Module] = []  # modules that stay in evaluation mode: see `freeze`

    @property
    def inside(self) -> nn.Module:
        """The bare timm model."""
        model = getattr(self, self.inner)
        assert isinstance(model, nn.Module)
        return model

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of the timm model, in the order of the forward pass."""
        return modules_at(self.inside, family_of(self.inside).blocks)

    def head_weights(self) -> set[nn.Parameter]:
        """Return the weights of the timm model's classifier, and all weights outside of the timm model."""
        model: Any = self.inside
        found = model.get_classifier()
        heads = found if isinstance(found, tuple) else (found,)  # a distilled model has two
        return {*self.parameters()} - {*model.parameters()} | {weight for head in heads for weight in head.parameters()}

    def train(self, mode: bool = True) -> Self:
        """Set the training mode; frozen modules stay in evaluation mode."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    @abstractmethod
    def last_tokens(self, images: Tensor) -> Tensor:
        """Return the last patch tokens `(B, N, D)` of images `(B, 3, H, W)`, without gradient and own heads."""

    def make_anchor(self) -> Self:
        """Return a frozen copy in evaluation mode for `last_tokens`, without heads outside of the timm model."""
        anchor = copy.deepcopy(self).requires_grad_(False).eval()
        for name, _ in list(anchor.named_children()):
            if name != self.inner:
                delattr(anchor, name)
        return anchor

    def no_weight_decay(self) -> set[str]:
        """Return timm's list of parameters without weight decay (positions, class token)."""
        return {f"{self.inner}.{name}" for name in getattr(self.inside, "no_weight_decay", set)()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's rules from parameters to layers, for layer decay; heads match none, and keep the whole rate."""
        model: Any = self.inside
        if not hasattr(model, "group_matcher"):
            what = f"timm has no layer groups for a {type(model).__name__}"
            raise UserError(what, "optim.layer_decay (--layer-decay)", "leave it out")
        rules = model.group_matcher(coarse)
        if callable(rules):
            return _under(rules, self.inner)  # type: ignore[no-any-return]
        return {group: _under(rule, self.inner) for group, rule in rules.items()}


def _under(rule: Any, inner: str) -> Any:
    """Return a rule of timm's matcher (a pattern, or a list of (pattern, order)) for names that begin with `inner.`."""
    if callable(rule):
        return lambda name: rule(name.removeprefix(f"{inner}."))
    if isinstance(rule, str):  # with all its alternatives
        return rf"{inner}\.(?:{rule.replace('^', '')})"
    return [(_under(pattern, inner), order) for pattern, order in rule]


def freeze(network: Wrapper, part: str) -> None:
    """Freeze the embedding and the first N blocks (`part` is N), or all but the classifier and heads (`backbone`).

    Frozen weights get no gradient, so the optimizer omits them. Frozen modules stay in evaluation mode: no dropout, no
    drop path, and a BatchNorm keeps its statistics. Raises UserError for another part, or if there are fewer blocks.
    """
    model: Any = network.inside
    if part == BACKBONE:
        frozen = {*model.parameters()} - network.head_weights()
    elif part.isdecimal():
        frozen = weights_up_to_block(model, network.blocks(), int(part))
    else:
        raise UserError(f"'{part}' is not a part of a model", FREEZE, f"give a number of blocks, or {BACKBONE}")
    for weight in model.parameters():
        weight.requires_grad_(weight not in frozen)
    if part == BACKBONE:
        network.frozen = [model]
    else:
        whole = [module for module in model.modules() if (weights := {*module.parameters()}) and weights <= frozen]
        dropout = getattr(model, "pos_drop", None)  # after the embedding
        network.frozen = [dropout, *whole] if isinstance(dropout, nn.Module) else whole
    network.train(network.training)


def weights_up_to_block(model: nn.Module, blocks: list[nn.Module], count: int) -> set[nn.Parameter]:
    """Return the weights that a forward pass uses before the end of block `count`."""
    if count > len(blocks):
        raise UserError(f"the model has only {len(blocks)} blocks", FREEZE, f"freeze fewer, or {BACKBONE}")
    called: dict[nn.Module, None] = {}
    noting = register_module_forward_pre_hook(lambda part, _: called.setdefault(part))
    with torch.no_grad(), evaluating(model), noting:
        model(next(model.parameters()).new_zeros(1, 3, *image_size_of(model)))
    order = list(called)  # in which a forward pass first calls the modules
    end = order.index(blocks[count - 1]) + 1 if count else order.index(blocks[0])
    before = {weight for module in order[:end] for weight in module.parameters(recurse=False)}
    inside = [{*block.parameters()} for block in blocks]
    return before.union(*inside[:count]).difference(*inside[count:])
