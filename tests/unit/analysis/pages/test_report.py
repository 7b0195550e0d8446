import base64
import re
from html import unescape

import pytest

from pdvit.analysis import DEFINITIONS
from pdvit.analysis.pages import Picture, report_page

ENVIRONMENT = {
    "pdvit": "0.1",
    "packages": {"torch": "2.15", "none": None},
    "commit": None,
    "started": "2026-01-02T03:04",
}
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
    "advice": "nothing to mend",
    "published": None,
}
HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture
def page(analysis_table):
    """Return a function that makes the report of one analysis, with some facts of its own."""

    def make(**facts) -> str:
        table = analysis_table([0.5, 0.3, 0.2])
        return report_page(
            [(table, FACTS | facts)], [Picture("P by layer", b"<svg/>", b"<svg/>")], ENVIRONMENT | {"command": HOSTILE}
        )

    return make


def text_of(page: str) -> str:
    return unescape(re.sub(r"<[^>]*>", " ", page.split("</style>")[1]))


def test_the_report_has_verdict_numbers_definitions_and_environment(page):
    text = re.sub(r"\s+", " ", text_of(page()))
    assert "no collapse: P is 0.200 at norm nothing to mend" in text
    assert re.search(r"block 1 0\.300", text)
    assert "torch 2.15" in text
    assert "cka left 1 image out" in text
    assert "2026-01-02" in text
    for name in ("similarity", "similarity_signed"):
        for said in (DEFINITIONS[name].text, DEFINITIONS[name].bias, DEFINITIONS[name].source):
            assert said in text


def test_the_report_holds_its_figures_and_the_whole_table(page):
    made = page()
    (figure,) = re.findall(r'<img alt="P by layer" src="data:image/svg\+xml;base64,([^"]*)"', made)
    assert base64.b64decode(figure) == b"<svg/>"
    (table,) = re.findall(r'href="data:text/csv;base64,([^"]*)"', made)
    lines = base64.b64decode(table).decode().splitlines()
    assert lines[0].startswith("model,layer,depth,metric,mean")
    assert len(lines) == 7


def test_names_from_outside_stay_text_in_the_report(page):
    made = page(model=HOSTILE, checkpoint=HOSTILE, verdict=HOSTILE, images=HOSTILE)
    assert "<img src=x" not in made
    assert text_of(made).count(HOSTILE) == 7  # heading, verdict twice, section, facts twice, command


def test_a_report_without_p_says_that_there_is_no_verdict(page):
    assert "no verdict" in page(verdict=None)


def test_the_report_runs_no_script_and_loads_nothing(page):
    made = page()
    assert "<script" not in made
    assert "default-src &#x27;none&#x27;" in made
    assert all(address.startswith("data:") for address in re.findall(r'(?:src|href)="([^"]*)"', made))
