import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from pdvit.analysis.explorer import bytes_per_model, map_size, picture_size, read_maps
from pdvit.analysis.pages import explorer_page
from tests.errors import refused
from tests.unit.models.support import SWIN, make, tokens_of

SIDE = 32
HOSTILE = "</script><img src=x onerror=alert(1)>&{{data}}'\""


@pytest.fixture(scope="module")
def plain():
    return make("vit_tiny_patch16_224", depth=4)


@pytest.fixture(scope="module")
def staged():
    """Swin's layers: two blocks of 8x8 patches, then two of 4x4."""
    return make(SWIN, img_size=SIDE, patch_size=4, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2))


def pictures(count: int):
    generator = torch.Generator().manual_seed(0)
    return [(f"{n}.png", torch.randint(0, 256, (3, SIDE, SIDE), generator=generator).byte()) for n in range(count)]


def normalise(images):
    return images.float() / 127.5 - 1


@pytest.mark.parametrize(("name", "grids"), [("plain", [(4, 4)] * 6), ("staged", [(8, 8)] * 3 + [(4, 4)] * 3)])
def test_maps_are_the_cosines_of_the_tokens_at_each_layer(request, name, grids):
    model = request.getfixturevalue(name)
    maps = read_maps(model, pictures(2), normalise, "made")
    assert list(maps.grids.values()) == grids
    for number, (label, pixels) in enumerate(pictures(2)):
        expected = {layer: tokens[0] for layer, tokens in tokens_of(model, normalise(pixels[None])).items()}
        assert maps.names[number] == label
        assert list(maps.cosines[number]) == list(expected) == list(maps.grids)
        assert (maps.images[number] == pixels.permute(1, 2, 0).numpy()).all()
        for place, (layer, tokens) in enumerate(expected.items()):
            rows = tokens.double().numpy()
            exact = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in rows] for a in rows])
            levels = maps.cosines[number][layer]
            assert levels.dtype == np.int8
            assert np.abs(levels / 127 - exact).max() <= 0.5 / 127 + 1e-5
            off = np.abs(exact[~np.eye(len(exact), dtype=bool)]).mean()
            assert maps.similarity[number][place] == pytest.approx(off, abs=1e-5)


def test_no_more_images_are_read_than_fit(plain):
    image = picture_size(SIDE, SIDE) + 6 * map_size(16)
    assert len(read_maps(plain, pictures(9), normalise).names) == 8
    assert len(read_maps(plain, pictures(9), normalise, max_bytes=3 * image + 1).names) == 3


def test_layers_are_left_out_evenly_if_one_image_does_not_fit(plain):
    maps = read_maps(plain, pictures(2), normalise, max_bytes=picture_size(SIDE, SIDE) + 3 * map_size(16))
    assert list(maps.grids) == ["embed", "block 2", "norm"]
    assert maps.depths == [0, 2, 5]
    assert len(maps.names) == 1
    assert "block 1, block 3, block 4" in maps.notes[0]


def test_maps_without_images_or_that_fit_no_page_are_errors(plain):
    with refused("too large", tip="larger patches"):
        read_maps(plain, pictures(1), normalise, max_bytes=100)
    with refused("no image"):
        read_maps(plain, [], normalise)
    assert bytes_per_model(2) == pytest.approx(bytes_per_model(1) / 2, abs=1)


def data_of(page: str) -> dict:
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def test_the_page_holds_every_cosine_once(plain):
    maps = read_maps(plain, pictures(2), normalise)
    data = data_of(explorer_page([maps], ["a note"]))
    assert data["names"] == ["0.png", "1.png"]
    assert data["notes"][0] == "a note"
    (model,) = data["models"]
    assert model["layers"] == list(maps.grids)
    assert model["grids"] == [[4, 4]] * 6
    above = np.triu_indices(16, 1)
    for found, by_layer in zip(model["cosines"], maps.cosines, strict=True):
        for text, levels in zip(found, by_layer.values(), strict=True):
            assert np.frombuffer(base64.b64decode(text), np.int8).tolist() == levels[above].tolist()
            assert (levels == levels.T).all()


def test_models_share_pixels_and_show_the_images_that_all_have(plain):
    maps = read_maps(plain, pictures(2), normalise)
    other = replace(maps, names=maps.names[:1], images=[255 - maps.images[0]])
    data = data_of(explorer_page([maps, maps, other], []))
    assert data["names"] == ["0.png"]
    assert [len(model["cosines"]) for model in data["models"]] == [1, 1, 1]
    assert [model["pictures"] for model in data["models"]] == [[0], [0], [1]]
    assert len(data["pictures"]) == 2


def test_eight_images_of_two_base_models_fit_into_a_page(plain):
    maps, rng = read_maps(plain, pictures(8), normalise), np.random.default_rng(0)
    levels = {f"block {number}": rng.integers(-127, 128, (196, 196)).astype(np.int8) for number in range(14)}
    noise = [rng.integers(0, 256, (224, 224, 3)).astype(np.uint8) for _ in range(8)]
    large = replace(maps, images=noise, cosines=[levels] * 8)
    other = replace(large, images=[255 - image for image in noise])
    assert len(explorer_page([large, other], []).encode()) < 10_000_000


def test_the_page_loads_nothing_runs_only_its_own_script_and_names_stay_text(parsed, plain):
    maps = read_maps(plain, [(HOSTILE, pixels) for _, pixels in pictures(1)], normalise, HOSTILE)
    page = explorer_page([maps], [HOSTILE])
    elements = parsed(page).found
    for _, attributes in elements:
        for name in ("src", "href", "action", "srcset"):
            assert attributes.get(name, "data:").startswith("data:")
    assert [tag for tag, _ in elements if tag in ("img", "script")] == ["script", "script"]
    assert page.count("</script>") == 2
    data = data_of(page)
    assert data["models"][0]["name"] == data["names"][0] == data["notes"][0] == HOSTILE
    (policy,) = [attributes["content"] for _, attributes in elements if "http-equiv" in attributes]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
