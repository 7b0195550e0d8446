"""The tables of docs/settings.md and docs/metrics.md: `python docs/tables.py` prints them, to be copied there."""

from collections.abc import Iterable, Sequence

from pdvit.config.schema import KEYS
from pdvit.definitions import GROUPS


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows))


def settings() -> str:
    """Return every key with its flag, default, range and help."""
    rows = []
    for name, key in KEYS.items():
        value = list(key.default) if isinstance(key.default, tuple) else key.default
        flags, default = ", ".join(f"`{flag}`" for flag in key.flags), "" if value is None else f"`{value}`"
        rows.append([f"`{name}`", flags, default, ", ".join(key.choices) or key.describe_range(), key.help])
    return markdown(["key", "flag", "default", "allowed", "meaning"], rows)


def metrics() -> str:
    """Return every column of an analysis with its definition; the first row of a group has its name."""
    headings = {"text": "definition, per image", "range": "range", "random": "random tokens"}
    headings |= {"identical": "identical tokens", "bias": "bias", "source": "source"}
    rows = [
        ["" if number else f"`{group}`", f"`{column}`", *(definition[name].replace("|", "\\|") for name in headings)]
        for group, content in GROUPS.items()
        for number, (column, definition) in enumerate(content["columns"].items())
    ]
    return markdown(["group", "column", *headings.values()], rows)


def curves() -> str:
    """Return the files of curves with their arrays, as a list."""
    found = {group: content["curves"] for group, content in GROUPS.items() if "curves" in content}
    texts = {group: "; ".join(f"`{name}`, {text}" for name, text in arrays.items()) for group, arrays in found.items()}
    return "\n".join(f"- `analysis/{group}.npz`: {text}" for group, text in texts.items())


if __name__ == "__main__":
    print(settings(), metrics(), curves(), sep="\n\n")
