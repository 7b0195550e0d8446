from pathlib import Path

from pdvit.analysis.metrics.table import markdown_files, markdown_table

PAGE = (Path(__file__).parents[2] / "docs" / "analyze.md").read_text(encoding="utf-8")


def test_the_docs_define_each_metric_as_the_command_prints_it():
    assert markdown_table() in PAGE


def test_the_docs_list_each_file_of_curves():
    assert markdown_files() in PAGE
