import base64

import pytest

from pdvit.analysis.pages import CONDITIONS, report_page
from pdvit.definitions import DEFINITIONS

HOSTILE = "</script><img src=x onerror=alert(1)>{{ title }}'\""
ENVIRONMENT = {"packages": {"torch": "2.15", "none": None}, "commit": None, "started": "2026-01-02T03:04"}
FACTS = dict.fromkeys(CONDITIONS, "raw") | {"notes": ["cka left 1 image out"], "model": "made"}
FACTS |= {"verdict": "no collapse: P does not climb", "advice": "to try: nothing"}


@pytest.fixture
def report(analysis_table, parsed):
    """Return a function that makes and parses the report of one analysis, with some facts of its own."""

    def make(**facts):
        table = analysis_table([0.5, 0.3, 0.2])
        figures = [("P by layer", b"<svg/>", b"<svg/>")]
        return parsed(report_page([(table, FACTS | facts)], figures, ENVIRONMENT | {"command": HOSTILE}))

    return make


def test_the_report_has_verdict_numbers_definitions_and_environment(report):
    page = report()
    for text in ("0.300", "torch 2.15", "raw", "embed", FACTS["verdict"], FACTS["advice"], *FACTS["notes"]):
        assert text in page.texts
    assert page.texts[page.texts.index("started") + 1] == "2026-01-02T03:04"
    assert "commit" not in page.texts
    assert sum(tag == "details" for tag, _ in page.found) == 2
    for definition in (DEFINITIONS["similarity"], DEFINITIONS["similarity_signed"]):
        assert {definition.text, definition.bias, definition.source} <= set(page.texts)
    assert "no verdict: P was not measured" in report(verdict=None).texts


def test_the_report_holds_its_figures_and_the_whole_table_and_loads_nothing(report):
    found = report().found
    sources = [(tag, attrs[name]) for tag, attrs in found for name in ("src", "srcset", "href") if name in attrs]
    assert all(source.startswith("data:") for _, source in sources)
    figures = [source for tag, source in sources if tag in ("img", "source")]
    assert [base64.b64decode(figure.partition(",")[2]) for figure in figures] == [b"<svg/>"] * 2
    (table,) = [source for tag, source in sources if tag == "a"]
    lines = base64.b64decode(table.partition(",")[2]).decode().splitlines()
    assert lines[0].startswith("model,layer,depth,metric,mean")
    assert len(lines) == 7
    assert not any(tag == "script" for tag, _ in found)
