import pages
import pytest


def test_the_pages_have_the_numbers_of_the_tables(monkeypatch, capfd):
    monkeypatch.setattr(pages.sys, "argv", ["pages.py", "--check"])
    assert pages.main() == 0, capfd.readouterr().out


def test_a_number_that_differs_is_replaced_in_place_and_the_rest_stays():
    mark = "<!-- effects.py digits/results.csv none accuracy -->"
    mean = pages.report_of("effects.py")("digits/results.csv", "none", "accuracy")
    assert pages.filled(f"It has {mark}12.3<!-- end --> %, {mark}<!-- end -->.") == (
        f"It has {mark}{mean}<!-- end --> %, {mark}{mean}<!-- end -->."
    )
    head, _, tail = pages.filled("<!-- effects.py digits --><!-- end -->\nnext").partition("| setting |")
    assert head == "<!-- effects.py digits -->\n"
    assert tail.endswith(" |\n<!-- end -->\nnext")
    with pytest.raises(ValueError, match="beginning of a line"):
        pages.filled(f"It has\n{mark}93.4<!-- end --> %.")
