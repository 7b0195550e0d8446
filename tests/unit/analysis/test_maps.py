import numpy as np
import pytest
import timm
import torch

from pdvit.analysis.maps import MOST_IMAGES, Maps, map_size, picture_size, read_maps, write_maps
from pdvit.errors import UserError
from pdvit.models.layers import watch_layers

SIDE = 32


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=SIDE, patch_size=8, depth=4, embed_dim=24, num_heads=2)


@pytest.fixture(scope="module")
def staged():
    """Swin's layers: two blocks of 8x8 patches, then two of 4x4."""
    torch.manual_seed(0)
    sizes = {"img_size": SIDE, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", **sizes)


def pictures(count: int):
    generator = torch.Generator().manual_seed(0)
    return [(f"{n}.png", torch.randint(0, 256, (3, SIDE, SIDE), generator=generator).byte()) for n in range(count)]


def normalise(images):
    return images.float() / 127.5 - 1


def cosines(tokens: torch.Tensor) -> np.ndarray:
    rows = tokens.double().numpy()
    return np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in rows] for a in rows])


def tokens_of(model, image: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {}
    model.eval()
    with torch.no_grad(), watch_layers(model, lambda layer, tokens: found.update({layer.name: tokens[0]})):
        model(normalise(image[None]))
    return found


@pytest.mark.parametrize("kind", ["plain", "staged"])
def test_maps_are_the_cosines_of_the_tokens_at_each_layer(request, kind):
    model = request.getfixturevalue(kind)
    maps = read_maps(model, pictures(2), normalise, "made")
    for number, (name, pixels) in enumerate(pictures(2)):
        expected = tokens_of(model, pixels)
        assert maps.names[number] == name
        assert list(maps.cosines[number]) == list(expected) == list(maps.grids)
        assert (maps.images[number] == pixels.permute(1, 2, 0).numpy()).all()
        for place, (layer, tokens) in enumerate(expected.items()):
            exact = cosines(tokens)
            levels = maps.cosines[number][layer]
            assert levels.dtype == np.int8
            assert np.abs(levels / 127 - exact).max() <= 0.5 / 127 + 1e-5
            off = np.abs(exact[~np.eye(len(exact), dtype=bool)]).mean()
            assert maps.similarity[number][place] == pytest.approx(off, abs=1e-5)


def test_each_layer_has_its_grid(plain, staged):
    assert set(read_maps(plain, pictures(1), normalise).grids.values()) == {(4, 4)}
    assert list(read_maps(staged, pictures(1), normalise).grids.values()) == [(8, 8)] * 3 + [(4, 4)] * 3


def test_no_more_images_are_taken_than_there_is_room_for(plain):
    image = picture_size(SIDE, SIDE) + 6 * map_size(16)
    assert len(read_maps(plain, pictures(9), normalise).names) == MOST_IMAGES == 8
    assert len(read_maps(plain, pictures(9), normalise, room=3 * image + 1).names) == 3


def test_layers_are_left_out_evenly_where_one_image_does_not_fit(plain):
    maps = read_maps(plain, pictures(2), normalise, room=picture_size(SIDE, SIDE) + 3 * map_size(16))
    assert list(maps.grids) == ["embed", "block 2", "norm"]
    assert (maps.depths, maps.deepest) == ([0, 2, 5], 5)
    assert len(maps.names) == 1
    assert "block 1, block 3, block 4" in maps.notes[0]


def test_maps_that_fit_no_page_are_refused(plain):
    with pytest.raises(UserError, match="too large") as error:
        read_maps(plain, pictures(1), normalise, room=100)
    assert "larger patches" in error.value.tip


def test_layers_of_thousands_of_patches_are_left_out():
    sizes = {"img_size": 192, "patch_size": 4, "window_size": 6, "embed_dim": 4, "depths": (1, 1), "num_heads": (1, 1)}
    model = timm.create_model("swin_tiny_patch4_window7_224", **sizes)
    maps = read_maps(model, [("a", torch.zeros(3, 192, 192, dtype=torch.uint8))], normalise)
    assert list(maps.grids.values()) == [(24, 24)] * 2  # 48 x 48 = 2,304 are too many
    assert "embed, block 1" in maps.notes[0]


def test_no_image_is_an_error(plain):
    with pytest.raises(UserError, match="no image"):
        read_maps(plain, [], normalise)


def test_broken_weights_are_an_error():
    model = timm.create_model("vit_tiny_patch16_224", img_size=SIDE, patch_size=8, depth=1, embed_dim=8, num_heads=1)
    torch.nn.init.constant_(model.patch_embed.proj.weight, float("nan"))
    with pytest.raises(UserError, match="not numbers"):
        read_maps(model, pictures(1), normalise)


def test_the_file_is_what_the_figure_of_maps_reads(tmp_path):
    levels = np.array([[127, -4], [-4, 127]], dtype=np.int8)
    image = np.zeros((4, 8, 3), dtype=np.uint8)
    write_maps(
        tmp_path / "maps.npz",
        Maps("m", ["é<.png"], [image], {"block 1": (1, 2)}, [{"block 1": levels}], [[0.03]], [], [1], 2),
    )
    with np.load(tmp_path / "maps.npz", allow_pickle=False) as found:
        assert set(found) == {"names", "layers", "image/0", "cos/0/block 1", "grid/block 1"}
        assert found["names"].tolist() == ["é<.png"]
        assert found["layers"].tolist() == ["block 1"]
        assert found["grid/block 1"].tolist() == [1, 2]
        assert found["cos/0/block 1"].dtype == np.int8
        assert (found["cos/0/block 1"] == levels).all()
        assert found["image/0"].dtype == np.uint8
        assert found["image/0"].shape == (4, 8, 3)
