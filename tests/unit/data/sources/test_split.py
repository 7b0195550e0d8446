import pytest

from pdvit.data.sources import first_names, printable
from pdvit.data.sources.split import Source


@pytest.mark.parametrize("name", ["žába 蛙", "naïve.png", "動物", "[red]", "a\\b", "☃", "שלום"])
def test_what_a_terminal_can_show_stays_as_it_is(name):
    assert printable(name) == name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("two\nlines", "two\\nlines"),
        ("\x9b1m", "\\x9b1m"),
        ("a\u202eb", "a\\u202eb"),
        ("\udcff", "\\udcff"),
    ],
)
def test_what_a_terminal_would_obey_or_refuse_is_escaped(name, shown):
    assert printable(name) == shown
    assert first_names([name, "b"]) == f"{shown}, b"


def test_no_line_that_describes_a_source_holds_a_command_to_the_terminal(image_folder):
    from pdvit.config.schema import DataConfig
    from pdvit.data.sources import open_source

    (image_folder / "train/red/\x1b[31m.txt").touch()
    root = image_folder.rename(image_folder.with_name("pic\x1btures"))
    source: Source = open_source(DataConfig(source=str(root)))
    assert "\x1b" not in source.describe()
    assert source.describe().count("\\x1b") == 2
