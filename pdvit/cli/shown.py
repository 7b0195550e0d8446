"""What `pdvit analyze` prints of one checkpoint."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from pdvit.engine.display import RunConsole


def nested(table: "pd.DataFrame") -> list[dict[str, Any]]:
    """Return the table for JSON: one object per layer, with a null where there is no spread."""
    rows: dict[str, dict[str, Any]] = {}
    for row in table.to_dict("records"):
        layer = rows.setdefault(row["layer"], {"layer": row["layer"], "depth": row["depth"]})
        numbers = {key: row[key] for key in ("mean", "std", "ci95")}
        layer[row["metric"]] = {key: None if value != value else value for key, value in numbers.items()}
    return list(rows.values())


def show(table: "pd.DataFrame", facts: dict[str, Any], console: "RunConsole") -> None:
    """Print the table with a bar per layer, and exactly what was measured."""
    from rich.markup import escape

    from pdvit.analysis.view import HEADINGS, tables

    console.print(f"\n[italic]{escape(facts['model'])}[/italic]", highlight=False)
    for view in tables(table, console.width):
        console.print(view)
        console.print()
    for name in ("stopped", "verdict", "advice", "published"):
        if facts[name]:
            label = f"{name}: " if name in ("stopped", "published") else ""
            console.print(escape(f"{label}{facts[name]}"), highlight=False, soft_wrap=True)
    details = {
        "images": f"{facts['images_measured']} ({facts['images']})",
        "tokens": f"{_patches(table)} patches per image; prefix tokens dropped: {facts['prefix_tokens_dropped']}",
        "layers": facts["layers"],
        "weights": f"{facts['weights']}; {facts['precision']} on {facts['device']}",
        "spread": facts["spread"],
    }
    for name, text in facts["metrics"].items():
        label = f"{name} ({HEADINGS[name]})" if name in HEADINGS else name
        console.print(f"[dim]measured[/dim] {label}: {escape(text)}", highlight=False, soft_wrap=True)
    details |= {"note": "; ".join(facts["notes"])} if facts["notes"] else {}
    for name, text in details.items():
        console.print(f"[dim]{name:8}[/dim] {escape(text)}", highlight=False, soft_wrap=True)


def _patches(table: "pd.DataFrame") -> str:
    """Say how many patches the layers have: from the first to the last, where it changes."""
    first, last = table["tokens"].iloc[0], table["tokens"].iloc[-1]
    return str(last) if first == last else f"{first} at {table['layer'].iloc[0]} to {last} at the end:"
