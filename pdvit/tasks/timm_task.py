"""The diversity terms as a task of timm's training script (`timm.task`): its loop, flags and files."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from timm.task import ClassificationTask as TimmTask
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from pdvit.data.mixing import patch_cutmix
from pdvit.errors import UserError
from pdvit.losses import Objective
from pdvit.models.build import strides_of
from pdvit.models.tokens import DiverseModel


class DiversityTask(TimmTask):
    """A `timm.task.ClassificationTask` whose loss has the diversity terms. It evaluates and saves the bare timm model.

    `criterion` is the class loss of logits and class indices, by default cross-entropy. For an image of two classes it
    is the mean, weighted by their areas. `cutmix` is the alpha of the patch-aligned CutMix and `prob` the fraction of
    batches that it mixes; timm's own (`--cutmix`) must be off. `kwargs` are `device`, `dtype`, `verbose` as in timm.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Any = None,
        *,
        objective: Objective | None = None,
        cutmix: float = 1.0,
        prob: float = 0.5,
        **kwargs: Any,
    ) -> None:
        objective = objective or Objective()
        if objective.multi_label:
            tip = "write the loop yourself: docs/extend.md"
            raise UserError("timm's classification task has one class per image", "DiversityTask(objective=...)", tip)
        if objective.gram:
            tip = "set gram=0, or use pdvit finetune --gram"
            raise UserError("timm's task has no anchor, which the gram term needs", "DiversityTask(objective=...)", tip)
        wrapper = DiverseModel(model, objective.mixing > 0, compared=objective.contrastive > 0)
        super().__init__(wrapper, criterion, **kwargs)
        self.objective, self.cutmix, self.prob = objective, cutmix, prob
        bare: Any = model
        self.patch_size, self.classes = strides_of(bare)[-1], int(bare.num_classes)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return `loss`, `output` (logits) and each part of the loss, for images `(B, C, H, W)` and classes `(B,)`."""
        objective, patch_targets = replace(self.objective, class_loss=self.criterion), None
        if objective.mixing:
            input, patch_targets, class_loss = self._mix(input, target)
            objective = replace(objective, class_loss=class_loss)
        patchwise = patch_targets if objective.mixing_is_patchwise else None
        output = self.trainable_module(input, patchwise, objective.label_smoothing)
        losses = objective(output, target, patch_targets)
        parts = {f"{name}_loss": value for name, value in losses.parts.items()}
        return {"loss": losses.total, "output": output.logits, **parts}

    def compile(self, backend: str = "inductor", mode: str | None = None, **kwargs: Any) -> Any:
        """Compile the wrapper for training, and the bare model for evaluation."""
        wrapper: Any = self.trainable_module
        self.eval_model: Any = torch.compile(unwrap_model(wrapper).model, backend=backend, mode=mode, **kwargs)
        self.trainable_module: Any = torch.compile(wrapper, backend=backend, mode=mode, **kwargs)
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the bare timm model, for validation and checkpoints."""
        resolved: nn.Module | None = super().get_eval_model(module=module, ema=ema)
        inner = None if resolved is None else unwrap_model(resolved)
        return inner.model if isinstance(inner, DiverseModel) else resolved

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the patch head, which is not part of the model."""
        head = self._patch_head(module, ema)
        return {} if head is None else {"patch_head": head.state_dict()}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Load the patch head."""
        head = self._patch_head(module, ema)
        if head is not None and state:
            head.load_state_dict(state["patch_head"], strict=strict)

    def _patch_head(self, module: nn.Module | None, ema: bool) -> nn.Module | None:
        wrapper = unwrap_model(module if module is not None else self.get_trainable_module(ema=ema))
        head: nn.Module | None = wrapper.patch_head
        return head

    def _mix(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
        """Return mixed images, their patch targets, and the class loss of such images."""
        if target.ndim == 2:  # mixed already, by timm, whose rectangles cut through patches
            what = "the images are mixed already, so patches have no class of their own"
            tip = "leave --mixup and --cutmix of timm's script at 0: the task pastes whole patches itself"
            raise UserError(what, "DiversityTask", tip)
        rng = random.Random(random.getrandbits(64))
        alpha = self.cutmix if rng.random() < self.prob else 0.0
        mixed = patch_cutmix(images, target, self.patch_size, self.classes, alpha, rng)
        other, pasted = target.roll(1), mixed.patch_targets != target[:, None]
        fraction = pasted.float().mean(1).max()  # the rectangle is the same in all; two images of one class hide it

        def class_loss(logits: Tensor, own: Tensor) -> Any:
            return (1 - fraction) * self.criterion(logits, own) + fraction * self.criterion(logits, other)

        return mixed.images, mixed.patch_targets, class_loss
