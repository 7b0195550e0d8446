from pathlib import Path

from pdvit.analysis import METRICS

PAGE = (Path(__file__).parents[2] / "docs" / "analyze.md").read_text(encoding="utf-8")
FIELDS = ("text", "range", "random", "identical", "bias", "source")


def test_the_docs_define_each_metric_as_the_command_prints_it():
    for group, metrics in METRICS.items():
        for column, definition in metrics.columns.items():
            cells = [getattr(definition, field).replace("|", "\\|") for field in FIELDS]
            assert f"| `{group}` | `{column}` | {' | '.join(cells)} |" in PAGE


def test_the_docs_list_each_file_of_curves():
    for group, metrics in METRICS.items():
        if metrics.curves:
            curves = "; ".join(f"`{name}`, {text}" for name, text in metrics.curves.items())
            assert f"- `analysis/{group}.npz`: {curves}" in PAGE
