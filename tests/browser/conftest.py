"""The pages in a real browser, without a display and without a network."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from pdvit.analysis.explorer import Maps
from pdvit.analysis.pages import explorer_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
PIXELS = 32


@pytest.fixture(scope="session")
def browser() -> Iterator:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install '.[browser]'"
    )
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"there is no browser here: {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, headless=True, args=FLAGS)
        yield opened
        opened.close()


@dataclass
class Tab:
    """An open page, with what must not happen on it: dialogs, errors, requests."""

    page: object
    wrong: list[str] = field(default_factory=list)

    def text(self, selector: str, number: int = 0) -> str:
        return self.page.locator(selector).nth(number).inner_text()

    def value(self, pane: int = 0) -> float:
        """Return the number under a map."""
        return float(self.text(".reading .value", pane).replace("\u2212", "-"))

    def settle(self) -> None:
        """Wait until what was asked for is drawn."""
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def over(self, x: float, y: float, pane: int = 0) -> tuple[float, float]:
        """Return where a part of a map is on the screen."""
        box = self.page.locator("canvas.map").nth(pane).bounding_box()
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def hover(self, x: float, y: float, pane: int = 0) -> None:
        self.page.mouse.move(*self.over(x, y, pane))
        self.settle()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)
        self.settle()

    def colour(self, selector: str, x: float, y: float = 0.5) -> list[int]:
        """Return red, green and blue of a canvas at a part of its width and height."""
        script = """(canvas, [x, y]) => {
            const copy = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
            copy.drawImage(canvas, -Math.floor(x * canvas.width), -Math.floor(y * canvas.height));
            return Array.from(copy.getImageData(0, 0, 1, 1).data.slice(0, 3)); }"""
        return self.page.locator(selector).first.evaluate(script, [x, y])


@pytest.fixture
def open_page(browser, tmp_path) -> Iterator:
    """Return a function that writes a page, opens it from the disk with the network off, and wants no errors."""
    tabs, contexts = [], []

    def show(html: str, **options) -> Tab:
        file = tmp_path / f"page-{len(tabs)}.html"
        file.write_text(html, encoding="utf-8")
        context = browser.new_context(offline=True, **{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        tab = Tab(context.new_page())
        tabs.append(tab)
        tab.page.on("console", lambda message: tab.wrong.append(f"console: {message.text}"))
        tab.page.on("pageerror", lambda error: tab.wrong.append(f"error: {error}"))
        tab.page.on("dialog", lambda dialog: (tab.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        ours = (file.as_uri(), "data:")
        tab.page.on("request", lambda sent: sent.url.startswith(ours) or tab.wrong.append(f"request: {sent.url}"))
        tab.page.goto(file.as_uri())
        tab.settle()
        return tab

    yield show
    for context in contexts:
        context.close()
    for tab in tabs:
        assert tab.wrong == []


@pytest.fixture(scope="session")
def made():
    """Return a function that makes maps of images of one grey: a map's colours are then those of the legend exactly."""

    def make(model: str, grids: dict[str, tuple[int, int]], images: int = 2, seed: int = 0) -> Maps:
        rng, levels, similarity = np.random.default_rng(seed), [], []
        for _ in range(images):
            tokens = [rng.normal(size=(rows * columns, 5)) + 0.5 for rows, columns in grids.values()]
            exact = [cosine_similarity(part) for part in tokens]
            levels.append({layer: (127 * it).round().astype(np.int8) for layer, it in zip(grids, exact, strict=True)})
            similarity.append([float(np.abs(it[~np.eye(len(it), dtype=bool)]).mean()) for it in exact])
        shown = [np.full((PIXELS, PIXELS, 3), 90 + 40 * number, dtype=np.uint8) for number in range(images)]
        names = [f"{n}.png" for n in range(images)]
        return Maps(model, names, shown, grids, levels, similarity, [], list(range(len(grids))))

    return make


@pytest.fixture(scope="session")
def one(made) -> Maps:
    return made("one", dict.fromkeys(("embed", "block 1", "block 2", "norm"), (4, 4)))


@pytest.fixture(scope="session")
def page_of_one(one) -> str:
    return explorer_page([one], ["images: all 2"])
