import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pdvit.data.masks.table import IGNORED, OUTSIDE, ClassTable, default_palette, read_table
from pdvit.errors import UserError
from tests.unit.data.batches import grey_tiff, write

TABLE = ClassTable.of_ids({7: "sky", 3: "road", 9: "car"}, ignored=[0])
SIXTEEN = ClassTable.of_ids({value: str(value) for value in range(16)})
RED, BLUE = (255, 0, 0), (0, 0, 255)
COLOURS = ClassTable(["sky", "road"], [RED, BLUE], {}, {0xFF0000: 0, 0x0000FF: 1, 0x090909: IGNORED})


def read(table, path, mode=None):
    image = Image.open(path)
    assert mode in (None, image.mode)
    return table.read(image)


@given(
    st.lists(st.integers(0, 255), min_size=1, max_size=20, unique=True),
    st.lists(st.integers(0, 255), min_size=6, max_size=6),
)
@settings(max_examples=30, deadline=None)
def test_ids_equal_a_plain_lookup(known, values):
    image = Image.fromarray(np.array(values, np.uint8).reshape(2, 3))
    table = ClassTable.of_ids({value: str(value) for value in known})
    outside = sorted({value for value in values if value not in known and value != 255})
    if outside:
        with pytest.raises(ValueError, match=f"outside of .* id {', '.join(map(str, outside))}"):
            table.read(image)
    else:
        expected = [known.index(value) if value in known else IGNORED for value in values]
        found = table.read(image)
        assert found.dtype == torch.uint8
        assert found.tolist() == [expected[:3], expected[3:]]


def test_palette_16_bit_and_1_bit_masks_hold_ids(tmp_path):
    image = Image.fromarray(np.array([[7, 3], [0, 255]], np.uint8)).convert("L")
    image.putpalette([value for index in range(256) for value in (index, 0, 255 - index)])
    image.save(tmp_path / "voc.png")
    assert read(TABLE, tmp_path / "voc.png", "P").tolist() == [[0, 1], [IGNORED, IGNORED]]
    assert read(TABLE, write(tmp_path / "a.png", np.array([[9, 7]], np.uint16))).tolist() == [[2, 0]]
    bits = write(tmp_path / "bits.png", np.array([[True, False]]))
    assert read(ClassTable.of_ids({0: "no", 1: "yes"}), bits).tolist() == [[1, 0]]
    grey = write(tmp_path / "grey.png", np.array([[0, 255]], np.uint8))
    assert read(ClassTable.of_ids({0: "no", 255: "yes"}), grey).tolist() == [[0, 1]]


def grey_png(bits: int, row: bytes) -> bytes:
    """A PNG of four pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (grey_png(4, b"\x03\x9f"), [[0, 3, 9, 15]]),
        (grey_png(2, b"\x1b"), [[0, 1, 2, 3]]),
        (grey_tiff(4, b"\x03\x9f"), [[0, 3, 9, 15]]),
        (grey_tiff(2, b"\xe4"), [[3, 2, 1, 0]]),
        (grey_tiff(8, b"\0\x09\x0f\x01"), [[0, 9, 15, 1]]),
    ],
)
def test_grey_masks_of_2_4_and_8_bits_hold_the_values_of_the_file(tmp_path, content, expected):
    (tmp_path / "grey").write_bytes(content)
    assert read(SIXTEEN, tmp_path / "grey", "L").tolist() == expected


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_read_through_the_table(tmp_path, mode):
    pixels = np.array([[RED, BLUE], [(9, 9, 9), RED]], np.uint8)
    Image.fromarray(pixels).convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path / "mask.png")
    assert read(COLOURS, tmp_path / "mask.png", mode).tolist() == [[0, 1], [IGNORED, 0]]


@pytest.mark.parametrize(
    ("name", "pixels", "table", "message"),
    [
        ("mask.png", np.array([[9, 3007]], np.uint16), TABLE, "outside of the table of 3 classes: id 3007"),
        ("mask.png", np.array([[RED, (1, 2, 3)]], np.uint8), COLOURS, "the table of 2 classes: colour #010203"),
        ("mask.png", np.array([[RED]], np.uint8), TABLE, "RGB, where ids are expected"),
        ("mask.jpg", np.full((8, 8), 7, np.uint8), TABLE, "JPEG"),
        ("mask.tiff", np.array([[-1, 1]], np.float32), TABLE, "it is F"),
        ("mask.tiff", np.array([[-1, 1]], np.int32), TABLE, "not whole numbers"),
    ],
)
def test_masks_that_do_not_fit_the_table_are_refused(tmp_path, name, pixels, table, message):
    with pytest.raises(ValueError, match=message):
        read(table, write(tmp_path / name, pixels))


def test_the_default_colours_are_those_of_pascal_voc():
    first = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128)]
    assert default_palette(9) == [*first, (128, 128, 128), (64, 0, 0)]
    assert default_palette(256)[255] == (224, 224, 192)
    assert len(set(default_palette(OUTSIDE))) == OUTSIDE


def parsed(tmp_path, text):
    (tmp_path / "classes.tsv").write_text(text, encoding="utf-8-sig")
    return read_table(tmp_path / "classes.tsv")


def test_a_table_may_have_a_header_colours_and_ignored_classes(tmp_path):
    expected = ClassTable(["Sky", "Road"], default_palette(2), {0: 0, 1: 1, 11: IGNORED, 255: IGNORED}, {})
    assert parsed(tmp_path, "0\tSky\n1\tRoad\n11\tUnlabelled\n") == expected
    for text in ("id,name,color\n4,a,#0A0b0C\n2,b,1 2 3\n\n", "name,colour,id\na,#0a0b0c,4\nb,1 2 3,2"):
        colours = {0x0A0B0C: 0, 0x010203: 1}
        expected = ClassTable(["a", "b"], [(10, 11, 12), (1, 2, 3)], {255: IGNORED, 4: 0, 2: 1}, colours)
        assert parsed(tmp_path, text) == expected
    found = parsed(tmp_path, "name\tcolour\nsky\t#ff0000\nvoid\t#e0e0c0\nroad\t#00ff00\nvoid\t#000000\n")
    colours = {0xFF0000: 0, 0xE0E0C0: IGNORED, 0x00FF00: 1, 0x000000: IGNORED}
    assert found == ClassTable(["sky", "road"], [(255, 0, 0), (0, 255, 0)], {}, colours)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 classes"),
        ("0\ta\n1\tvoid\n", "1 classes"),
        ("".join(f"{n}\tc{n}\n" for n in range(255)), "255 classes"),
        ("0\ta\n00\tb\n", "same id: 0"),
        ("0\ta\n1\ta\n", "same name: a"),
        ("0\ta\t#000000\n1\tb\t#010101\n2\tvoid\t0 0 0\n", "same colour"),
        ("0\ta\t#000000\n1\tb\n", "colour '' of 'b'"),
        ("0\ta\n1\n", "a class of the table has no name"),
        ("-1\ta\n1\tb\n", "id '-1' of 'a'"),
        ("70000\ta\n1\tb\n", "id '70000'"),
        ("name\na\nb\n", "neither ids nor colours"),
        ("0\ta\tred\n1\tb\t#000000\n", "colour 'red' of 'a'"),
        ("0\ta\t1 2 256\n1\tb\t#000000\n", "'1 2 256' of 'a'"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        parsed(tmp_path, text)


def test_a_table_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "classes.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("classes.csv", "missing.csv"):
        with pytest.raises(UserError, match="can't be read"):
            read_table(tmp_path / name)
