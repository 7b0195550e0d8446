import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pdvit
from tests.docs.pages import PAGES, ROOT, blocks, links, page_id, read

README = read("README.md")
every_page = pytest.mark.parametrize("page", PAGES, ids=page_id)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs").rglob("*.ipynb"))], ids=page_id)
def test_every_link_inside_the_repository_leads_somewhere(page):
    for link in links(read(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


@every_page
def test_python_in_the_docs_is_python_and_nothing_is_left_to_fill_in(page):
    for example in blocks(read(page), "python"):
        compile(example, page.name, "exec")
    assert not re.search(r"^\s*[A-Z]{5,}\s*$|\bTODO\b|\bTBD\b|\bXXX\b", read(page), re.MULTILINE)


def test_the_library_example_runs_as_printed(workplace):
    example = blocks(README, "python")[0]
    statements = [line for line in example.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(statements) <= 6
    space: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), space)
    assert all(weight.grad is not None for weight in space["model"].parameters())


def test_the_checks_run_the_test_command_of_the_readme():
    script = read(".ci/run")
    (pattern,) = re.findall(r"grep -m 1 '([^']+)' README\.md", script)
    assert re.search(r"^eval ", script, re.MULTILINE)
    (command,) = [line for line in README.splitlines() if re.search(pattern, line)]
    assert command in [line for block in blocks(README, "sh") for line in block.splitlines()]
    assert re.search("pip install.*pytest$", command)


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link():
    pytest.importorskip("zensical", reason="an extra of pdvit: docs")
    done = subprocess.run([sys.executable, ROOT / "docs" / "build.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_changelog_citation_and_package_agree():
    version = re.escape(pdvit.__version__)
    assert re.search(rf"^## \[?{version}\b", read("CHANGELOG.md"), re.MULTILINE)
    citation = read("CITATION.cff")
    assert tomllib.loads(read("pyproject.toml"))["project"]["license"] in citation
    assert re.search(rf"^version: [\"']?{version}[\"']?$", citation, re.MULTILINE)
