"""The numbers of a run as text. No torch: a sweep prints the summary of each of its cells."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BARS = "▁▂▃▄▅▆▇█"


def describe_metrics(numbers: Mapping[str, Any]) -> str:
    """Return the metrics among the numbers of a run or an evaluation, such as `accuracy 97.2%, loss 0.081`."""
    fractions = {"miou": "mIoU", "accuracy": "accuracy", "accuracy_mean": "accuracy by class", "accuracy_top5": "top 5"}
    others = {"loss": "loss", "calibration_error": "calibration error"}
    texts = [f"{text} {numbers[name]:.1%}" for name, text in fractions.items() if numbers.get(name) is not None]
    return ", ".join(texts + [f"{text} {numbers[name]:.3f}" for name, text in others.items() if name in numbers])


def describe_summary(summary: Mapping[str, Any]) -> str:
    """Return the closing metrics, the images that were left out, and P of the first and last tokens."""
    texts = {
        "in_windows": "images were too large for a single pass and were evaluated in windows",
        "bad_images": "images do not decode and are left out",
    }
    notes = "".join(f" ({summary[name]} {text})" for name, text in texts.items() if summary.get(name))
    named = f"\nskipped, as they do not decode: {summary['skipped']}" if "skipped" in summary else ""
    return (
        f"{summary['split']} {describe_metrics(summary)}{notes}; "
        f"P of the patches: first {summary['similarity_first']:.2f}, last {summary['similarity_last']:.2f} "
        f"(0 orthogonal, 1 parallel){named}"
    )


def usage(summary: Mapping[str, Any], run: Path) -> str:
    """Return how the weights in a run directory are used."""
    if summary.get("task") == "segmentation":
        return f"pdvit eval, predict and plot segmentation {run}; pictures: {run}/predictions"
    return f"timm: create_model('local-dir:{run}', pretrained=True)"


def describe_similarity(names: list[str], values: list[float], limit: float) -> str:
    """Return a line with P of every layer, and warnings if it is not finite, or above `limit` in the last layer."""
    bars = "".join(BARS[min(7, int(value * 8))] if value >= 0 else "?" for value in values)
    text = f"P {names[0]} {values[0]:.2f} {bars} {names[-1]} {values[-1]:.2f}"
    if broken := [name for name, value in zip(names, values, strict=True) if not math.isfinite(value)]:
        text += (
            f"\nwarning: tokens of {', '.join(broken)} are not finite, so P is undefined. Start a new run with a "
            f"lower --lr, or with --clip-grad 1"
        )
    if values[-1] > limit:
        text += (
            f"\nwarning: P of {names[-1]} is {values[-1]:.2f}: the patches are collapsing. Try a larger "
            f"--cosine, a lower --lr or a longer --warmup-epochs (--warn-similarity sets the threshold)"
        )
    return text
