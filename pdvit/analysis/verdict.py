"""The verdict on an analysis: whether the patches collapse, from which layer on, and what to try."""

import shlex
from typing import Any

import pandas as pd

from pdvit.analysis.measure import Analysis
from pdvit.analysis.metrics import DEFINITIONS

# Our choices, not the paper's. From 0.5 on, the average pair of patches is nearer to parallel than to orthogonal.
COLLAPSED = 0.5
# The smallest difference in P that counts, between layers or from random weights.
MIN_DIFFERENCE = 0.05
# Published values by timm's name without tag and number of blocks; other papers show figures only.
PUBLISHED = {
    ("deit_base_patch16_224", 24): "P above 0.7 at the last layer (arXiv 2104.12753 v3, as told by a later article; "
    "those weights are not public)",
    ("vit_base_patch32_224", 12): "P of 0.54 at block 1, lowest (0.21) at block 7, 0.22 at block 12, before the norm "
    "(one reader of the same paper, one image, timm's weights of that time: ChengyueGongR/PatchVisionTransformer, "
    "issue 3)",
}


def last_stage(table: pd.DataFrame, metric: str = "similarity") -> pd.DataFrame:
    """Return the rows of a metric by depth, of the last layers that have the same number of patches.

    Those are all layers of a plain model. P of other grids and widths is another scale.
    """
    rows = table[table["metric"] == metric].sort_values("depth")
    other = rows.loc[rows["tokens"] != rows["tokens"].iloc[-1], "depth"] if len(rows) else rows["depth"]
    return rows[rows["depth"] > other.max()] if len(other) else rows


def onset(rows: pd.DataFrame, threshold: float = COLLAPSED) -> str | None:
    """Return the first layer from which P stays at or above a threshold up to the last; None if the last is below."""
    layer = None
    for name, value in zip(rows["layer"][::-1], rows["mean"][::-1], strict=True):
        if value < threshold:
            break
        layer = str(name)
    return layer


def climb(rows: pd.DataFrame) -> str | None:
    """Return the first layer from which P stays 0.05 or more above its minimum; None if P does not climb."""
    return onset(rows, float(rows["mean"].min()) + MIN_DIFFERENCE)


def climbs_beyond_random(table: pd.DataFrame) -> bool:
    """Return whether P climbs by 0.05 more than that of random weights; without those, whether it climbs."""
    rises = [
        float(rows["mean"].iloc[-1] - rows["mean"].min()) if len(rows) else 0.0
        for rows in (last_stage(table), last_stage(table, "similarity_random"))
    ]
    return climb(last_stage(table)) is not None and rises[0] - rises[1] >= MIN_DIFFERENCE


def against_random(table: pd.DataFrame) -> int | None:
    """Return 1, 0 or -1 if the last layer's P is above, about or below that of random weights; None without them.

    A difference counts from 0.05 on, and only if the two 95 % intervals do not overlap.
    """
    ours, random = (table[table["metric"] == name].sort_values("depth") for name in ("similarity", "similarity_random"))
    if random.empty:
        return None
    difference = float(ours["mean"].iloc[-1] - random["mean"].iloc[-1])
    widths = [float(rows["ci95"].fillna(0).iloc[-1]) for rows in (ours, random)]
    return 0 if abs(difference) < max(MIN_DIFFERENCE, sum(widths)) else 1 if difference > 0 else -1


def verdict(table: pd.DataFrame) -> str:
    """Return one sentence: whether the patches collapse, compared with random weights, and where P starts to climb."""
    rows, compared = last_stage(table), against_random(table)
    last, value = rows["layer"].iloc[-1], float(rows["mean"].iloc[-1])
    if value == 0:  # tokens that have a direction are never all orthogonal to the last bit
        return f"no verdict: P is exactly 0 at {last}, as of patches that are zero"
    random = table.loc[table["metric"] == "similarity_random"].sort_values("depth")["mean"]
    beside = "" if random.empty else f" (random weights on the same images: {random.iloc[-1]:.3f})"
    start, high = climb(rows), onset(rows)
    course = f"climbs from {start} on" if start else "does not climb with depth"
    if high is not None:
        since = "from the start" if high == rows["layer"].iloc[0] else f"from {high} on"
        course += f", is at or above {COLLAPSED} {since}"
    stage = "" if len(rows) == len(table[table["metric"] == "similarity"]) else " in the last stage"
    if value < COLLAPSED:
        head = "no collapse, but patches more alike than with random weights" if compared == 1 else "no collapse"
    elif climbs_beyond_random(table) or compared == 1:
        # random weights leave the patches of plain images alike; a further climb means that they were apart before
        head = "the patches collapse"
    elif compared is None:
        head = "the patches are alike (not compared with random weights)"
    else:
        head = f"the patches are alike, but {'no more' if compared == 0 else 'less'} than with random weights"
    return f"{head}: P{stage} {course}, and is {value:.3f} at {last}{beside}"


def advice(table: pd.DataFrame, checkpoint: str) -> str:
    """Return one sentence: what to try."""
    value, compared = float(last_stage(table)["mean"].iloc[-1]), against_random(table)
    path = shlex.quote(checkpoint)
    train = f"pdvit finetune {path} --data SOURCE --cosine 1"
    if value == 0:
        return "to try: --metrics norms, which shows how long the patches are; the checkpoint may be broken"
    if value < COLLAPSED:
        if compared == 1:
            return f"to try where single patches matter, as in segmentation: {train}"
        return "to try: nothing against collapse; --metrics rank,norms,attention show other ways to fail"
    if part := _part_of_outliers(table):
        return f"to try: a model with register tokens, since patches of outlying length make up {part:.2f} of P"
    if climbs_beyond_random(table) or compared == 1:
        return f"to try: {train}, which trains P down, and analyze again"
    if compared is None:
        return f"to try: pdvit analyze {path} to the end, since untrained patches may be as alike"
    return f"to try: other --images, which may be more varied, or {train}"


def _part_of_outliers(table: pd.DataFrame) -> float:
    """Return how much P falls at the last block without its outliers, 0 below 0.05; a final norm would hide them."""
    rows = [last_stage(table, name) for name in ("similarity", "similarity_without_outliers")]
    blocks = [found[found["layer"] != "norm"]["mean"] for found in rows]
    if any(found.empty for found in blocks):
        return 0.0
    part = float(blocks[0].iloc[-1] - blocks[1].iloc[-1])
    return part if part >= MIN_DIFFERENCE else 0.0


def describe(
    analysis: Analysis,
    *,
    checkpoint: str,
    architecture: str,
    weights: str,
    images: str,
    prefix: int,
    device: str,
    stopped: str | None = None,
) -> dict[str, Any]:
    """Return the content of analysis.json: the exact conditions of the measurement, and the verdict.

    `checkpoint` is the path on the command line, `prefix` the number of dropped prefix tokens, and `stopped` the reason
    why the measurement ended before the last image, if it did.
    """
    table = analysis.table
    last = "the final norm" if analysis.layers[-1] == "norm" else "the last block (no final norm over patches)"
    stages = "; grid and width change between stages" if table["tokens"].nunique() > 1 else ""
    has_p = bool((table["metric"] == "similarity").any())
    blocks = sum(name.startswith("block") for name in analysis.layers)
    return {
        "model": str(table["model"].iloc[0]),
        "checkpoint": checkpoint,
        "weights": weights,
        "images": images,
        "images_measured": analysis.images,
        "patch_tokens": int(table["tokens"].iloc[-1]),
        "prefix_tokens_dropped": prefix,
        "layers": "embed is the input of block 1 (with position); blocks are read before the final norm; the last row "
        f"is {last}{stages}",
        "metrics": {name: DEFINITIONS[name].text for name in dict.fromkeys(table["metric"])},
        "notes": analysis.notes if has_p else [*analysis.notes, "no verdict, which needs P: --metrics similarity"],
        "stopped": stopped,
        "spread": "std and ci95 (half-width, Student's t) over images",
        "precision": "float32",
        "device": device,
        "verdict": verdict(table) if has_p else None,
        "advice": advice(table, checkpoint) if has_p else None,
        "published": PUBLISHED.get((architecture.partition(".")[0], blocks)),
    }
