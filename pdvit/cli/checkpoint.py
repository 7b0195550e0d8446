"""Options and helpers shared by the commands that use a trained checkpoint."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pdvit.config.schema import Config, SegmentConfig
from pdvit.errors import UserError

if TYPE_CHECKING:
    import torch

    from pdvit.data.loader import LoaderConfig
    from pdvit.engine.distributed import Ranks
    from pdvit.models.loading import LoadedModel
    from pdvit.models.segmentation.files import LoadedSegmenter
    from pdvit.tasks.windows import SlidingWindowConfig

Checkpoint = Annotated[str, typer.Argument(help="A run directory, timm folder, file of weights, or name of a model.")]
Model = Annotated[str | None, typer.Option("--model", help="timm's name of the model, if the file does not have it.")]
Weights = Annotated[str | None, typer.Option("--weights", help="raw or ema, if a file holds both; unset: ema.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[str | None, typer.Option("--precision", help="fp32, bf16 or fp16; unset: the run's, else fp32.")]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", "-b", min=1, help="Images per forward pass; unset: the run's, else 32.")
]
Workers = Annotated[
    int | None, typer.Option("--workers", "-j", min=0, help="Processes that decode image files; unset: the run's.")
]
OnBadImage = Annotated[
    str | None, typer.Option("--on-bad-image", metavar="error|skip", help="Policy for images that do not decode.")
]
MultiScale = Annotated[bool, typer.Option("--ms", help="Segmentation: average over scales from 0.5 to 1.75.")]
Flip = Annotated[bool, typer.Option("--flip", help="Segmentation: average over mirror images too.")]


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A model on its device, the configuration of its run, and how images are loaded."""

    path: Path
    loaded: "LoadedModel | LoadedSegmenter"
    config: Config
    device: "torch.device"
    loader: "LoaderConfig"

    @property
    def segmenter(self) -> "LoadedSegmenter | None":
        """The segmentation model; None for a classifier."""
        from pdvit.models.segmentation.files import LoadedSegmenter

        return self.loaded if isinstance(self.loaded, LoadedSegmenter) else None

    def windows(self, segment: SegmentConfig, multi_scale: bool, flip: bool) -> "SlidingWindowConfig":
        """Return how the segmentation model evaluates an image."""
        from pdvit.tasks.segmentation import sliding_windows
        from pdvit.tasks.windows import SCALES

        assert self.segmenter is not None
        windows = sliding_windows(self.segmenter.model, segment, self.loader.per_pass)
        return replace(windows, scales=SCALES if multi_scale else (1.0,), flip=flip)

    def refuse_segmentation_flags(self, flags: Mapping[str, object]) -> None:
        """Raise UserError if a classifier is given flags of segmentation (name -> value)."""
        if self.segmenter is None and any(value not in (None, False) for value in flags.values()):
            tip = "leave them out: they are for segmentation"
            raise UserError("the checkpoint labels images, not pixels", ", ".join(flags), tip)

    def not_finite(self, images: str) -> UserError:
        """Return the error of a model whose finite weights gave logits that are not finite for some images."""
        precision, tip = self.config.run.precision, "the checkpoint is broken, or it is of another model"
        if precision != "fp32":
            tip = f"{precision} may be too narrow for it: try --precision fp32"
        return UserError(f"the model's logits are infinite or not numbers for {images}", str(self.path), tip)


def config_of(path: Path, *layers: tuple[str, dict[str, Any]]) -> Config | None:
    """Return the configuration of a run with more layers over it; None if the path is no run directory."""
    from pdvit.config import build, read_toml

    recipe = path / "run.toml"
    if not (path.is_dir() and recipe.is_file()):
        return None
    return build((str(recipe), read_toml(recipe)), *layers)


def results_folder(path: Path, out: Path | None, prefix: str, name: str) -> Path:
    """Return the folder of a checkpoint's results: `out`, the checkpoint's own folder, or runs/PREFIX-NAME.

    Raises UserError if it is not writable, before the work begins.
    """
    folder = out or (path if path.is_dir() else Path("runs") / f"{prefix}-{name}")
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not (os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)):
        reason = "is not writable" if os.path.isdir(there) else "is not a folder"
        raise UserError(f"the results can't be written: {there} {reason}", str(folder), "choose another --out")
    return folder


def open_checkpoint(
    path: Path, ranks: "Ranks", model: str | None, weights: str | None, **settings: dict[str, Any]
) -> OpenedCheckpoint:
    """Load a checkpoint and prepare to run it as its run did; `settings`, by section, override the run's unless None.

    Raises UserError if it can't be loaded, for weights that are not finite, and for an invalid setting.
    """
    from pdvit.config import build
    from pdvit.data.images import BadImages
    from pdvit.data.loader import LoaderConfig
    from pdvit.data.preprocessing import Preprocessing
    from pdvit.engine.device import choose_device, set_up
    from pdvit.models.loading import load_model
    from pdvit.models.resolved_checkpoint import resolve_checkpoint
    from pdvit.models.segmentation.files import LoadedSegmenter, load_segmenter

    given = {name: {key: it for key, it in keys.items() if it is not None} for name, keys in settings.items()}
    flags = ("the command line", given)
    # A run is evaluated with its own TF32 setting, any other checkpoint without TF32.
    config = config_of(path, flags) or build(("defaults", {"run": {"tf32": False}}), flags)
    checkpoint = resolve_checkpoint(path, model, weights)
    loaded = load_model(checkpoint) if checkpoint.segment is None else load_segmenter(checkpoint)
    state = loaded.model.state_dict()
    broken = [name for name, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        names = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
        tip = "the checkpoint is broken: use an earlier one, or copy it again"
        raise UserError(f"{names} of its weights are infinite or not numbers", str(path), tip)
    device = choose_device(config.run.device, ranks.local_rank if ranks.world_size > 1 else None)
    set_up(device, config.run)
    loaded.model.to(device)
    timm_model = loaded.model.inside if isinstance(loaded, LoadedSegmenter) else loaded.model
    loader = LoaderConfig(
        batch_size=config.data.batch_size,
        seed=config.run.seed,
        workers=config.data.workers,
        device=device,
        preprocessing=Preprocessing.for_model(timm_model),
        eval_batch=config.data.micro_batch if "batch_size" not in given["data"] else None,
        rank=ranks.rank,
        processes=ranks.world_size,
        bad=BadImages(skip=config.data.on_bad_image == "skip"),
    )
    return OpenedCheckpoint(path, loaded, config, device, loader)
