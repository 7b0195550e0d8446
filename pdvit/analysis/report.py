"""The report: a whole analysis as one HTML file, to read, print and send."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from pdvit.analysis.html import data_uri, render_page
from pdvit.analysis.metrics import METRICS
from pdvit.analysis.tables import layer_column, metric_columns
from pdvit.definitions import DEFINITIONS

# Entries of analysis.json that stand below the numbers, in order.
CONDITIONS = (
    *("checkpoint", "weights", "images", "images_measured", "layers", "prefix_tokens_dropped"),
    *("spread", "precision", "device", "notes"),
)


def report_page(
    analyses: Sequence[tuple[pd.DataFrame, dict[str, Any]]],
    figures: Sequence[tuple[str, bytes, bytes]],
    environment: dict[str, Any],
) -> str:
    """Return the report as HTML, from tables, analysis.json and figures (captions, SVGs for light and dark pages)."""
    names = ", ".join(facts["model"] for _, facts in analyses)
    return render_page(
        "report.html",
        f"Analysis: {names}",
        ["page.css", "report.css"],
        names=names,
        date=str(environment["started"])[:10],
        models=[_model(table, facts) for table, facts in analyses],
        figures=[(caption, *(data_uri(svg, "image/svg+xml") for svg in svgs)) for caption, *svgs in figures],
        definitions={name: DEFINITIONS[name] for table, _ in analyses for name in table["metric"]},
        environment={name: _text(value) for name, value in environment.items() if value not in (None, "")},
    )


def _model(table: pd.DataFrame, facts: dict[str, Any]) -> dict[str, Any]:
    columns = [layer_column(table), *(column for group in METRICS for column in metric_columns(table, group))]
    conditions = {name.replace("_", " "): _text(facts[name]) for name in CONDITIONS}
    return {
        "facts": facts,
        "headings": [heading for heading, _ in columns],
        "rows": list(zip(*(cells for _, cells in columns), strict=True)),
        "csv": data_uri(table.to_csv(index=False, float_format="%.6g").encode(), "text/csv"),
        "conditions": {name: text for name, text in conditions.items() if text},
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):  # versions of packages; None for those that are not installed
        return ", ".join(f"{name} {version}" for name, version in value.items() if version)
    return "; ".join(value) if isinstance(value, list) else str(value)
