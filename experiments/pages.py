"""Fill the numbers into the pages: `python experiments/pages.py [--check]`.

The text between a mark and its end is what the `report` of a script returns for the words of the mark, from committed
tables. A mark stands before a table, or inside a sentence, but not at the beginning of a line:

    It gains <!-- effects.py lasting/results-ten.csv cosine accuracy none -->+4.8 [+4.2, +5.4]<!-- end --> points.

With --check no page is written, and the exit status is 1 if one differs. The differences are printed.
"""

import re
import runpy
import shlex
import sys
from collections.abc import Callable
from difflib import unified_diff
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
PAGES = [HERE.parent / "README.md", *HERE.parent.glob("docs/*.md"), *HERE.rglob("*.md")]
MARK = re.compile(r"(.?)<!-- (\S+\.py)(.*?) -->.*?<!-- end -->", re.DOTALL)


@cache
def report_of(script: str) -> Callable[..., str]:
    return runpy.run_path(str(HERE / script))["report"]


def filled(text: str) -> str:
    """Return a page with its numbers. Raises ValueError for a mark that Markdown would take for a block of HTML."""

    def fill(mark: re.Match[str]) -> str:
        before, script, words = mark.groups()
        found = report_of(script)(*shlex.split(words))
        start = "\n" if found.endswith("\n") else ""
        if not start and before in ("", "\n"):
            raise ValueError(f"at the beginning of a line: {script}{words}")
        return f"{before}<!-- {script}{words} -->{start}{found}<!-- end -->"

    return MARK.sub(fill, text)


def main() -> int:
    differ = 0
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = filled(old)
        differ += new != old
        lines = unified_diff(old.splitlines(), new.splitlines(), str(page), "tables", n=0, lineterm="")
        print(*lines, sep="\n", end="\n" * (new != old))
        if "--check" not in sys.argv:
            page.write_text(new, encoding="utf-8")
    return int("--check" in sys.argv and differ > 0)


if __name__ == "__main__":
    sys.exit(main())
