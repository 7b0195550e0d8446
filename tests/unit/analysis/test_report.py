import base64
from html.parser import HTMLParser

import pytest

from pdvit.analysis import DEFINITIONS
from pdvit.analysis.report import ReportFigure, report_page

HOSTILE = "</script><img src=x onerror=alert(1)>{{ title }}'\""
ENVIRONMENT = {"packages": {"torch": "2.15", "none": None}, "commit": None, "started": "2026-01-02T03:04"}
FACTS = {
    "model": "made",
    "checkpoint": "runs/made",
    "weights": "raw",
    "images": "two",
    "images_measured": 2,
    "layers": "embed ...",
    "prefix_tokens_dropped": 1,
    "spread": "std",
    "precision": "float32",
    "device": "cpu",
    "notes": ["cka left 1 image out"],
    "verdict": "no collapse: P is 0.200 at norm",
    "advice": "to try: nothing",
    "published": None,
}


class Page(HTMLParser):
    """The elements of a page, and the text in them, as a browser finds them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if data.strip() and self.elements[-1][0] != "style":
            self.texts.append(data.strip())


@pytest.fixture
def read(analysis_table):
    """Return a function that makes the report of one analysis, with some facts of its own."""

    def make(**facts) -> Page:
        figures = [ReportFigure("P by layer", b"<svg/>", b"<svg/>")]
        analyses = [(analysis_table([0.5, 0.3, 0.2]), FACTS | facts)]
        return Page(report_page(analyses, figures, ENVIRONMENT | {"command": HOSTILE}))

    return make


def test_the_report_has_verdict_numbers_definitions_and_environment(read):
    page = read()
    for text in ("no collapse: P is 0.200 at norm", "to try: nothing", "0.300", "cka left 1 image out", "torch 2.15"):
        assert text in page.texts
    assert page.texts[page.texts.index("started") + 1] == "2026-01-02T03:04"
    assert "commit" not in page.texts
    assert sum(tag == "details" for tag, _ in page.elements) == 2
    for name in ("similarity", "similarity_signed"):
        assert {DEFINITIONS[name].text, DEFINITIONS[name].bias, DEFINITIONS[name].source} <= set(page.texts)
    assert "no verdict: P was not measured" in read(verdict=None).texts


def test_the_report_holds_its_figures_and_the_whole_table_and_loads_nothing(read):
    elements = read().elements
    sources = [(tag, attrs[name]) for tag, attrs in elements for name in ("src", "srcset", "href") if name in attrs]
    assert all(source.startswith("data:") for _, source in sources)
    figures = [source for tag, source in sources if tag in ("img", "source")]
    assert [base64.b64decode(figure.partition(",")[2]) for figure in figures] == [b"<svg/>"] * 2
    (table,) = [source for tag, source in sources if tag == "a"]
    lines = base64.b64decode(table.partition(",")[2]).decode().splitlines()
    assert lines[0].startswith("model,layer,depth,metric,mean")
    assert len(lines) == 7
    assert not any(tag == "script" for tag, _ in elements)
    (policy,) = [attrs["content"] for _, attrs in elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy


def test_names_from_outside_stay_text(read):
    page = read(model=HOSTILE, checkpoint=HOSTILE, verdict=HOSTILE, images=HOSTILE)
    assert [attrs["alt"] for tag, attrs in page.elements if tag == "img"] == ["P by layer"]
    assert " ".join(page.texts).count(HOSTILE) == 8  # title, heading, verdict twice, section, conditions twice, command
