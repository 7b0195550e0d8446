"""What the commands that use a trained checkpoint have in common: how it is opened, and where results go."""

import os
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pdvit.config.schema import Config
from pdvit.errors import UserError

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.text import Text

    from pdvit.data.loader import LoaderConfig
    from pdvit.engine.distributed import Ranks
    from pdvit.models.loading import LoadedModel
    from pdvit.models.segmentation.files import LoadedSegmenter

Model = Annotated[str | None, typer.Option("--model", help="timm's name of the model, where a file does not say it.")]
Weights = Annotated[str | None, typer.Option("--weights", help="raw or ema, where a file holds both; unset: ema.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[str | None, typer.Option("--precision", help="fp32, bf16 or fp16; unset: the run's, else fp32.")]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", "-b", min=1, help="Images per forward pass; unset: the run's, else 32.")
]
OnBadImage = Annotated[
    str | None, typer.Option("--on-bad-image", metavar="error|skip", help="What to do where an image does not decode.")
]
Workers = Annotated[
    int | None, typer.Option("--workers", "-j", min=0, help="Processes that decode image files; unset: the run's.")
]


# What has so many images.
Part = TypeVar("Part", bound=Sized)


@dataclass(frozen=True)
class Opened:
    """A checkpoint that is ready to run: its model on the device, the run's configuration, how images are loaded."""

    loaded: "LoadedModel | LoadedSegmenter"
    config: Config
    device: "torch.device"
    loading: "LoaderConfig"

    @property
    def labels_pixels(self) -> bool:
        """Whether the checkpoint is one of segmentation."""
        from pdvit.models.segmentation.files import LoadedSegmenter

        return isinstance(self.loaded, LoadedSegmenter)


def config_of(path: Path, *layers: tuple[str, dict[str, Any]]) -> Config | None:
    """Return the configuration of a run, with more layers over it; None where the path is no run directory."""
    from pdvit.config import build, read_toml

    recipe = path / "run.toml"
    if not (path.is_dir() and recipe.is_file()):
        return None
    return build((str(recipe), read_toml(recipe)), *layers)


def results_folder(path: Path, out: Path | None, prefix: str, name: str) -> Path:
    """Return where the results of a checkpoint go: `out`, the checkpoint's own folder, or runs/PREFIX-NAME.

    Raises UserError where nothing can be written there, so that nobody learns it after the work.
    """
    folder = out or (path if path.is_dir() else Path("runs") / f"{prefix}-{name}")
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not (os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)):
        reason = "is not writable" if os.path.isdir(there) else "is not a folder"
        raise UserError(f"the results can't be written: {there} {reason}", str(folder), "choose another --out")
    return folder


def open_checkpoint(
    path: Path,
    model: str | None,
    ranks: "Ranks",
    *,
    device: str,
    precision: str | None,
    weights: str | None,
    batch_size: int | None,
    workers: int | None,
    source: str | None = None,
    on_bad_image: str | None = None,
) -> Opened:
    """Load a checkpoint and prepare to run it as its run did, except for what is given.

    Raises UserError where it can't be loaded, where weights are not finite, and for a bad setting.
    """
    from pdvit.config import build
    from pdvit.data.bad_images import BadImages
    from pdvit.data.loader import LoaderConfig
    from pdvit.data.preprocessing import Preprocessing
    from pdvit.engine.device import choose_device, set_up
    from pdvit.models.segmentation.files import LoadedSegmenter

    given: dict[str, dict[str, Any]] = {
        "data": {"source": source, "batch_size": batch_size, "workers": workers, "on_bad_image": on_bad_image},
        "run": {"device": device, "precision": precision},
    }
    set_keys = {name: {key: it for key, it in keys.items() if it is not None} for name, keys in given.items()}
    flags = ("the command line", set_keys)
    measured = ("measurements", {"run": {"tf32": False}})  # a run is measured as it measured itself
    config = config_of(path, flags) or build(measured, flags)
    loaded = _load(path, model, weights)
    check_finite(loaded, path)
    place = choose_device(config.run.device, ranks.local_rank if ranks.world_size > 1 else None)
    set_up(place, config.run)
    loaded.model.to(place)
    loading = LoaderConfig(
        batch_size=config.data.batch_size,
        seed=config.run.seed,
        workers=config.data.workers,
        device=place,
        preprocessing=Preprocessing.for_model(
            loaded.model.inside if isinstance(loaded, LoadedSegmenter) else loaded.model
        ),
        eval_batch=config.data.micro_batch if batch_size is None else None,
        rank=ranks.rank,
        processes=ranks.world_size,
        bad=BadImages(skip=config.data.on_bad_image == "skip"),
    )
    return Opened(loaded, config, place, loading)


def _load(path: Path, model: str | None, weights: str | None) -> "LoadedModel | LoadedSegmenter":
    """Load a checkpoint of either task."""
    from pdvit.models.loading import load_model
    from pdvit.models.resolved_checkpoint import resolve_checkpoint
    from pdvit.models.segmentation.files import load_segmenter

    checkpoint = resolve_checkpoint(path, model, weights)
    return load_model(checkpoint) if checkpoint.segment is None else load_segmenter(checkpoint)


def check_finite(loaded: "LoadedModel | LoadedSegmenter", path: Path) -> None:
    """Raise UserError where weights or running statistics are infinite or not numbers."""
    state = loaded.model.state_dict()
    broken = [name for name, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        what = f"{', '.join(broken[:3])}{more} of its weights are infinite or not numbers"
        raise UserError(what, str(path), "the checkpoint is broken: take an earlier one, or copy it again")


def broken_logits(images: str, path: Path, precision: str) -> UserError:
    """Return the error of a model whose sound weights gave logits of some images that are not finite."""
    tip = "the checkpoint is broken, or it is of another model"
    if precision != "fp32":
        tip = f"{precision} may be too narrow for it: try --precision fp32"
    what = f"the model's logits are infinite or not numbers for {images}"
    return UserError(what, str(path), tip)


def with_progress(batches: "Iterable[Part]", total: int, console: "Console", what: str) -> "Iterator[Part]":
    """Yield the batches, and show how many images are done, their rate and the time left."""
    from pdvit.engine.terminal import Display

    done, begun = 0, monotonic()
    with Display(console, total, unit="image") as display:
        for batch in batches:
            yield batch
            done += len(batch)
            display.show(done, what, done / max(monotonic() - begun, 1e-9), {})


def cell(text: str) -> "Text":
    """Return a name as a cell of a table: on one line, and as it is, whatever a terminal or markup would make of it."""
    from rich.text import Text

    from pdvit.data.sources.split import printable

    return Text(printable(text))
