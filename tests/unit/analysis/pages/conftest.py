import json
import re

import pytest


@pytest.fixture
def block():
    """Return a function that reads the data of a page."""

    def read(page: str) -> dict:
        (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
        return json.loads(text)

    return read
