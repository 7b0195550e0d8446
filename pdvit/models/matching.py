"""From the tensors of a file to the weights of a model: selected by prefix, converted to timm's names, compared."""

import sys
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from pdvit.errors import UserError
from pdvit.files import reading
from pdvit.models.families import family_of

# A prefix that begins with one of these leads to the weights of the last step.
RAW = frozenset({"state_dict", "model", "student"})
AVERAGES = frozenset({"momentum_encoder", "target_encoder"})  # of MoCo v3, of I-JEPA
# Another prefix is another set of weights if it leads to this fraction of the names after the best one.
RIVAL_FRACTION = 0.5
# timm's filters recognise their own layout by these names, which a backbone without a head lacks.
MARKS = ("head.fc.weight", "head.norm.weight")
POSITIONS = "pos_embed"
UNLABELLED = "unknown whether raw or ema"  # of weights
OTHER_MODEL = "the file has another architecture; give its --model, or its --depth, --width, --heads, --patch-size"
LISTED = 2  # names in an error or a note
# The decoder of a masked autoencoder, which is not a part of the model.
DECODER = ("decoder_", "decoder.", "mask_token")


@dataclass(frozen=True)
class SelectedWeights:
    """One set of weights in a file."""

    tensors: dict[str, Tensor]  # by their names after the prefix
    prefix: str  # with its dot; can be empty
    weights: str  # raw, ema or UNLABELLED
    rivals: tuple[str, ...] = ()  # prefixes of other sets of weights in the file
    outside: dict[str, Tensor] = field(default_factory=dict)  # under none of these prefixes, by their whole names


def select_weights(
    tensors: Mapping[str, Tensor], names: Collection[str], weights: str | None, where: str, declared: Any = None
) -> SelectedWeights:
    """Find the tensors of a model in those of a file, by the names of the model's tensors, under any prefix.

    A prefix can be anything in front of these names: `module.`, `_orig_mod.module.`, `teacher.backbone.`,
    `state_dict.model.`. One with `ema` or `teacher` in it leads to a moving average. `weights` is `raw` or `ema`; None
    prefers the moving average. `declared` is the file's own `raw` or `ema`, for a file with one set of weights and a
    prefix that does not show it. Raises UserError if the file has no such weights, or several sets of them.
    """
    known, counts = set(names), Counter[str]()
    for name in tensors:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in known:
                counts["".join(f"{part}." for part in parts[:start])] += 1
    best = max(counts.values(), default=0)
    if 2 * best < min(len(names), len(tensors)):  # perhaps another layout, which the model's own filter converts
        columns = zip(*(name.split(".")[:-1] for name in tensors), strict=False)
        common = takewhile(lambda parts: len(set(parts)) == 1, columns)
        counts, best = Counter({"".join(f"{parts[0]}." for parts in common): 1}), 1
    prefixes = [prefix for prefix, count in counts.items() if count >= max(1, RIVAL_FRACTION * best)]
    default = "raw" if len(prefixes) > 1 else declared if declared in ("raw", "ema") else UNLABELLED
    labels = {prefix: _label(prefix, default) for prefix in prefixes}
    label = weights or ("ema" if "ema" in labels.values() else None)
    fitting = [prefix for prefix in prefixes if label in (None, labels[prefix])]
    if not fitting:
        has = " and ".join(sorted({*labels.values()}))
        raise UserError(f"it holds weights that are {has}, and none that are {label}", where, "leave out --weights")
    if len(fitting) > 1:
        listed = ", ".join(f"'{prefix}'" for prefix in fitting)
        raise UserError(f"it holds several weights: under {listed}", where, "save one of them alone")
    (prefix,) = fitting
    rivals = tuple(sorted({*prefixes} - {prefix}))
    inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    under = (prefix, *rivals) if prefix else ("",)
    outside = {name: value for name, value in tensors.items() if not name.startswith(under)}
    return SelectedWeights(inside, prefix, labels[prefix], rivals, outside)


def _label(prefix: str, default: str) -> str:
    words = prefix.replace("_", ".").split(".")
    if "ema" in words or "teacher" in words or AVERAGES & {*prefix.split(".")}:
        return "ema"
    return "raw" if prefix.partition(".")[0] in RAW else default


@dataclass(frozen=True)
class StateDictMatch:
    """The tensors of a file that fit a model."""

    tensors: dict[str, Tensor]  # by the model's names, in its shapes
    missing: list[str]  # names of the model that the file lacks
    mismatched: list[str]  # names with another shape in the file
    unexpected: list[str]  # names of the file that the model lacks
    resampled: list[str] = field(default_factory=list)  # names of tensors that were resampled to another resolution

    def refuse_difference(self, where: str) -> None:
        """Raise UserError unless names and shapes are exactly those of the model."""
        shapes = [*self.mismatched, *self.resampled]
        if found := listed({"missing": self.missing, "unexpected": self.unexpected, "of another shape": shapes}):
            raise UserError(f"weights and model differ: {'; '.join(found)}", where, OTHER_MODEL)


def listed(groups: Mapping[str, Sequence[str]], shown: int = LISTED) -> list[str]:
    """Return a text for each group that is not empty: its number, and its first names."""
    found = []
    for group, names in groups.items():
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        found += [f"{group}: {len(names)} ({', '.join(names[:shown])}{more})"] if names else []
    return found


def classifiers_of(model: Any) -> tuple[str, ...]:
    """Return the names of a timm model's classifiers; a distilled model has two."""
    names = model.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def compare(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> StateDictMatch:
    """Compare names and shapes of tensors with those of a model's state; UserError for integers in place of floats."""
    both = tensors.keys() & expected.keys()
    floats = {name for name in both if expected[name].is_floating_point()}
    if odd := sorted(name for name in floats if not tensors[name].is_floating_point()):
        what = f"{len(odd)} weights are not floating-point numbers: {odd[0]} is {tensors[odd[0]].dtype}"
        raise UserError(what, where, "save the weights as floats: a quantised file lacks its scales here")
    mismatched = {name for name in both if tensors[name].shape != expected[name].shape}
    fitting = {name: tensors[name] for name in expected if name in both - mismatched}
    missing, unexpected = expected.keys() - both, tensors.keys() - both
    return StateDictMatch(fitting, sorted(missing), sorted(mismatched), sorted(unexpected))


def match_state_dict(tensors: Mapping[str, Tensor], model: nn.Module, where: str, source: nn.Module) -> StateDictMatch:
    """Compare a file's tensors with a model (on the meta device, perhaps), after timm's own filter for its family.

    The filter renames published layouts, and resamples positions and patch embeddings, of grids that it takes for
    squares; that of `source`, the model of the tensors, need not be one. Raises UserError if this fails.
    """
    masked = any(name.startswith(DECODER[:2]) for name in tensors)  # else a mask_token is the model's own
    encoder = {name: value for name, value in tensors.items() if not (masked and name.startswith(DECODER))}
    square = _resample_grid(encoder, source, model, where)
    match = compare(_filtered(square, model, where), model.state_dict(), where)
    resampled = {name for name, value in match.tensors.items() if _resampled(name, encoder, value)}
    return replace(match, resampled=sorted(resampled if square is encoder else {*resampled, POSITIONS}))


def _resample_grid(tensors: dict[str, Tensor], source: nn.Module, model: nn.Module, where: str) -> dict[str, Tensor]:
    """Resample the position embeddings of a grid that is not square to the grid of the model."""
    before, after = (getattr(getattr(net, "patch_embed", None), "grid_size", None) for net in (source, model))
    if not before or not after or before[0] == before[1] or tuple(before) == tuple(after):
        return tensors
    if family_of(source).plain and any("relative_position_bias_table" in name for name in tensors):
        what = f"its relative positions are those of {before[0]}x{before[1]} patches, and can't be resampled"
        raise UserError(what, where, "name a checkpoint of square images")
    positions = tensors.get(POSITIONS)
    if positions is None or positions.ndim != 3:
        return tensors
    prefix = positions.shape[1] - before[0] * before[1]
    return tensors | {POSITIONS: resample_abs_pos_embed(positions, after, before, prefix)}


def _filtered(tensors: dict[str, Tensor], model: Any, where: str) -> dict[str, Tensor]:
    """Apply the filter that stands beside the model's class in timm; three of its families have none.

    timm's factory calls it too, but counts nothing and stops at the first misfit.
    """
    checkpoint_filter: Any = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if checkpoint_filter is None:
        return tensors
    own = tensors.keys() <= model.state_dict().keys()
    marks = {name: Tensor() for name in MARKS if own and name not in tensors}
    scaled = any(name.endswith(".ls1.gamma") for name, _ in model.named_parameters())
    options = {"adapt_layer_scale": True} if scaled and any(".gamma_" in name for name in tensors) else {}  # DeiT-III
    what = f"its weights can't be converted to a {type(model).__name__}"
    with reading(where, OTHER_MODEL, what), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about timm's interpolation
        adapted: dict[str, Tensor] = checkpoint_filter(tensors | marks, model, **options)
    return {name: value for name, value in adapted.items() if name not in marks}


def _resampled(name: str, before: Mapping[str, Tensor], after: Tensor) -> bool:
    """Return whether the resolution changed, not only the layout: flattened, or DINOv2's class position cut off."""
    moved = not ("pos" in name or "patch_embed" in name)  # as the stages of Swin
    if moved or name not in before or before[name].numel() == after.numel():
        return False
    return not (name == POSITIONS and "register_tokens" in before and before[name].shape[1] - after.shape[1] == 1)
