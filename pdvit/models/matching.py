"""Tensors of a file to the weights of a model: found under any prefix, brought to timm's names, counted."""

import sys
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pdvit.errors import UserError

# Parts of a prefix that say that weights are those of the last step, where they stand first.
RAW = frozenset({"state_dict", "model", "student"})
# A prefix counts as another set of weights where it leads to this share of the names that the best one leads to.
RIVAL = 0.5
# By what filters of timm know its own names, which a backbone without a head lacks.
MARKS = ("head.fc.weight", "head.norm.weight")
# Parts of a masked autoencoder that its encoder leaves behind.
DECODER = ("decoder_", "decoder.", "mask_token")


@dataclass(frozen=True)
class Chosen:
    """One set of weights in a file.

    Attributes:
        tensors: by their names behind the prefix.
        prefix: what stood before the names, with its dot.
        weights: `raw`, `ema`, or `unknown` where nothing says so.
        others: prefixes of further sets of weights in the file.
        outside: tensors that stand under no such prefix, by their whole names.
    """

    tensors: dict[str, Tensor]
    prefix: str
    weights: str
    others: tuple[str, ...] = ()
    outside: dict[str, Tensor] = field(default_factory=dict)


def choose(
    tensors: Mapping[str, Tensor], names: Collection[str], weights: str | None, where: str, told: str = "unknown"
) -> Chosen:
    """Find the weights with these names in a file, under whatever prefixes wrappers left.

    A prefix is what stands before the names of the model, whatever its words: `module.`, `_orig_mod.module.`,
    `teacher.backbone.`, `state_dict.model.`. Those with `ema` or `teacher` in them lead to a moving average.

    Args:
        tensors: all of the file.
        names: of the model's own tensors.
        weights: `raw` or `ema`; None takes the moving average where there is one.
        where: how an error names the file.
        told: which weights the file says it holds; it counts where they stand alone, under a prefix that says nothing.

    Raises:
        UserError: the file has no such weights, or several of the same kind.
    """
    found: dict[str, int] = _prefixes(tensors, names)
    most = max(found.values(), default=0)
    if 2 * most < min(len(names), len(tensors)):  # perhaps another layout, which the model's own filter knows
        found = {_common_prefix(tensors): most}
        most = 0
    rivals = [prefix for prefix, count in found.items() if count >= max(1, RIVAL * most)] or list(found)
    kinds = {prefix: _kind(prefix, told if len(rivals) == 1 else "raw") for prefix in rivals}
    wanted = weights or ("ema" if "ema" in kinds.values() else None)
    fitting = [prefix for prefix, kind in kinds.items() if wanted in (None, kind)]
    if not fitting:
        has = " and ".join(sorted(set(kinds.values()) - {"unknown"})) or "weights that it does not call raw or ema"
        raise UserError(f"it holds {has}, not {wanted}", where, "leave out --weights")
    if len(fitting) > 1:
        listed = ", ".join(f"'{prefix}'" for prefix in fitting)
        raise UserError(f"it holds several weights: under {listed}", where, "save the ones you mean alone")
    prefix = fitting[0]
    inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    others = tuple(sorted(set(rivals) - {prefix}))
    known = (prefix, *others) if prefix else ("",)
    outside = {name: value for name, value in tensors.items() if not name.startswith(known)}
    return Chosen(inside, prefix, kinds[prefix], others, outside)


def _prefixes(tensors: Mapping[str, Tensor], names: Collection[str]) -> Counter[str]:
    """Count the names of the model behind each prefix."""
    known, found = set(names), Counter[str]()
    for name in tensors:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in known:
                found["".join(f"{part}." for part in parts[:start])] += 1
    return found


def _common_prefix(tensors: Mapping[str, Tensor]) -> str:
    """Return the parts that all names begin with."""
    common: list[str] | None = None
    for name in tensors:
        parts = name.split(".")[:-1]
        if common is None:
            common = parts
        same = [a == b for a, b in zip(common, parts, strict=False)]
        common = common[: [*same, False].index(False)]
    return "".join(f"{part}." for part in common or [])


def _kind(prefix: str, otherwise: str) -> str:
    parts = [word for part in prefix.split(".") for word in part.split("_")]
    if "ema" in parts or "teacher" in parts:
        return "ema"
    return "raw" if prefix.partition(".")[0] in RAW else otherwise


@dataclass(frozen=True)
class Match:
    """What of a file fits a model.

    Attributes:
        tensors: by the model's names, in its shapes.
        missing: tensors of the model that the file has not.
        misshapen: those that it has in another shape.
        left: tensors of the file that the model has no place for.
        resampled: those brought to another resolution.
    """

    tensors: dict[str, Tensor]
    missing: list[str]
    misshapen: list[str]
    left: list[str]
    resampled: list[str]

    def without(self, names: Collection[str]) -> "Match":
        """Return it as if the file had not these tensors."""
        kept = {name: value for name, value in self.tensors.items() if name not in names}
        missing = sorted({*self.missing, *(name for name in names if name in self.tensors)})
        return Match(kept, missing, self.misshapen, self.left, [name for name in self.resampled if name in kept])


def match(tensors: Mapping[str, Tensor], model: nn.Module, where: str) -> Match:
    """Compare a file's tensors with a model, after timm's own filter for its family.

    The filter renames the layouts in which the model was published, and resamples position embeddings, tables of
    relative positions and patch embeddings. `model` may be on the meta device; it is not changed.

    Raises:
        UserError: the filter can't make sense of them.
    """
    encoder = dict(tensors)
    if any(name.startswith(DECODER[:2]) for name in tensors):
        encoder = {name: value for name, value in tensors.items() if not name.startswith(DECODER)}
    adapted = _filtered(encoder, model, where)
    expected = model.state_dict()
    both = set(adapted) & set(expected)
    misshapen = {name for name in both if adapted[name].shape != expected[name].shape}
    return Match(
        {name: adapted[name] for name in expected if name in both - misshapen},
        sorted(set(expected) - both),
        sorted(misshapen),
        sorted(set(adapted) - both),
        sorted(name for name in both - misshapen if _resampled(name, encoder, adapted[name])),
    )


def _filtered(tensors: dict[str, Tensor], model: Any, where: str) -> dict[str, Tensor]:
    """Apply the filter that stands beside the model's class in timm; three of its families have none.

    timm calls it inside its factory, which neither counts what fits nor goes on where something does not.
    """
    rules: Any = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if rules is None:
        return tensors
    own = tensors.keys() <= model.state_dict().keys()
    marks = {name: Tensor() for name in MARKS if own and name not in tensors}
    scaled = any(name.endswith(".ls1.gamma") for name, _ in model.named_parameters())
    published = {"adapt_layer_scale": True} if scaled and any(".gamma_" in name for name in tensors) else {}  # DeiT-III
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how timm interpolates
            adapted: dict[str, Tensor] = rules(tensors | marks, model, **published)
    except Exception as error:  # odd names and shapes fail anywhere in there
        raise UserError(
            f"its weights can't be brought to a {type(model).__name__}: {type(error).__name__}: {error}",
            where,
            "the file belongs to another architecture; name the right one with --model",
        ) from error
    return {name: value for name, value in adapted.items() if name not in marks}


def _resampled(name: str, before: Mapping[str, Tensor], after: Tensor) -> bool:
    """Tell a change of resolution from one of form: flattened, or (DINOv2) the class token's position split off."""
    depends = "pos" in name or "patch_embed" in name  # others that differ by name stood elsewhere: stages of Swin
    if not depends or name not in before or before[name].numel() == after.numel():
        return False
    split_off = name == "pos_embed" and "register_tokens" in before and before[name].shape[1] - after.shape[1] == 1
    return not split_off
