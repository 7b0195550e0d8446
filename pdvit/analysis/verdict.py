"""Do the patches collapse, since which layer, and what to try: in two sentences."""

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

# Our choices, not the paper's. From 0.5 on the average pair of patches is nearer to parallel than to orthogonal.
COLLAPSED = 0.5
# The least difference in P that counts, between layers or from random weights.
LEAST = 0.05


def last_stage(table: "pd.DataFrame", metric: str = "similarity") -> "pd.DataFrame":
    """Return the rows of a metric by depth, of the layers at the end that share the last one's number of patches.

    P of other grids and widths is another scale. Of a plain model these are all layers.
    """
    rows = table[table["metric"] == metric].sort_values("depth")
    other = rows.loc[rows["tokens"] != rows["tokens"].iloc[-1], "depth"] if len(rows) else rows["depth"]
    return rows[rows["depth"] > other.max()] if len(other) else rows


def onset(table: "pd.DataFrame") -> str | None:
    """Return the first layer from which P stays at or above 0.5 up to the last; None where the last is below."""
    return _from(last_stage(table), COLLAPSED)


def climb(table: "pd.DataFrame") -> str | None:
    """Return the layer at which P starts to climb towards its value at the last; None where it does not.

    The first layer from which P stays 0.05 or more above its lowest.
    """
    rows = last_stage(table)
    return _from(rows, float(rows["mean"].min()) + LEAST)


def climbs_itself(table: "pd.DataFrame") -> bool:
    """Tell whether P climbs, and by 0.05 more than that of random weights does over the same layers.

    Without random weights any climb counts.
    """
    rises = [
        float(rows["mean"].iloc[-1] - rows["mean"].min()) if len(rows) else 0.0
        for rows in (last_stage(table), last_stage(table, "similarity_random"))
    ]
    return climb(table) is not None and rises[0] - rises[1] >= LEAST


def against_random(table: "pd.DataFrame") -> int | None:
    """Return 1, 0 or -1 where the last layer's P is above, about or below that of random weights; None without them.

    A difference counts from 0.05 on, and where the two 95 % intervals do not overlap.
    """
    ours, random = (table[table["metric"] == name].sort_values("depth") for name in ("similarity", "similarity_random"))
    if random.empty:
        return None
    apart = float(ours["mean"].iloc[-1] - random["mean"].iloc[-1])
    widths = [float(rows["ci95"].fillna(0).iloc[-1]) for rows in (ours, random)]
    return 0 if abs(apart) < max(LEAST, sum(widths)) else 1 if apart > 0 else -1


def verdict(table: "pd.DataFrame") -> str:
    """Say in one sentence whether the patches collapse, compared with random weights, and where P starts to climb."""
    rows, compared = last_stage(table), against_random(table)
    last, value = rows["layer"].iloc[-1], float(rows["mean"].iloc[-1])
    if value == 0:  # tokens that have a direction are never all orthogonal to the last bit
        return f"no verdict: P is exactly 0 at {last}, as of patches that are zero"
    random = table.loc[table["metric"] == "similarity_random"].sort_values("depth")["mean"]
    beside = "" if random.empty else f" (random weights on the same images: {random.iloc[-1]:.3f})"
    start, high = climb(table), onset(table)
    course = f"climbs from {start} on" if start else "does not climb with depth"
    if high is not None:
        since = "from the start" if high == rows["layer"].iloc[0] else f"from {high} on"
        course += f", is at or above {COLLAPSED} {since}"
    stage = "" if len(rows) == len(table[table["metric"] == "similarity"]) else " in the last stage"
    return f"{_head(value, compared, climbs_itself(table))}: P{stage} {course}, and is {value:.3f} at {last}{beside}"


def _head(value: float, compared: int | None, climbs: bool) -> str:
    alike = "than with random weights"
    if value < COLLAPSED:
        return f"no collapse, but patches more alike {alike}" if compared == 1 else "no collapse"
    # random weights leave the patches of plain images alike: what climbs more than they do was apart before
    if climbs or compared == 1:
        return "the patches collapse"
    if compared is None:
        return "the patches are alike (not compared with random weights)"
    return f"the patches are alike, but {'no more' if compared == 0 else 'less'} {alike}"


def advice(table: "pd.DataFrame", checkpoint: str) -> str:
    """Say in one sentence what to try."""
    value, compared = float(last_stage(table)["mean"].iloc[-1]), against_random(table)
    train = f"pdvit finetune {shlex.quote(checkpoint)} --data SOURCE --cosine 1"
    if value == 0:
        return "to try: --metrics norms, which shows how long the patches are; the checkpoint may be broken"
    if value >= COLLAPSED and (share := _of_outliers(table)):
        return f"to try: a model with register tokens, since patches of outlying length make up {share:.2f} of P"
    if value >= COLLAPSED and (climbs_itself(table) or compared == 1):
        return f"to try: {train}, which trains P down, and analyze again"
    if value >= COLLAPSED and compared is None:
        return f"to try: pdvit analyze {shlex.quote(checkpoint)} to the end, since untrained patches may be as alike"
    if value >= COLLAPSED:
        return f"to try: other --images, which may be more varied, or {train}"
    if compared == 1:
        return f"to try where single patches matter, as in segmentation: {train}"
    return "to try: nothing against collapse; --metrics rank,norms,attention show other ways to fail"


def _from(rows: "pd.DataFrame", least: float) -> str | None:
    """Return the first layer from which the values stay at or above `least` up to the last."""
    layer = None
    for name, value in zip(rows["layer"][::-1], rows["mean"][::-1], strict=True):
        if value < least:
            break
        layer = str(name)
    return layer


def _of_outliers(table: "pd.DataFrame") -> float:
    """Return how much of P at the last block goes with its outliers, 0 below 0.05; a final norm would hide them."""
    rows = [last_stage(table, name) for name in ("similarity", "similarity_without_outliers")]
    blocks = [found[found["layer"] != "norm"]["mean"] for found in rows]
    if any(found.empty for found in blocks):
        return 0.0
    share = float(blocks[0].iloc[-1] - blocks[1].iloc[-1])
    return share if share >= LEAST else 0.0
