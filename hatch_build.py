"""README.md as the description of the package: its links become absolute once [project.urls] has a `Repository`."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


class ReadmeHook(MetadataHookInterface):
    """Sets the dynamic `readme` of pyproject.toml. A package index does not resolve relative links and images."""

    def update(self, metadata: dict) -> None:
        """Add `readme` to the metadata of the project."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        if address := metadata["urls"].get("Repository"):
            text = re.sub(r"(!\[[^]]*\]\()(?!\w+:|#)", rf"\g<1>{address}/raw/HEAD/", text)
            text = re.sub(r"(\]\()(?!\w+:|#)", rf"\g<1>{address}/blob/HEAD/", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
