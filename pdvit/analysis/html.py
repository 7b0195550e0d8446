"""Pages that are one HTML file each: rendered from templates, without a network, and safe for any name."""

import base64
import hashlib
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

_TEMPLATES = Environment(
    loader=PackageLoader("pdvit.analysis", "assets"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
# `tojson` escapes `<`, `>`, `&` and `'`, so that no name can end the script element that holds the data.
_TEMPLATES.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}


def render_page(template: str, title: str, styles: list[str], script: str | None = None, **context: Any) -> str:
    """Return a page from its template; text of the context is escaped.

    The policy of the page lets a browser run this script and these styles only, and load nothing.
    """
    style, code = "\n".join(map(_asset, styles)), _asset(script) if script else ""
    rules = ["default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    rules += [f"style-src {_digest(style)}", *([f"script-src {_digest(code)}"] if code else [])]
    page = {"title": title, "policy": "; ".join(rules), "style": style, "script": code}
    return _TEMPLATES.get_template(template).render(page | context)


def data_uri(content: bytes, media_type: str) -> str:
    """Return a file as an address that contains it, such as `data:image/png;base64,...`."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def _asset(name: str) -> str:
    return files("pdvit.analysis").joinpath("assets", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
