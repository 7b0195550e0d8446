"""What can be trained: a task builds its model, and has batches, a forward pass, an objective and metrics.

Here are the numbers of a run as text. No torch: a sweep prints the summary of each of its cells.
"""

import math
from collections.abc import Mapping
from typing import Any


def describe_metrics(numbers: Mapping[str, Any], width: int = 0) -> str:
    """Return the metrics of a run or an evaluation: `accuracy 97.2%, loss 0.081`; fractions as wide as `width`."""
    fractions = {"miou": "mIoU", "accuracy": "accuracy", "accuracy_mean": "accuracy by class", "accuracy_top5": "top 5"}
    others = {"loss": "loss", "calibration_error": "calibration error"}
    texts = [f"{text} {numbers[name]:{width}.1%}" for name, text in fractions.items() if numbers.get(name) is not None]
    return ", ".join(texts + [f"{text} {numbers[name]:.3f}" for name, text in others.items() if name in numbers])


def describe_summary(summary: Mapping[str, Any]) -> str:
    """Return the closing metrics, the images that were left out, and P of the first and last tokens."""
    texts = {
        "in_windows": "images too large for a single pass, evaluated in windows",
        "bad_images": "images left out, which do not decode",
    }
    can_be_null = ("loss", "calibration_error", "similarity_first", "similarity_last")  # not finite: JSON has null
    summary = dict(summary) | {name: math.nan for name in can_be_null if summary.get(name, 0) is None}
    notes = "".join(f" ({text}: {summary[name]})" for name, text in texts.items() if summary.get(name))
    named = f"\nskipped, as they do not decode: {summary['skipped']}" if "skipped" in summary else ""
    first, last = summary["similarity_first"], summary["similarity_last"]
    similarity = f"first {first:.2f}, last {last:.2f} (0 orthogonal, 1 parallel)"
    return f"{summary['split']} {describe_metrics(summary)}{notes}\nP of the patches: {similarity}{named}"
