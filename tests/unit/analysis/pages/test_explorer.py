import base64
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from pdvit.analysis.maps import Maps
from pdvit.analysis.pages import explorer_page, room
from pdvit.errors import UserError

HOSTILE = "</script><img src=x onerror=alert(1)>&{{data}}'\""


def made(model: str = "made", images: int = 1, side: int = 2, layers: int = 2, pixels: int = 4, seed: int = 0) -> Maps:
    rng = np.random.default_rng(seed)
    grids = {f"block {number + 1}": (side, side) for number in range(layers)}
    cosines = []
    for _ in range(images):
        levels = rng.integers(-127, 128, (side**2, side**2)).astype(np.int8)
        upper = np.triu(levels, 1)
        cosines.append({layer: upper + upper.T + 127 * np.eye(side**2, dtype=np.int8) for layer in grids})
    shown = [rng.integers(0, 256, (pixels, pixels, 3)).astype(np.uint8) for _ in range(images)]
    return Maps(
        model,
        [f"{n}.png" for n in range(images)],
        shown,
        grids,
        cosines,
        [[0.25] * layers] * images,
        [],
        list(range(layers)),
        layers - 1,
    )


class Elements(HTMLParser):
    """Lists the elements of a page as a browser would find them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_holds_every_cosine_once(block):
    maps = made(images=2, side=3)
    data = block(explorer_page([maps], ["a note"]))
    assert data["names"] == ["0.png", "1.png"]
    assert data["notes"][0] == "a note"
    (model,) = data["models"]
    assert model["layers"] == ["block 1", "block 2"]
    assert model["grids"] == [[3, 3], [3, 3]]
    for image, by_layer in enumerate(maps.cosines):
        for layer, levels in enumerate(by_layer.values()):
            triangle = np.frombuffer(base64.b64decode(model["cosines"][image][layer]), np.int8)
            square = np.full((9, 9), 127, dtype=np.int8)
            square[np.triu_indices(9, 1)] = triangle
            square.T[np.triu_indices(9, 1)] = triangle
            assert (square == levels).all()


def test_models_that_saw_the_same_pixels_share_them(block):
    one, same, other = made("one"), made("two"), made("three", pixels=8)
    data = block(explorer_page([one, same, other], []))
    assert [model["pictures"] for model in data["models"]] == [[0], [0], [1]]
    assert len(data["pictures"]) == 2


def test_only_images_that_all_models_have_are_shown(block):
    data = block(explorer_page([made(images=3), made("less", images=2)], []))
    assert data["names"] == ["0.png", "1.png"]
    assert [len(model["cosines"]) for model in data["models"]] == [2, 2]


@pytest.mark.parametrize("models", [1, 2])
def test_a_few_images_of_a_base_model_stay_below_10_mb(models):
    page = explorer_page([made(f"m{n}", 8, 14, 14, 224, seed=n) for n in range(models)], [])
    assert len(page.encode()) < 10_000_000


def test_names_from_outside_stay_text(block):
    maps = made(HOSTILE)
    page = explorer_page([replace(maps, names=[HOSTILE])], [HOSTILE])
    elements = Elements(page).found
    assert [attrs for tag, attrs in elements if tag == "img"] == []
    assert sum(tag == "script" for tag, _ in elements) == 2
    data = block(page)
    assert data["models"][0]["name"] == data["names"][0] == data["notes"][0] == HOSTILE
    assert page.count("</script>") == 2


def test_the_page_loads_nothing_and_runs_only_its_own_script():
    page = explorer_page([made()], [])
    for _, attributes in Elements(page).found:
        for name in ("src", "href", "action", "srcset"):
            assert attributes.get(name, "data:").startswith("data:")
    (policy,) = [attributes["content"] for tag, attributes in Elements(page).found if "http-equiv" in attributes]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)


def test_more_than_four_models_are_refused():
    assert room(2) == pytest.approx(room(1) / 2, abs=1)
    with pytest.raises(UserError, match="side by side"):
        room(5)
