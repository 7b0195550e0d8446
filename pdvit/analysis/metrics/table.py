"""The docs' table of every metric: `python -m pdvit.analysis.metrics.table` prints it."""

from pdvit.analysis.metrics import METRICS


def markdown_table() -> str:
    """Return every number that a group gives, with what it means, as Markdown."""
    heads = ("group", "column", "definition, per image", "range", "random tokens", "identical tokens", "bias", "source")
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for group, metrics in METRICS.items():
        for column, found in metrics.columns.items():
            cells = (found.text, found.range, found.random, found.identical, found.bias, found.source)
            texts = (text.replace("|", "\\|") for text in cells)
            lines.append(f"| `{group}` | `{column}` | {' | '.join(texts)} |")
    return "\n".join(lines)


def markdown_files() -> str:
    """Return the files that groups leave beside the table, as a Markdown list."""
    return "\n".join(
        f"- `analysis/{group}.npz`: " + "; ".join(f"`{name}`, {text}" for name, text in metrics.curves.items())
        for group, metrics in METRICS.items()
        if metrics.curves
    )


if __name__ == "__main__":
    print(markdown_table(), markdown_files(), sep="\n\n")
