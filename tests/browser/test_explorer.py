from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pdvit.analysis.explorer import Maps
from pdvit.analysis.pages import explorer_page

pytestmark = pytest.mark.slow
IMAGE = "#image-name option:checked"
NEAR = 0.005 + 1e-6  # two digits are shown
HOSTILE = "</script><img src=x onerror=alert(1)><svg onload=alert(2)>"


def cosines(maps: Maps, image: int, layer: str, patch: int) -> np.ndarray:
    """The cosines of a patch with all, as the page has them."""
    return maps.cosines[image][layer][patch] / 127


def others(maps: Maps, image: int, layer: str, patch: int) -> np.ndarray:
    return np.delete(cosines(maps, image, layer, patch), patch)


@pytest.mark.parametrize("signed", [True, False])
def test_a_patch_under_the_pointer_colours_all_others_by_their_cosine(open_page, page_of_one, one, signed):
    tab = open_page(page_of_one)
    tab.press(*([] if signed else ["c"]))
    tab.hover(0.3, 0.6)  # row 2, column 1 of 4 x 4, from 0
    assert tab.text("#where") == "row 2, column 1"
    expected = others(one, 0, "norm", 9) if signed else np.abs(others(one, 0, "norm", 9))
    assert tab.value() == pytest.approx(expected.mean(), abs=NEAR)
    about = tab.text(".reading .about").replace("\u2212", "-")
    low, high = (float(part) for part in about.split("from ")[1].split(" to "))
    assert (low, high) == (pytest.approx(expected.min(), abs=NEAR), pytest.approx(expected.max(), abs=NEAR))
    for patch in (0, 7, 14):
        level = int(one.cosines[0]["norm"][9][patch])
        place = (level + 127.5) / 255 if signed else (2 * abs(level) + 0.5) / 255
        row, column = divmod(patch, 4)
        assert tab.colour("canvas.map", (column + 0.5) / 4, (row + 0.5) / 4) == tab.colour("#scale", place)


def test_a_pinned_patch_is_compared_with_the_one_under_the_pointer(open_page, page_of_one, one):
    tab = open_page(page_of_one)
    tab.hover(0.1, 0.1)
    tab.page.mouse.click(*tab.over(0.1, 0.1))
    for patch in (3, 6, 13):
        row, column = divmod(patch, 4)
        tab.hover((column + 0.5) / 4, (row + 0.5) / 4)
        assert tab.value() == pytest.approx(cosines(one, 0, "norm", 0)[patch], abs=NEAR)
    assert tab.page.locator(".needle").count() == 1
    assert tab.page.locator("#pin").get_attribute("aria-pressed") == "true"
    tab.page.mouse.click(*tab.over(0.375, 0.875))
    tab.settle()
    assert tab.text("#where") == "row 3, column 1"
    assert tab.page.locator("#pin").get_attribute("aria-pressed") == "false"


def test_the_slider_and_the_curve_choose_the_layer(open_page, page_of_one, one):
    tab = open_page(page_of_one)
    tab.hover(0.1, 0.1)
    slider = tab.page.locator("#layer")
    for step, layer in enumerate(one.grids):
        slider.fill(str(step))
        tab.settle()
        assert tab.text(".pane .layer").startswith(layer)
        assert slider.get_attribute("aria-valuetext") == layer
        assert tab.text("#p-values b") == f"{one.similarity[0][list(one.grids).index(layer)]:.3f}"
        assert tab.value() == pytest.approx(others(one, 0, layer, 0).mean(), abs=NEAR)
        marker = tab.page.locator("#curve line.now").bounding_box()["x"]
        thumb = slider.bounding_box()
        assert thumb["x"] + 8 + step / 3 * (thumb["width"] - 16) == pytest.approx(marker, abs=1.5)
    curve = tab.page.locator("#curve").bounding_box()
    tab.page.mouse.click(curve["x"] + 34 + (curve["width"] - 50) / 3, curve["y"] + 60)
    tab.settle()
    assert tab.text(".pane .layer").startswith("block 1")


def test_everything_works_from_the_keyboard(open_page, page_of_one, one):
    tab = open_page(page_of_one)
    assert (tab.text(".pane .model"), tab.text(".pane .layer")[:4]) == ("one", "norm")
    assert "images: all 2" in tab.text("#notes")
    tab.press("ArrowLeft", "ArrowUp")
    assert tab.text("#where") == "row 1, column 1"
    assert tab.value() == pytest.approx(others(one, 0, "norm", 5).mean(), abs=NEAR)
    tab.press("Home", "k")
    assert tab.text(".pane .layer").startswith("block 1")
    tab.press("n")
    assert tab.text(IMAGE) == "1.png"
    assert tab.value() == pytest.approx(others(one, 1, "block 1", 5).mean(), abs=NEAR)
    tab.press("p", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown")
    assert tab.value() == pytest.approx(cosines(one, 1, "block 1", 5)[13], abs=NEAR)
    assert "block 1, patch row 1, column 1" in tab.page.locator("canvas.map").get_attribute("aria-label")
    tab.press("c")
    assert tab.value() == pytest.approx(abs(cosines(one, 1, "block 1", 5)[13]), abs=NEAR)
    tab.press("o")
    assert tab.colour("canvas.map", 0.9, 0.1) == [130, 130, 130]  # the image itself
    tab.press("b", "End", "j")
    assert (tab.text(IMAGE), tab.text(".pane .layer")[:7]) == ("0.png", "block 2")
    tab.press("?")
    assert tab.page.locator("#help").is_visible()
    tab.press("k")  # keys rest while the help is open
    tab.press("Escape")
    assert not tab.page.locator("#help").is_visible()
    assert tab.text(".pane .layer").startswith("block 2")


def test_letters_in_the_list_of_images_find_a_name(open_page, one):
    tab = open_page(explorer_page([replace(one, names=["n.png", "cat.png"])], []))
    tab.page.locator("#image-name").focus()
    tab.press("c")
    assert (tab.text(IMAGE), tab.page.locator("#signed").get_attribute("aria-pressed")) == ("cat.png", "true")
    tab.page.locator("canvas.map").focus()
    tab.press("c")
    assert tab.page.locator("#signed").get_attribute("aria-pressed") == "false"


def test_touch_moves_the_patch(open_page, page_of_one, one):
    tab = open_page(page_of_one, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    tab.page.touchscreen.tap(*tab.over(0.9, 0.1))
    tab.settle()
    assert tab.text("#where") == "row 0, column 3"
    assert tab.value() == pytest.approx(others(one, 0, "norm", 3).mean(), abs=NEAR)
    tab.page.locator("#pin").tap()
    touch = tab.page.context.new_cdp_session(tab.page)
    for kind, place in (("Start", (0.1, 0.1)), ("Move", (0.4, 0.6)), ("Move", (0.6, 0.9)), ("End", None)):
        points = [dict(zip("xy", tab.over(*place), strict=True))] if place else []
        touch.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})
    tab.settle()
    assert tab.text("#where") == "row 3, column 2, with pinned row 0, column 3"
    assert tab.value() == pytest.approx(cosines(one, 0, "norm", 3)[14], abs=NEAR)


def test_two_models_are_linked_also_with_other_grids_and_depths(open_page, made):
    plain = made("plain", dict.fromkeys(("embed", "block 1", "block 2", "block 3", "norm"), (4, 4)))
    staged = made("staged", {"embed": (8, 8), "block 1": (4, 4), "norm": (2, 2)}, seed=1)
    tab = open_page(explorer_page([plain, staged], []))
    tab.hover(0.6, 0.9, pane=1)
    assert tab.value(0) == pytest.approx(others(plain, 0, "norm", 14).mean(), abs=NEAR)
    assert tab.value(1) == pytest.approx(others(staged, 0, "norm", 3).mean(), abs=NEAR)
    tab.press("Home")
    assert tab.value(0) == pytest.approx(others(plain, 0, "embed", 14).mean(), abs=NEAR)
    assert tab.value(1) == pytest.approx(others(staged, 0, "embed", 7 * 8 + 4).mean(), abs=NEAR)
    tab.press("k", "k")
    assert [tab.text(".pane .layer", pane).split("\u2002")[0] for pane in (0, 1)] == ["block 2", "block 1"]
    assert tab.text("#p-values b", 1) == f"{staged.similarity[0][list(staged.grids).index('block 1')]:.3f}"
    tab.page.locator("canvas.map").nth(1).focus()
    tab.press("End", "ArrowLeft")  # a step on the grid of the map with the focus
    assert tab.value(1) == pytest.approx(others(staged, 0, "norm", 2).mean(), abs=NEAR)


def test_a_stretched_map_uses_all_colours_from_its_lowest_to_its_highest_number(open_page, one):
    near = [{name: (100 + levels // 8).astype(np.int8) for name, levels in image.items()} for image in one.cosines]
    tab = open_page(explorer_page([replace(one, cosines=near)], []))
    tab.press("s")
    tab.hover(0.1, 0.1)
    row = near[0]["norm"][0].astype(float)
    low, high = row[1:].min(), row[1:].max()
    assert tab.text("#ticks").split() == [f"{value / 127:.2f}" for value in (low, (low + high) / 2, high)]
    for patch in (row.argmin(), row[1:].argmax() + 1, 5, 10):
        part = np.round(127 * (row[patch] - low) / (high - low))  # of 127 steps, each two of the legend's
        seen = tab.colour("canvas.map", (patch % 4 + 0.5) / 4, (patch // 4 + 0.5) / 4)
        assert seen == tab.colour("#scale", (2 * part + 0.5) / 255)


def test_the_address_holds_what_is_shown_and_opens_it_again(open_page, page_of_one):
    def view(fragment: str | None = None) -> list[str]:
        if fragment is not None:
            tab.page.evaluate(f"location.hash = '{fragment}'")
            tab.settle()
        return list(map(tab.text, (IMAGE, ".pane .layer", "#where", ".reading", "#overlay-value")))

    tab = open_page(page_of_one)
    start = view()
    tab.page.locator("#image-name").select_option("1.png")
    tab.press("Home", "k", "c", "s", "ArrowUp", "p", "ArrowLeft")
    tab.page.locator("#overlay").fill("40")
    tab.page.wait_for_url(lambda url: "overlay" in url)
    shown, fragment = view(), tab.page.evaluate("location.hash")
    assert fragment == "#image=1.png&layer=block+1&patch=1-2&with=1-1&measure=absolute&contrast=stretched&overlay=40"
    assert view("") == view("image=none&layer=9&patch=x&overlay=-1") == start
    assert view(fragment) == shown != start


def test_the_picture_has_all_maps_and_the_curve_has_random_weights(open_page, one):
    random = [[0.1, 0.2, 0.25, 0.3], [0.0] * 4]  # of two images
    tab = open_page(explorer_page([replace(one, random=random), replace(one, model="other")], []))
    assert "(random weights 0.300)" in tab.text("#p-values")
    assert tab.page.locator("#curve path.random").get_attribute("d").count(",") == 4
    with tab.page.expect_download() as saved:
        tab.page.locator("#save").click()
    assert saved.value.suggested_filename == "one-norm-0.png"
    side = tab.page.locator("canvas.map").first.bounding_box()["width"]
    with Image.open(saved.value.path()) as picture:
        assert picture.width == pytest.approx(2 * side + 3 * 16, abs=2)
        assert list(picture.convert("RGB").getpixel((56, 78))) == tab.colour("canvas.map", 40 / side, 40 / side)


def test_hostile_names_are_shown_and_do_nothing(open_page, one):
    maps = replace(one, model=HOSTILE, names=[HOSTILE, HOSTILE])
    tab = open_page(explorer_page([maps, maps], [HOSTILE]))
    tab.press("p", "n", "k")
    assert tab.text(".pane .model") == HOSTILE
    assert tab.text(IMAGE) == f"{HOSTILE} (2)"  # of equal names, the second
    assert HOSTILE in tab.text("#notes")
    assert tab.page.title().endswith(HOSTILE)
    assert tab.page.locator("img[src=x], svg[onload]").count() == 0


@pytest.mark.parametrize("width", [340, 1200])
def test_a_long_name_does_not_widen_the_page(open_page, one, width):
    maps = replace(one, model="long" * 50)
    tab = open_page(explorer_page([maps, maps], ["long" * 50]), viewport={"width": width, "height": 800})
    assert tab.page.evaluate("document.documentElement.scrollWidth") == width
