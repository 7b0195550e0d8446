import pytest

from pdvit.analysis.pages import CONDITIONS, report_page

pytestmark = pytest.mark.slow
HOSTILE = "</script><img src=x onerror=alert(1)>"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="30" height="20"><script>alert(1)</script></svg>'


def test_the_report_opens_with_its_figures_and_runs_nothing(open_page, analysis_table):
    facts = dict.fromkeys(("model", "verdict", *CONDITIONS), HOSTILE) | {"advice": None}
    environment = {"started": "2026-01-02T03:04", "command": HOSTILE}
    analyses = [(analysis_table([0.5, 0.3, 0.2]), facts)]
    tab = open_page(report_page(analyses, [(HOSTILE, SVG, SVG)], environment))
    assert tab.text("h3") == HOSTILE
    assert tab.page.locator("figure img").evaluate("(image) => [image.naturalWidth, image.naturalHeight]") == [30, 20]
    assert tab.page.locator("img").count() == 1
    assert len(tab.page.locator("tbody tr").all()) == 3
    assert not tab.page.locator("details dl").first.is_visible()
    tab.page.locator("summary").first.click()
    assert tab.page.locator("details dl").first.is_visible()
