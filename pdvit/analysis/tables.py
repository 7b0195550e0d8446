"""The tables of an analysis: in a terminal, and in files."""

from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.markup import escape
from rich.table import Table

from pdvit.analysis.measure import Analysis
from pdvit.definitions import DEFINITIONS, GROUPS
from pdvit.tracking.run_directory import to_json, write_file, writing

BETWEEN, MAPS = "cka_between.npz", "maps.npz"
# Groups that share a table in a terminal of 80 characters (all others share a last one), and the width of the bar of P.
TABLES = (("similarity", "similarity_signed", "norms"), ("pairs", "drift", "rank"))
BAR = 12
Columns = list[tuple[str, list[str]]]  # heading and cells, one per layer


def terminal_tables(table: pd.DataFrame) -> Iterator[Table]:
    """Yield an analysis as tables of at most 80 characters: layers down, metrics across, P with a bar."""
    others = [name for name in GROUPS if not any(name in groups for groups in TABLES)]
    for groups in (*TABLES, others):
        columns = columns_of(table, groups)
        heights = table[table["metric"] == "similarity"].sort_values("depth")["mean"].tolist()
        if "similarity" in groups and heights:
            columns.append((f"0{'·' * (BAR - 2)}1", ["█" * round(height * BAR) for height in heights]))
        if len(columns) == 1:
            continue
        view = Table(box=None, pad_edge=False, header_style="bold")
        for heading, _ in columns:
            view.add_column(heading, justify="left" if heading == "layer" or "·" in heading else "right", no_wrap=True)
        for row in zip(*(cells for _, cells in columns), strict=True):
            view.add_row(*map(escape, row))
        yield view


def columns_of(table: pd.DataFrame, groups: Iterable[str] = GROUPS) -> Columns:
    """Return headings and cells of the layers and of groups, by depth; a layer without a value has a hyphen."""
    layers = table.drop_duplicates("depth").set_index("depth")["layer"].sort_index()
    columns: Columns = [("layer", layers.tolist())]
    for metric in (column for group in groups for column in GROUPS[group]["columns"]):
        rows, heading = table[table["metric"] == metric].set_index("depth"), DEFINITIONS[metric].heading
        alone = metric == "similarity_without_outliers" and "similarity" not in set(table["metric"])  # without P
        if len(rows) and heading and not alone:
            rows = rows.reindex(layers.index)
            columns.append((heading, _cells(rows["mean"], signed=metric == "similarity_signed")))
            if metric == "similarity":
                columns.append(("± 95 %", _cells(rows["ci95"])))
    return columns


def _cells(values: pd.Series, signed: bool = False) -> list[str]:
    largest = values.abs().max()
    digits = 1 if largest >= 10 else 4 if 0 < largest < 0.02 else 3
    return ["-" if value != value else f"{value:{'+' if signed else ''}.{digits}f}" for value in values]


def write_analysis(folder: Path, analysis: Analysis, facts: dict[str, Any]) -> Path:
    """Write analysis.csv, analysis/analysis.json and one .npz for each group with curves; return the first.

    Arrays of an earlier analysis, which may be of other images, are deleted. UserError if the write fails.
    """
    table, arrays = folder / "analysis.csv", folder / "analysis"
    with writing("the analysis", folder):
        arrays.mkdir(parents=True, exist_ok=True)
        for name in (*GROUPS, BETWEEN, MAPS):
            (arrays / name).with_suffix(".npz").unlink(missing_ok=True)
        write_file(arrays / "analysis.json", to_json(facts) + "\n")
        for group, curves in analysis.curves.items():
            write_arrays(arrays / f"{group}.npz", curves)
        write_file(table, analysis.table.to_csv(index=False, float_format="%.6g"))
    return table


def write_between(folder: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Write analysis/cka_between.npz: `matrix/NAME` and `layers/NAME` of each other model, and the own `layers`."""
    arrays: dict[str, np.ndarray] = {f"matrix/{name}": table.to_numpy() for name, table in tables.items()}
    arrays |= {f"layers/{name}": table.columns.to_numpy(dtype=str) for name, table in tables.items()}
    arrays["layers"] = next(iter(tables.values())).index.to_numpy(dtype=str)
    with writing("the analysis", folder):
        write_arrays(folder / "analysis" / BETWEEN, arrays)


def write_arrays(file: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays by name as a compressed .npz, atomically. Raises OSError."""
    packed = BytesIO()
    np.savez_compressed(packed, **arrays)
    write_file(file, packed.getvalue())
