"""The tables that people read in a terminal."""

from typing import TYPE_CHECKING

from pdvit.analysis.metrics import METRICS

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

GAP = 2
# Most and least width of the bar of P.
BAR, LEAST_BAR = 24, 8
Columns = list[tuple[str, list[str]]]
# The short heading of each metric that the tables show.
HEADINGS = {metric: heading for group in METRICS.values() for metric, heading in group.shown.items()}


def tables(table: "pd.DataFrame", width: int) -> "list[Table]":
    """Return an analysis as tables of at most `width` characters: layers down, metrics across, P with a bar.

    A group of metrics stays together.
    """
    places = table.drop_duplicates("depth").sort_values("depth")
    layers = ("layer", places["layer"].tolist())
    heights = table[table["metric"] == "similarity"].sort_values("depth")["mean"].tolist()
    least = GAP + LEAST_BAR if heights else 0
    parts: list[Columns] = [[]]
    for name in METRICS:
        columns = _columns(table, places["depth"].tolist(), name)
        if parts[-1] and _width([layers, *parts[-1], *columns]) + (least if len(parts) == 1 else 0) > width:
            parts.append([])
        parts[-1] += columns
    if heights:
        room = min(BAR, max(LEAST_BAR, width - GAP - _width([layers, *parts[0]])))
        parts[0].append((f"0{'·' * (room - 2)}1", ["█" * round(height * room) for height in heights]))
    return [_table([layers, *part]) for part in parts]


def columns_of(table: "pd.DataFrame") -> tuple[list[str], Columns]:
    """Return the layers of an analysis, and heading and cells of every column that people read."""
    places = table.drop_duplicates("depth").sort_values("depth")
    depths = places["depth"].tolist()
    return places["layer"].tolist(), [column for name in METRICS for column in _columns(table, depths, name)]


def _columns(table: "pd.DataFrame", depths: list[int], group: str) -> Columns:
    """Return headings and cells of a group; a hyphen where a layer has no value."""
    found: Columns = []
    for metric, heading in METRICS[group].shown.items():
        rows = table[table["metric"] == metric].set_index("depth")
        if len(rows):
            rows = rows.reindex(depths)
            found.append((heading, _cells(rows["mean"], signed=metric == "similarity_signed")))
            if metric == "similarity":
                found.append(("± 95 %", _cells(rows["ci95"])))
    return found


def _cells(values: "pd.Series", signed: bool = False) -> list[str]:
    largest = values.abs().max()
    digits = 1 if largest >= 10 else 4 if 0 < largest < 0.02 else 3
    return ["-" if value != value else f"{value:{'+' if signed else ''}.{digits}f}" for value in values]


def _width(columns: Columns) -> int:
    return sum(max(map(len, [heading, *cells])) for heading, cells in columns) + GAP * (len(columns) - 1)


def _table(columns: Columns) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    view = Table(box=None, pad_edge=False, header_style="bold")
    for heading, _ in columns:
        text = heading == "layer" or "·" in heading
        view.add_column(heading, justify="left" if text else "right", no_wrap=True)
    for row in zip(*(cells for _, cells in columns), strict=True):
        view.add_row(*map(escape, row))
    return view
