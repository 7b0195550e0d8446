"""The report: a whole analysis as one HTML file, to read, print and send."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from pdvit.analysis.metrics import DEFINITIONS
from pdvit.analysis.pages.page import data_uri, page
from pdvit.analysis.view import columns_of

if TYPE_CHECKING:
    import pandas as pd

# What is said of each number beside its definition, by field.
FIELDS = {
    "range": "range",
    "random": "random tokens",
    "identical": "identical tokens",
    "bias": "bias",
    "source": "source",
}
# Facts of a statement that a reader needs beside the numbers, in order.
FACTS = ("checkpoint", "weights", "images", "images_measured", "layers", "prefix_tokens_dropped", "spread", "precision")


@dataclass(frozen=True)
class Picture:
    """A figure of the report: what it shows, in a line, and the figure as SVG for light pages and for dark ones."""

    title: str
    light: bytes
    dark: bytes


def report_page(
    analyses: "Sequence[tuple[pd.DataFrame, dict[str, Any]]]",
    pictures: Sequence[Picture],
    environment: dict[str, Any],
) -> str:
    """Return the report as HTML.

    Args:
        analyses: of each checkpoint the table of `measure` and its `statement`.
        pictures: the figures.
        environment: as `describe_environment` returns it.
    """
    models = [facts["model"] for _, facts in analyses]
    metrics = dict.fromkeys(name for table, _ in analyses for name in table["metric"])
    return page(
        "report.html",
        f"Analysis: {', '.join(models)}",
        ["page.css", "report.css"],
        models=escape(", ".join(models)),
        date=escape(str(environment["started"])[:10]),
        verdicts="".join(_verdict(facts) for _, facts in analyses),
        tables="".join(_section(table, facts) for table, facts in analyses),
        figures="".join(map(_figure, pictures)),
        definitions=_definitions(metrics),
        environment=_pairs(_flat(environment)),
    )


def _verdict(facts: dict[str, Any]) -> str:
    verdict = facts["verdict"] or "no verdict: P was not measured"
    more = (f"<p>{escape(sentence)}</p>" for sentence in (facts["advice"], facts["published"]) if sentence)
    return f"<p><b>{escape(facts['model'])}</b> {escape(verdict)}</p>{''.join(more)}"


def _section(table: "pd.DataFrame", facts: dict[str, Any]) -> str:
    """Return one model's numbers, what they were measured on, and the whole table to save."""
    layers, columns = columns_of(table)
    heads = ["layer", *(heading for heading, _ in columns)]
    rows = zip(layers, *(cells for _, cells in columns), strict=True)
    notes = {"notes": "; ".join(facts["notes"])} if facts["notes"] else {}
    about = {name.replace("_", " "): facts[name] for name in FACTS} | {"device": facts["device"]} | notes
    csv = data_uri(table.to_csv(index=False, float_format="%.6g").encode(), "text/csv")
    save = f'<p class="small"><a download="analysis.csv" href="{csv}">All numbers as CSV</a></p>'
    return f"<section><h3>{escape(facts['model'])}</h3>{_table(heads, rows)}{save}{_pairs(about)}</section>"


def _figure(picture: Picture) -> str:
    """Return a figure in the colours of the screen; on paper it is light."""
    light, dark = (data_uri(svg, "image/svg+xml") for svg in (picture.light, picture.dark))
    title = escape(picture.title)
    by_screen = f'<source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
    image = f'<picture>{by_screen}<img alt="{title}" src="{light}"></picture>'
    return f"<figure>{image}<figcaption>{title}</figcaption></figure>"


def _definitions(metrics: Iterable[str]) -> str:
    """Return what each number means: the definitions that docs/analyze.md has too."""
    return "".join(
        f'<section class="definition"><h3><code>{escape(name)}</code> {escape(DEFINITIONS[name].text)}</h3>'
        f"{_pairs({label: getattr(DEFINITIONS[name], field) for field, label in FIELDS.items()})}</section>"
        for name in metrics
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    )
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="table" role="region" aria-label="Numbers by layer" tabindex="0">{whole}</div>'


def _pairs(facts: dict[str, Any]) -> str:
    items = (f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items())
    return f"<dl>{''.join(items)}</dl>"


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    """Return facts without those that are unknown, and lists of versions as one line."""
    lines = {
        name: ", ".join(f"{key} {it}" for key, it in value.items() if it) if isinstance(value, dict) else value
        for name, value in facts.items()
    }
    return {name: value for name, value in lines.items() if value not in (None, "")}
