"""Build the site of the documentation into build/docs/site, with an error for every broken link.

    pip install '.[docs]' && python docs/build.py

The site has the pages of the repository in the repository's own layout, so each link works on GitHub and on the site.
Notebooks become pages, with the outputs that are stored in them. Nothing is downloaded and no code of a page is run.
"""

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "docs"


def notebook_page(notebook: dict, images: Path) -> str:
    """Return a notebook as Markdown, and write its images into a folder."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                image = images / f"{len(parts)}.png"
                image.parent.mkdir(parents=True, exist_ok=True)
                image.write_bytes(base64.b64decode("".join(data["image/png"])))
                parts.append(f"![Output of the cell above]({images.name}/{image.name})")
            elif "text/html" in data:
                html = re.sub(r"<style.*?</style>", "", "".join(data["text/html"]), flags=re.DOTALL)
                # A blank line would end the block of HTML.
                parts.append('<div class="output">' + " ".join(html.split()) + "</div>")
            else:
                text = output.get("text") or output.get("traceback") or data["text/plain"]
                parts.append("```text\n" + "\n".join(line.rstrip("\n") for line in text) + "\n```")
    return "\n\n".join(parts)


def collect_pages() -> None:
    """Copy pages and images to `BUILD/pages`, and the configuration beside them."""
    shutil.rmtree(BUILD, ignore_errors=True)
    folders = [file for folder in ("docs", "experiments") for file in (ROOT / folder).rglob("*")]
    for source in [*ROOT.glob("*.md"), *folders]:
        target = BUILD / "pages" / source.relative_to(ROOT)
        if source.suffix not in (".css", ".ipynb", ".md", ".png", ".svg"):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".ipynb":
            page = notebook_page(json.loads(source.read_text(encoding="utf-8")), target.with_suffix(""))
            target.with_suffix(".md").write_text(page, encoding="utf-8")
        elif source.suffix == ".md":
            page = re.sub(r"(\]\([^)]+)\.ipynb\b", r"\1.md", source.read_text(encoding="utf-8"))
            target.write_text(page, encoding="utf-8")
        else:
            shutil.copy(source, target)
    shutil.copy(ROOT / "docs" / "zensical.toml", BUILD)


if __name__ == "__main__":
    collect_pages()
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(BUILD / "zensical.toml")]
    sys.exit(subprocess.run(command, cwd=BUILD).returncode)
