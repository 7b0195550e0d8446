"""Where collapse sets in, in one sentence."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

# Our choice, not the paper's: from here on the average pair of patches is nearer to parallel than to orthogonal.
COLLAPSED = 0.5


def onset(table: "pd.DataFrame") -> str | None:
    """Return the first layer from which P stays at or above 0.5 up to the last; None where the last is below."""
    rows = table[table["metric"] == "similarity"].sort_values("depth")
    layer = None
    for name, value in zip(rows["layer"][::-1], rows["mean"][::-1], strict=True):
        if value < COLLAPSED:
            break
        layer = str(name)
    return layer


def verdict(table: "pd.DataFrame") -> str:
    """Say in one sentence whether the patches are alike at the end, and since which layer."""
    rows = table[table["metric"] == "similarity"].sort_values("depth")
    last, value = rows["layer"].iloc[-1], rows["mean"].iloc[-1]
    layer = onset(table)
    if layer is None:
        return f"no collapse: P is {value:.3f} at {last}, below {COLLAPSED}"
    start = "from the start" if layer == rows["layer"].iloc[0] else f"at {layer}"
    return f"collapse sets in {start}: from there on P stays at or above {COLLAPSED}, and is {value:.3f} at {last}"
