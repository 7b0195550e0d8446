"""The calls from Python and notebooks: `pdvit.load`, `analyze`, `explore`, `token_maps` and `train`."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from pdvit.analysis import Analysis, measure
from pdvit.analysis.explorer import MAX_IMAGES, Maps, bytes_per_model, read_maps
from pdvit.analysis.measure import BATCH_SIZE, WHERE, Names, batches, inference
from pdvit.analysis.metrics.patches import Patches
from pdvit.analysis.pages import explorer_page
from pdvit.config.load import build, read_toml, to_dict
from pdvit.config.schema import KEYS, Config
from pdvit.data.images import BadImages
from pdvit.data.loader import LoaderConfig, eval_batches
from pdvit.data.opening import ImageSet, open_images, sample_photographs
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.sources.split import ItemSplit
from pdvit.definitions import DEFAULT, LIMIT
from pdvit.engine.distributed import SINGLE_PROCESS
from pdvit.engine.terminal import RunConsole, Stopped, stop_on_signals
from pdvit.errors import UserError, closest
from pdvit.models.families import WRAPPERS, image_model_of
from pdvit.models.layers import find_layers, watch
from pdvit.models.resolved_checkpoint import ResolvedCheckpoint
from pdvit.workflows.analyze_run import RANDOM_IMAGES, measure_random, random_model
from pdvit.workflows.checkpoint import OpenedCheckpoint, open_checkpoint
from pdvit.workflows.console import count
from pdvit.workflows.runs import Run, start, train_to_end

Model = nn.Module | OpenedCheckpoint | str | Path


def load(
    checkpoint: str | Path, model: str | None = None, weights: str | None = None, device: str = "auto"
) -> OpenedCheckpoint:
    """Return a checkpoint as `pdvit analyze` opens it, with its timm `model`, `preprocessing` and `images`.

    `model` is timm's name if the file has none; `weights` is `raw` or `ema` if it has both. Raises UserError.
    """
    try:
        path = Path(os.path.expanduser(checkpoint))
    except TypeError as error:
        what = f"a {type(checkpoint).__name__} is not the name of a checkpoint"
        raise UserError(what, "load(checkpoint)", "pass a path or a name; pdvit.analyze takes models") from error
    return open_checkpoint(path, SINGLE_PROCESS, model, weights, {"run": {"device": device}}, backbone=True)


def analyze(
    model: Model,
    images: Any = None,
    metrics: Names = DEFAULT,
    name: str = "",
    blocks: str | Sequence[nn.Module] | None = None,
    prefix_tokens: int = 0,
    norm: str = "",
    on_bad_image: str | None = None,
) -> Analysis:
    """Measure the patch tokens of every layer of a vision transformer, in evaluation mode.

    Args:
        model: a checkpoint, a model of timm, transformers, torchvision or open_clip, or any other with `blocks`.
        images: normalised `(B, 3, H, W)`, or a loader of them (in tuples, or tables with `pixel_values`); for a timm
            model also images of Pillow, files, folders or a source. Unset: those of the checkpoint, or two photographs.
        metrics: names of groups of `pdvit.analysis.METRICS`; docs/metrics.md defines their columns.
        name: content of the `model` column.
        blocks: the blocks, as a list or the path of one, such as `encoder.layers`. The first tensor `(B, T, D)` that
            they return has the tokens.
        prefix_tokens: number of tokens in front of the patches (class, registers), with `blocks`.
        norm: path of the norm over all tokens after the last block, with `blocks`.
        on_bad_image: `error` or `skip`, for images that do not decode. Unset: the policy of a run for its own images,
            else `error`.

    Returns:
        An analysis; docs/metrics.md has the columns of its `table`. If a checkpoint reads its images, P of random
        weights is added.
    """
    layout: dict[str, Any] = {"blocks": blocks, "prefix_tokens": prefix_tokens, "norm": norm}
    network, images, loaded, loader = _open(model, images, on_bad_image)
    name = name or (loaded.name if loaded else "model")
    analysis = measure(network, _batches(images, loader), metrics, name, **layout)
    if loaded and loader and analysis.verdict:
        few = _batches(images.subsample(RANDOM_IMAGES), loader)
        analysis = analysis.with_random(measure_random(loaded, few, **layout))
    bad = loader.bad.found if loader else {}
    left_out = [f"{count(len(bad), 'image')} left out that can't be decoded"] if bad else []
    return replace(analysis, notes=[*(loaded.notes if loaded else ()), *left_out, *analysis.notes])


@dataclass(frozen=True)
class ExplorerPage:
    """The patch explorer as a page, which a notebook shows inline."""

    html: str

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{escape(self.html)}" width="100%" height="780" style="border: 0"></iframe>'


def explore(
    model: Model | Sequence[Model],
    images: Any = None,
    name: str | Sequence[str] = "",
    on_bad_image: str | None = None,
    **layout: Any,
) -> ExplorerPage:
    """Return the patch explorer for up to 8 images, with the arguments of `analyze`.

    Up to four models in a list, with names in another, are side by side on the same images: those of the first, if
    unset. Raises UserError.
    """
    models: Any = model if isinstance(model, list | tuple) else [model]
    names = ([name] if isinstance(name, str) else name) if name else len(models) * [""]
    if not models or len(names) != len(models):
        what, tip = f"{len(names)} names for {len(models)} models", "pass models, and one name for each or none"
        raise UserError(what, "explore(model, name=...)", tip)
    shown, max_bytes = list[Maps](), bytes_per_model(len(models))
    for number, (each, label) in enumerate(zip(models, names, strict=True), 1):
        network, images, loaded, loader = _open(each, images, on_bad_image, MAX_IMAGES)
        label = label or (loaded.name if loaded else "model" if len(models) == 1 else f"model {number}")
        if loader:
            on_bad_image, own = "skip" if loader.bad.skip else "error", loader.preprocessing  # the first model's policy
            pixels = [*images.pixels(own, loader.bad)]
            maps = read_maps(network, pixels, own.normalise, label, max_bytes, **layout)
            if loaded:
                random = read_maps(random_model(loaded), pixels, own.normalise, max_bytes=max_bytes, **layout)
                maps = replace(maps, random=random.similarity)
        else:
            images = list(islice(chain.from_iterable(batches(images, next(network.parameters()))), MAX_IMAGES))
            named = ((f"image {place}", image) for place, image in enumerate(images))
            images = [image[None] for image in images]
            maps = read_maps(network, named, lambda batch: batch, label, max_bytes, **layout)
            for at, image in enumerate(maps.images):  # normalised: shown from black to white
                maps.images[at] = (255 * (image - image.min()) / max(np.ptp(image), 1e-9)).astype(np.uint8)
        shown.append(maps)
    return ExplorerPage(explorer_page(shown, []))


def token_maps(model: Model, images: Any = None, on_bad_image: str | None = None, **layout: Any) -> dict[str, Tensor]:
    """Return the patch tokens of every layer as maps `(B, rows, columns, D)`, on the CPU; arguments as in `analyze`."""
    network, images, _, loader = _open(model, images, on_bad_image)
    network, places = find_layers(network, **layout, where=WHERE)
    maps: dict[str, list[Tensor]] = {layer: [] for layer in places}

    def visit(layer: str, tokens: Tensor) -> None:
        grid = Patches(tokens, batch.shape[-2:]).grid
        maps[layer].append(tokens.unflatten(1, grid).cpu())

    with watch(places, visit):
        for batch in batches(_batches(images, loader), next(network.parameters())):
            with inference(network, batch):
                network(batch)
    if not all(maps.values()):
        raise UserError("there are no images", WHERE, "pass at least one image")
    return {layer: torch.cat(parts) for layer, parts in maps.items()}


def train(config: Config | Mapping[str, Any] | str | Path | None = None, **settings: Any) -> Run:
    """Train as `pdvit train` does, and return the run, with its `path` and `summary`.

    `config` is a configuration, its table or TOML file; settings are called as the flags: `batch_size=64, cosine=1`.
    An interrupt stops the run, which then has no summary and can be resumed. Before training, it is KeyboardInterrupt.
    Raises UserError before anything is written, and RunFailed.
    """
    flags = {key.flags[0].partition("/")[0].lstrip("-").replace("-", "_"): key for key in KEYS.values() if key.flags}
    given: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        if name not in flags:
            raise UserError(f"there is no setting '{name}'", "pdvit.train(...)", closest(name, flags))
        given.setdefault(flags[name].section, {})[flags[name].name] = str(value) if isinstance(value, Path) else value
    base = read_toml(Path(config)) if isinstance(config, str | Path) else config or {}
    base = to_dict(base) if isinstance(base, Config) else base
    config = build(("config", base), ("pdvit.train(...)", given))
    if config.launch.launcher != "none":
        raise UserError("pdvit.train trains in this process", "launch.launcher", "submit a job with pdvit train")
    with stop_on_signals() as stop:
        forced = False if RunConsole().is_jupyter else None  # lines without a bar and colours, in one output of a cell
        console = RunConsole(force_jupyter=forced, force_terminal=forced, quiet=os.environ.get("RANK", "0") != "0")
        try:
            run = start(config, console, stop)
        except Stopped as error:
            raise KeyboardInterrupt("stopped before training began; no file was written") from error
        train_to_end(lambda *_: run, console, stop)
    return run


def _open(
    model: Any, images: Any, on_bad_image: str | None, limit: int = LIMIT
) -> tuple[nn.Module, Any, ResolvedCheckpoint | None, LoaderConfig | None]:
    """Return a model, images, its checkpoint, and a loader if the images are a set (of at most `limit`), no tensors."""
    opened: Any = load(model) if isinstance(model, str | Path) else model
    if not isinstance(opened, nn.Module | OpenedCheckpoint):
        tip = "pass one model, or a checkpoint; pdvit.explore takes a list of them"
        raise UserError(f"a {type(opened).__name__} is no model", WHERE, tip)
    checkpoint = opened if isinstance(opened, OpenedCheckpoint) else None
    skip = build((WHERE, {"data": {"on_bad_image": on_bad_image or "error"}})).data.on_bad_image == "skip"
    if images is None:
        images = checkpoint.images if checkpoint else sample_photographs()
        skip = checkpoint.loader.bad.skip if checkpoint and on_bad_image is None else skip
    listed: Any = [images] if isinstance(images, str | Path | Image) else images
    if isinstance(listed, Sequence) and listed and isinstance(listed[0], Image):
        items = tuple((image,) for image in listed)
        images = ImageSet("images", ItemSplit(items, [*range(len(items))], torch.zeros(len(items)), "images"))
    elif isinstance(listed, Sequence) and listed and isinstance(listed[0], str | Path):
        images = open_images([str(name) for name in listed])
    network: Any = checkpoint.model if checkpoint else opened
    loaded = checkpoint.loaded if checkpoint else None
    if not isinstance(images, ImageSet):
        return network, images, loaded, None
    bare, device = image_model_of(network, WRAPPERS), next(network.parameters()).device
    if not hasattr(bare, "pretrained_cfg"):
        what = f"a {type(network).__name__} does not say how its images are prepared"
        tip = "pass tensors, as of processor(images, return_tensors='pt') or, for torchvision, weights.transforms()"
        raise UserError(what, WHERE, tip)
    loader = LoaderConfig(BATCH_SIZE, 0, 0, device, Preprocessing.for_model(bare), bad=BadImages(skip))
    return network, images.subsample(limit), loaded, loader


def _batches(images: Any, loader: LoaderConfig | None) -> Any:
    """Return images as `measure` takes them: those of a set in batches of the model's input."""
    return (batch.images for batch in eval_batches(images.split, loader, shared=True)) if loader else images
