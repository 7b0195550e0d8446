"""`pdvit train`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pdvit.cli.runs.command import Command
from pdvit.cli.runs.options import AsJson, Assign, Cells, Change, File, Replay, Resume, begin
from pdvit.cli.settings import with_settings
from pdvit.config.presets import TERMS
from pdvit.config.schema import AugmentConfig, Config

if TYPE_CHECKING:
    import torch

    from pdvit.data.sources import Source
    from pdvit.engine.ranks import Ranks
    from pdvit.tasks import ClassificationTask


@with_settings
def train(
    config: File = None,
    assign: Assign = None,
    cells: Cells = None,
    resume: Resume = None,
    change: Change = None,
    replay: Replay = None,
    as_json: AsJson = False,
    **settings: Any,
) -> int:
    """Train a vision transformer with the diversity terms.

    Without arguments: a small one on scikit-learn's handwritten digits, with all three terms, in under two minutes.
    """
    return begin(TRAIN, config, assign, cells, resume, change, replay, as_json, settings)


def _make_task(config: Config, source: "Source", device: "torch.device", ranks: "Ranks") -> "ClassificationTask":
    from pdvit.tasks import ClassificationTask

    return ClassificationTask(config, source, device, ranks)


def _describe(config: Config, task: "ClassificationTask") -> str:
    """Say what is trained: the model, the size of its images and patches, and what is added to the class loss."""
    diversity, size = config.diversity, task.preprocessing.size
    parameters = sum(weight.numel() for weight in task.module.model.parameters())
    weights = {name: getattr(diversity, name) for name in TERMS}
    terms = ", ".join(f"{name} {weight:g}" for name, weight in weights.items() if weight) or "none"
    terms += f" ({diversity.variant})" if diversity.variant != "paper" and terms != "none" else ""
    courses = {name: getattr(diversity, f"{name}_schedule") for name, weight in weights.items() if weight}
    terms += "".join(f", {name} {course}" for name, course in courses.items() if course != "constant")
    model = f"{config.model.name}: {parameters:,} parameters, {size}x{size} pixels, patches of {task.mixing.patch_size}"
    return f"{model}\nterms: {terms}; {_mixes(config.augment)}; augmentation: {task.augmentation.describe()}"


def _mixes(augment: AugmentConfig) -> str:
    """Say which share of the batches is mixed, and how."""
    switch = augment.mixup_switch_prob if augment.cutmix and augment.mixup else 1.0
    shares = {"patch CutMix": switch if augment.cutmix else 0.0, "Mixup": 1 - switch if augment.cutmix else 1.0}
    shares["Mixup"] *= bool(augment.mixup)
    parts = [f"{name} on {share * augment.mixup_prob:.0%} of batches" for name, share in shares.items() if share]
    return " and ".join(parts) or "no CutMix"


def _conclude(summary: Mapping[str, Any]) -> str:
    """Say how well the images are told apart, and P of first and last."""
    bad = summary.get("bad_images")
    left_out = f" ({bad} images do not decode and are left out)" if bad else ""
    named = f"\nskipped, as they do not decode: {summary['skipped']}" if "skipped" in summary else ""
    return (
        f"{summary['split']} accuracy {summary['accuracy']:.1%}, loss {summary['loss']:.3f}{left_out}; "
        f"P of the patches: first {summary['similarity_first']:.2f}, last {summary['similarity_last']:.2f} "
        f"(0 all different, 1 all alike){named}"
    )


TRAIN = Command("train", _make_task, _describe, _conclude)
