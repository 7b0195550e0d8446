"""Classification, as the commands that train see it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdvit.cli.runs.command import Kind
from pdvit.config.presets import TERMS
from pdvit.config.schema import AugmentConfig, Config

if TYPE_CHECKING:
    import torch

    from pdvit.data.sources import Source
    from pdvit.engine.distributed import Ranks
    from pdvit.tasks import ClassificationTask


def _open(config: Config, say: Callable[[str], None]) -> "Source":
    from pdvit.data.sources import open_source

    return open_source(config.data)


def _settle(config: Config, processes: int, device: "torch.device") -> Config:
    return config


def _make_task(config: Config, source: "Source", device: "torch.device", ranks: "Ranks") -> "ClassificationTask":
    from pdvit.tasks import ClassificationTask

    return ClassificationTask(config, source, device, ranks)


def _describe(config: Config, task: "ClassificationTask") -> str:
    """Say what is trained: the model, the size of its images and patches, and what is added to the class loss."""
    size = task.preprocessing.size
    parameters = sum(weight.numel() for weight in task.module.model.parameters())
    model = f"{config.model.name}: {parameters:,} parameters, {size}x{size} pixels, patches of {task.mixing.patch_size}"
    augmentation = task.augmentation.describe()
    return f"{model}\nterms: {terms_of(config)}; {_mixes(config.augment)}; augmentation: {augmentation}"


def terms_of(config: Config) -> str:
    """Say which terms are on, with their weights and courses."""
    diversity = config.diversity
    weights = {name: getattr(diversity, name) for name in TERMS}
    terms = ", ".join(f"{name} {weight:g}" for name, weight in weights.items() if weight) or "none"
    terms += f" ({diversity.variant})" if diversity.variant != "paper" and terms != "none" else ""
    courses = {name: getattr(diversity, f"{name}_schedule") for name, weight in weights.items() if weight}
    return terms + "".join(f", {name} {course}" for name, course in courses.items() if course != "constant")


def _mixes(augment: AugmentConfig) -> str:
    """Say which share of the batches is mixed, and how."""
    switch = augment.mixup_switch_prob if augment.cutmix and augment.mixup else 1.0
    shares = {"patch CutMix": switch if augment.cutmix else 0.0, "Mixup": 1 - switch if augment.cutmix else 1.0}
    shares["Mixup"] *= bool(augment.mixup)
    parts = [f"{name} on {share * augment.mixup_prob:.0%} of batches" for name, share in shares.items() if share]
    return " and ".join(parts) or "no CutMix"


def _conclude(summary: Mapping[str, Any]) -> str:
    """Say how well the images are told apart, and P of first and last."""
    measured = f"{summary['split']} accuracy {summary['accuracy']:.1%}, loss {summary['loss']:.3f}"
    return measured + closing_words(summary)


def closing_words(summary: Mapping[str, Any]) -> str:
    """Say what was left out of the numbers, and P of first and last."""
    bad = summary.get("bad_images")
    left_out = f" ({bad} images do not decode and are left out)" if bad else ""
    named = f"\nskipped, as they do not decode: {summary['skipped']}" if "skipped" in summary else ""
    return (
        f"{left_out}; "
        f"P of the patches: first {summary['similarity_first']:.2f}, last {summary['similarity_last']:.2f} "
        f"(0 all different, 1 all alike){named}"
    )


def _use(run: Path) -> str:
    return f"timm: create_model('local-dir:{run}', pretrained=True)"


CLASSIFICATION = Kind(_open, _settle, _make_task, _describe, _conclude, _use)
