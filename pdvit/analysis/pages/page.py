"""What all pages share: one file with everything in it, and names from outside that stay text."""

import base64
import hashlib
import json
import re
from html import escape
from importlib.resources import files
from typing import Any


def asset(name: str) -> str:
    """Return a file that stands beside the pages' code."""
    return files("pdvit.analysis.pages").joinpath("assets", name).read_text(encoding="utf-8")


def fill(template: str, parts: dict[str, str]) -> str:
    """Put each part in the place of its `{{name}}`; what a part says is not looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def page(template: str, title: str, styles: list[str], code: str | None = None, **parts: str) -> str:
    """Return an HTML file from its template; `parts` are HTML already, the title is not.

    The browser is told to run this script and style only and to load nothing from outside.
    """
    style = "\n".join(asset(name) for name in styles)
    script = asset(code) if code else ""
    rules = ["default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    rules += [f"style-src {_digest(style)}", f"script-src {_digest(script)}" if script else ""]
    policy = escape("; ".join(rule for rule in rules if rule))
    own = {"title": escape(title), "policy": policy, "style": style, "script": script}
    return fill(asset(template), own | parts)


def json_block(value: Any) -> str:
    """Return JSON that may stand in a script element: no `<` of it can end the element or open another."""
    compact = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return compact.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def data_uri(content: bytes, kind: str) -> str:
    """Return a file as an address that holds it, such as `data:image/png;base64,...`."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
