"""What every module around a bare timm model has: its frozen parts, and timm's rules for the optimizer."""

from typing import Any, ClassVar, Self

from torch import nn

from pdvit.errors import UserError


class Wrapper(nn.Module):
    """A module with a bare timm model inside, and heads of its own beside it.

    Attributes:
        inner: under which name the timm model is kept, so that its weights begin with `inner.`.
        frozen: parts of it that stay in evaluation mode: see `freezing.freeze`.
    """

    inner: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.frozen: list[nn.Module] = []

    @property
    def inside(self) -> nn.Module:
        """The bare timm model."""
        model = getattr(self, self.inner)
        assert isinstance(model, nn.Module)
        return model

    def train(self, mode: bool = True) -> Self:
        """Set the mode of training; frozen parts stay in that of evaluation."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that timm's optimizers must not decay (position, class token): the model's own list."""
        own = getattr(self.inside, "no_weight_decay", set)
        return {f"{self.inner}.{name}" for name in own()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Say which block a parameter belongs to, for timm's layer decay: the model's own rules under its name.

        Heads fall under none of them: timm puts them behind the last block, where the learning rate is whole.
        """
        model: Any = self.inside
        if not hasattr(model, "group_matcher"):
            what = f"timm does not say which layer the weights of a {type(model).__name__} belong to"
            raise UserError(what, "optim.layer_decay (--layer-decay)", "leave it out")
        rules = model.group_matcher(coarse)
        if callable(rules):
            return _under(rules, self.inner)  # type: ignore[no-any-return]
        return {group: _under(rule, self.inner) for group, rule in rules.items()}


def _under(rule: Any, inner: str) -> Any:
    """Return a rule of timm's matcher (a pattern, or a list of (pattern, order)) for names that begin with `inner.`."""
    if callable(rule):
        return lambda name: rule(name.removeprefix(f"{inner}."))
    if isinstance(rule, str):  # all alternatives of it
        return rf"{inner}\.(?:{rule.replace('^', '')})"
    return [(_under(pattern, inner), order) for pattern, order in rule]
