import re
import tomllib
from pathlib import Path

import pytest

import pdvit

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "experiments").rglob("*.md"))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """Return the targets of links and images, code blocks and inline code left out."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"`[^`\n]*`", "", prose)
    markdown = re.findall(r"\]\(<?([^)\s>]+)", prose)
    return markdown + re.findall(r"""(?:src|href|srcset)=["']([^"']+)""", prose)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_inside_the_repository_leads_somewhere(page):
    for link in links(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_links_are_found():
    text = "[a](b.md) ![c](d.png) <img src='e.svg'> `[x](no.md)`\n```\n[y](no.md)\n```\n[z](f.md#part)"
    assert links(text) == ["b.md", "d.png", "f.md#part", "e.svg"]


def test_the_library_example_runs_as_printed(workplace):
    example = blocks(README, "python")[0]
    statements = [line for line in example.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(statements) <= 6
    space: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), space)
    gradients = [weight.grad for weight in space["model"].parameters()]
    assert all(gradient is not None for gradient in gradients)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_the_docs_is_python(page):
    for example in blocks(page.read_text(encoding="utf-8"), "python"):
        compile(example, page.name, "exec")


def test_the_checks_run_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (pattern,) = re.findall(r"grep -m 1 '([^']+)' README\.md", script)
    assert re.search(r"^eval ", script, re.MULTILINE)
    found = [line for line in README.splitlines() if re.search(pattern, line)]
    assert len(found) == 1
    in_blocks = [line for block in blocks(README, "sh") for line in block.splitlines()]
    assert found[0] in in_blocks
    assert re.search("pip install.*pytest$", found[0])


def test_the_first_screen_has_both_commands():
    first = "\n".join(README.splitlines()[:45])
    commands = [
        line for block in blocks(first, "sh") for line in block.splitlines() if line.startswith("python3 -m venv")
    ]
    assert [line.split("/")[-1] for line in commands] == ["pdvit train", "pytest"]


def test_the_changelog_has_this_version():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[?{re.escape(pdvit.__version__)}\b", changes, re.MULTILINE)


def test_nothing_is_left_to_fill_in():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"^\s*[A-Z]{5,}\s*$|\bTODO\b|\bTBD\b|\bXXX\b", text, re.MULTILINE), page


def test_citation_and_package_agree():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] in citation
    assert re.search(rf"^version: [\"']?{re.escape(pdvit.__version__)}[\"']?$", citation, re.MULTILINE)
