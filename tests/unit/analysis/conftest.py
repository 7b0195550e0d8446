from html.parser import HTMLParser

import pytest
import torch
from torch import Tensor


@pytest.fixture
def gaussian():
    """Return a function that makes random tokens `(B, N, D)`."""

    def make(*shape: int, seed: int = 0, shift: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + shift

    return make


class Elements(HTMLParser):
    """The elements of a page, and the texts outside of styles and scripts, as a browser finds them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        if data.strip() and self.found and self.found[-1][0] not in ("style", "script"):
            self.texts.append(data.strip())


@pytest.fixture
def parsed():
    """Return a function that parses a page."""

    def parse(page: str) -> Elements:
        elements = Elements()
        elements.feed(page)
        return elements

    return parse
