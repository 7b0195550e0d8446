"""Explorer and report: one HTML file each, rendered from templates, without a network, and safe for any name."""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from pdvit.analysis.explorer import Maps
from pdvit.analysis.tables import columns_of
from pdvit.definitions import DEFINITIONS
from pdvit.version import __version__

_TEMPLATES = Environment(
    loader=PackageLoader("pdvit.analysis", "assets"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
# `tojson` escapes `<`, `>`, `&` and `'`, so that no name can end the script element that holds the data.
_TEMPLATES.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
# Entries of analysis.json that stand below the numbers, in order.
CONDITIONS = (
    *("checkpoint", "weights", "images", "images_measured", "layers", "prefix_tokens_dropped"),
    *("spread", "precision", "device", "notes"),
)


def explorer_page(models: list[Maps], notes: list[str]) -> str:
    """Return the explorer as HTML, from maps of the same images, and notes to show below theirs."""
    count = min(len(maps.names) for maps in models)
    pictures: dict[str, int] = {}  # models that see the same pixels share them
    block = {
        "names": models[0].names[:count],
        "models": [_maps_of(maps, count, pictures) for maps in models],
        "pictures": list(pictures),
        "notes": [*notes, *(f"{maps.model}: {note}" for maps in models for note in maps.notes), f"pdvit {__version__}"],
    }
    return _render("explorer", f"Patch explorer: {', '.join(maps.model for maps in models)}", data=block)


def _maps_of(maps: Maps, count: int, pictures: dict[str, int]) -> dict[str, Any]:
    return {
        "name": maps.model,
        "layers": list(maps.grids),
        "depths": maps.depths,
        "deepest": maps.depths[-1],
        "grids": list(maps.grids.values()),
        "pictures": [pictures.setdefault(_png(image), len(pictures)) for image in maps.images[:count]],
        "random": [[round(value, 5) for value in values] for values in maps.random[:count]],
        "similarity": [[round(value, 5) for value in values] for values in maps.similarity[:count]],
        # not compressed: cosines of trained models lose 7 to 9 % by zlib, and every browser reads base64 at once
        "cosines": [
            [base64.b64encode(levels[np.triu_indices(len(levels), 1)].tobytes()).decode() for levels in layers.values()]
            for layers in maps.cosines[:count]
        ],
    }


def _png(image: np.ndarray) -> str:
    packed = BytesIO()
    Image.fromarray(image).save(packed, "PNG", optimize=True)
    return _data_uri(packed.getvalue(), "image/png")


def report_page(
    analyses: Sequence[tuple[pd.DataFrame, dict[str, Any]]],
    figures: Sequence[tuple[str, bytes, bytes]],
    environment: dict[str, Any],
) -> str:
    """Return the report as HTML, from tables, analysis.json and figures (captions, SVGs for light and dark pages)."""
    names = ", ".join(facts["model"] for _, facts in analyses)
    return _render(
        "report",
        f"Analysis: {names}",
        names=names,
        date=str(environment["started"])[:10],
        models=[_measured(table, facts) for table, facts in analyses],
        figures=[(caption, *(_data_uri(svg, "image/svg+xml") for svg in svgs)) for caption, *svgs in figures],
        definitions={name: DEFINITIONS[name] for table, _ in analyses for name in table["metric"]},
        environment=environment,
    )


def _measured(table: pd.DataFrame, facts: dict[str, Any]) -> dict[str, Any]:
    columns = columns_of(table)
    return {
        "facts": facts,
        "headings": [heading for heading, _ in columns],
        "rows": list(zip(*(cells for _, cells in columns), strict=True)),
        "csv": _data_uri(table.to_csv(index=False, float_format="%.6g").encode(), "text/csv"),
        "conditions": {name.replace("_", " "): facts[name] for name in CONDITIONS},
    }


def _render(name: str, title: str, **context: Any) -> str:
    """Return a page from the assets of a name: template, style, and script if there is one. Text is escaped.

    The policy of the page lets a browser run this script and these styles only, and load nothing.
    """
    assets = files("pdvit.analysis") / "assets"
    sheets, script = (assets / "page.css", assets / f"{name}.css"), assets / f"{name}.js"
    style = "\n".join(sheet.read_text(encoding="utf-8") for sheet in sheets)
    code = script.read_text(encoding="utf-8") if script.is_file() else ""
    rules = ["default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for kind, text in (("style-src", style), ("script-src", code)):
        rules.append(f"{kind} 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")
    page = {"title": title, "policy": "; ".join(rules), "style": style, "script": code}
    return _TEMPLATES.get_template(f"{name}.html").render(page | context)


def _data_uri(content: bytes, media_type: str) -> str:
    """Return a file as an address that contains it, such as `data:image/png;base64,...`."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
