"""The tables of an analysis: in a terminal, and in files."""

from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.markup import escape
from rich.table import Table

from pdvit.analysis.measure import Analysis
from pdvit.analysis.metrics import METRICS
from pdvit.tracking.run_directory import to_json, write_file, writing

BETWEEN, MAPS = "cka_between.npz", "maps.npz"
# Groups that share a table in a terminal of 80 characters (others share a last one), and the width of the bar of P.
TABLES = (("similarity", "similarity_signed", "norms"), ("pairs", "drift", "rank"), ("spectrum", "attention", "cka"))
BAR = 12
Columns = list[tuple[str, list[str]]]  # heading and cells, one per layer


def terminal_tables(table: pd.DataFrame) -> Iterator[Table]:
    """Yield an analysis as tables of at most 80 characters: layers down, metrics across, P with a bar."""
    others = [name for name in METRICS if not any(name in groups for groups in TABLES)]
    for groups in (*TABLES, others):
        columns = [column for group in groups for column in metric_columns(table, group)]
        heights = table[table["metric"] == "similarity"].sort_values("depth")["mean"].tolist()
        if "similarity" in groups and heights:
            columns.append((f"0{'·' * (BAR - 2)}1", ["█" * round(height * BAR) for height in heights]))
        if not columns:
            continue
        view = Table(box=None, pad_edge=False, header_style="bold")
        columns.insert(0, layer_column(table))
        for heading, _ in columns:
            view.add_column(heading, justify="left" if heading == "layer" or "·" in heading else "right", no_wrap=True)
        for row in zip(*(cells for _, cells in columns), strict=True):
            view.add_row(*map(escape, row))
        yield view


def layer_column(table: pd.DataFrame) -> tuple[str, list[str]]:
    """Return the column of the layers, by depth."""
    return "layer", table.drop_duplicates("depth").sort_values("depth")["layer"].tolist()


def metric_columns(table: pd.DataFrame, group: str) -> Columns:
    """Return headings and cells of a group, by depth; a layer without a value has a hyphen."""
    depths = sorted(table["depth"].unique())
    columns: Columns = []
    for metric, definition in METRICS[group].columns.items():
        rows = table[table["metric"] == metric].set_index("depth")
        if len(rows) and definition.heading:
            rows = rows.reindex(depths)
            columns.append((definition.heading, _cells(rows["mean"], signed=metric == "similarity_signed")))
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
        for name in (*METRICS, BETWEEN, MAPS):
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
