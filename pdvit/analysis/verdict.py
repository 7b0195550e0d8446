"""The verdict on an analysis: whether the patches end alike, whether P climbs with depth, and what to try."""

import pandas as pd

# Our choices, not the paper's. From 0.5 on, the average pair of patches is nearer to parallel than to orthogonal.
COLLAPSED = 0.5
MIN_DIFFERENCE = 0.05  # the smallest difference in P that counts, between layers or from random weights
FEW_IMAGES = 16  # fewer are part of the verdict: Student's t makes the interval of 2 images ten times that of 16


def last_stage(table: pd.DataFrame, metric: str = "similarity") -> pd.DataFrame:
    """Return the rows of a metric by depth, of the last layers with one number of patches: all, in a plain model."""
    rows = table[table["metric"] == metric].sort_values("depth")
    start = rows.loc[rows["tokens"].diff().fillna(0) != 0, "depth"].max()  # NaN if the number never changes
    stage: pd.DataFrame = rows[~(rows["depth"] < start)]
    return stage


def onset(rows: pd.DataFrame, threshold: float = COLLAPSED) -> str | None:
    """Return the first layer from which P stays at or above a threshold up to the last; None if the last is below."""
    stays = rows["layer"][rows["mean"][::-1].ge(threshold).cummin()[::-1]]
    return None if stays.empty else str(stays.iloc[0])


def verdict(table: pd.DataFrame, analyze: str, train: str) -> tuple[str, str]:
    """Return two statements on two lines, each beside random weights, and what to try.

    The first is whether the patches are alike at the end, the second whether P climbs with depth; a third line says
    that few images were measured. `analyze` and `train` are the commands that measure the checkpoint again and that
    reduce P; an advice ends with a line of one.
    """
    rows, random = last_stage(table), last_stage(table, "similarity_random")
    last, value, compared = rows["layer"].iloc[-1], float(rows["mean"].iloc[-1]), None
    if not random.empty:  # a difference counts from 0.05 on, and only if the two 95 % intervals do not overlap
        difference = value - float(random["mean"].iloc[-1])
        width = sum(float(found["ci95"].fillna(0).iloc[-1]) for found in (rows, random))
        compared = 0 if abs(difference) < max(MIN_DIFFERENCE, width) else 1 if difference > 0 else -1
    if value == 0:  # tokens that have a direction are never all orthogonal to the last bit
        metrics = "--metrics similarity,norms"
        tip = f"measure the lengths of the patches, since the checkpoint may be broken:\n{analyze} {metrics}"
        return f"no verdict: P is exactly 0 at {last}, as if all patches were zero", f"to try: {tip}"
    start, high = onset(rows, float(rows["mean"].min()) + MIN_DIFFERENCE), onset(rows)
    rise, random_rise = (float((found["mean"].tail(1) - found["mean"].min()).sum()) for found in (rows, random))
    change = 0 if abs(rise - random_rise) < MIN_DIFFERENCE else 1 if rise > random_rise else -1
    if high is None and compared == 1:
        tip = f"if single patches matter, as in segmentation, reduce P:\n{train}"
    elif high is None and table["metric"].isin(["effective_rank", "attention_entropy"]).any():
        tip = "read the other metrics, since P gives no reason to change the model"
    elif high is None:
        metrics = "--metrics similarity,norms,rank,attention"
        tip = f"look for other problems, since P gives no reason to change the model:\n{analyze} {metrics}"
    elif change == 1 or compared == 1:
        # random weights leave the patches of plain images alike; a further climb means that they were apart before
        tip = f"reduce P, and analyze again:\n{train}"
    elif compared is None:
        tip = f"compare with random weights, whose patches may be as alike:\n{analyze}"
    else:
        tip = f"use more varied --images, since random weights leave these as alike; or reduce P:\n{train}"
    blocks = table[table["layer"] != "norm"]  # a final norm would hide outliers
    lasts = [last_stage(blocks, f"similarity{name}")["mean"].tail(1) for name in ("", "_without_outliers")]
    part = float(lasts[0].sum() - lasts[1].sum()) if len(lasts[1]) else 0.0
    if high is not None and part >= MIN_DIFFERENCE:
        tip = f"a model with register tokens, since patches of outlying length make up {part:.2f} of P"
    stage = "" if len(rows) == (table["metric"] == "similarity").sum() else "in the last stage, "
    since = {None: "not alike at the end", rows["layer"].iloc[0]: "alike at every layer", last: "alike at the end"}
    of_level, of_climb = " (not compared with random weights)", ""
    if compared is not None:
        levels = ("about as high" if abs(difference) < MIN_DIFFERENCE else "the intervals overlap", "lower", "higher")
        of_level = f" (random weights: {random['mean'].iloc[-1]:.3f}, {levels[compared]})"
        of_climb = f" (random weights: {random_rise:.3f}, {('about as much', 'less', 'more')[change]})"
    level = f"{stage}the patches are {since.get(high, f'alike from {high} to the end')}: P is {value:.3f} at {last}"
    course = f"climbs from {start} on" if start else "does not climb"
    course = f"{stage}P {course}: it ends {rise:.3f} above its minimum"
    few, half = int(rows["images"].iloc[-1]), float(rows["ci95"].iloc[-1])
    measured = "1 image was" if few == 1 else f"{few} images were"
    interval = "it has no interval" if few == 1 else f"the 95 % interval of P is ± {half:.3f}"
    note = f"\nonly {measured} measured, so others may differ: {interval}" if few < FEW_IMAGES else ""
    return f"{level}{of_level}\n{course}{of_climb}{note}", f"to try: {tip}"
