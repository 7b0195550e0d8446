from pathlib import Path

from pdvit.config.load import markdown_table


def test_the_docs_table_is_the_one_that_the_schema_gives():
    page = (Path(__file__).parents[2] / "docs" / "train.md").read_text()
    assert markdown_table() in page
