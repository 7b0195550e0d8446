import re
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pdvit.data.masks.table import IGNORED, OUTSIDE, ClassTable, default_palette

TABLE = ClassTable.of_ids({7: "sky", 3: "road", 9: "car"}, ignored=[0])
RED, BLUE = (255, 0, 0), (0, 0, 255)
COLOURS = ClassTable(["sky", "road"], [RED, BLUE], None, {RED: 0, BLUE: 1, (9, 9, 9): IGNORED})


def mode_of(path):
    with Image.open(path) as image:
        return image.mode


@given(
    st.lists(st.integers(0, 255), min_size=1, max_size=20, unique=True),
    st.lists(st.integers(0, 255), min_size=6, max_size=6),
)
@settings(max_examples=30, deadline=None)
def test_ids_equal_a_plain_lookup(tmp_path_factory, known, values):
    path = tmp_path_factory.mktemp("masks") / "mask.png"
    Image.fromarray(np.array(values, np.uint8).reshape(2, 3)).save(path)
    table = ClassTable.of_ids({value: str(value) for value in known})
    outside = sorted({value for value in values if value not in known and value != 255})
    if outside:
        with pytest.raises(ValueError, match=rf"ids? {', '.join(map(str, outside))} (is|are) outside"):
            table.read(path)
    else:
        expected = [known.index(value) if value in known else IGNORED for value in values]
        found = table.read(path)
        assert found.dtype == torch.uint8
        assert found.tolist() == [expected[:3], expected[3:]]


def test_a_palette_image_gives_its_indices_and_255_is_ignored(tmp_path):
    image = Image.fromarray(np.array([[7, 3], [0, 255]], np.uint8)).convert("L")
    image.putpalette([value for index in range(256) for value in (index, 0, 255 - index)])
    image.save(tmp_path / "voc.png")
    assert mode_of(tmp_path / "voc.png") == "P"
    assert TABLE.read(tmp_path / "voc.png").tolist() == [[0, 1], [IGNORED, IGNORED]]


def test_16_bits_hold_ids_and_what_is_beyond_the_table_is_named(write, tmp_path):
    assert TABLE.read(write(tmp_path / "a.png", np.array([[9, 7]], np.uint16))).tolist() == [[2, 0]]
    with pytest.raises(ValueError, match="id 3007 is outside of the table of 3 classes"):
        TABLE.read(write(tmp_path / "b.png", np.array([[9, 3007]], np.uint16)))


def test_one_bit_masks_hold_two_classes_and_255_may_be_one(write, tmp_path):
    path = tmp_path / "bits.png"
    Image.fromarray(np.array([[True, False]])).save(path)
    assert ClassTable.of_ids({0: "no", 1: "yes"}).read(path).tolist() == [[1, 0]]
    grey = write(tmp_path / "grey.png", np.array([[0, 255]], np.uint8))
    assert ClassTable.of_ids({0: "no", 255: "yes"}).read(grey).tolist() == [[0, 1]]


@pytest.mark.parametrize(("bits", "row"), [(4, b"\x03\x9f"), (2, b"\x1b")])
def test_grey_masks_of_2_and_4_bits_hold_the_values_of_the_file(tmp_path, bits, row):
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0" + row)),
        (b"IEND", b""),
    ]
    path = tmp_path / "grey.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    assert mode_of(path) == "L"
    table = ClassTable.of_ids({value: str(value) for value in range(16)})
    assert table.read(path).tolist() == [[0, 3, 9, 15] if bits == 4 else [0, 1, 2, 3]]


def grey_tiff(bits: int, rows: list[bytes]) -> bytes:
    """A TIFF of four pixels a row, without compression: header, strips of a row, their places and lengths, and tags."""
    count, start, strips = len(rows), 8, b"".join(rows)
    places = [start + sum(map(len, rows[:at])) for at in range(count)]
    lists = struct.pack(f"<{2 * count}I", *places, *map(len, rows))
    at = start + len(strips)
    numbers = {256: 4, 257: count, 258: bits, 259: 1, 262: 1, 277: 1, 278: 1}  # size, bits, raw, black is zero
    tags = {tag: (3, 1, value) for tag, value in numbers.items()}
    tags |= {273: (4, count, at), 279: (4, count, at + 4 * count)}
    body = b"".join(struct.pack("<HHII", tag, *tags[tag]) for tag in sorted(tags))
    header = struct.pack("<2sHI", b"II", 42, at + len(lists))
    return header + strips + lists + struct.pack("<H", len(tags)) + body + struct.pack("<I", 0)


@pytest.mark.parametrize(
    ("bits", "rows", "expected"),
    [
        (4, [b"\x03\x9f", b"\xf0\x12"], [[0, 3, 9, 15], [15, 0, 1, 2]]),
        (2, [b"\x1b", b"\xe4"], [[0, 1, 2, 3], [3, 2, 1, 0]]),
        (8, [b"\0\x09\x0f\x01", b"\x0f\x0e\x0d\x0c"], [[0, 9, 15, 1], [15, 14, 13, 12]]),
    ],
)
def test_a_tiff_of_several_strips_holds_the_values_of_the_file(tmp_path, bits, rows, expected):
    (tmp_path / "grey.tiff").write_bytes(grey_tiff(bits, rows))
    table = ClassTable.of_ids({value: str(value) for value in range(16)})
    assert table.read(tmp_path / "grey.tiff").tolist() == expected


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_read_through_the_table(tmp_path, mode):
    pixels = np.array([[RED, BLUE], [(9, 9, 9), RED]], np.uint8)
    Image.fromarray(pixels).convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path / "mask.png")
    assert mode_of(tmp_path / "mask.png") == mode
    assert COLOURS.read(tmp_path / "mask.png").tolist() == [[0, 1], [IGNORED, 0]]


def test_a_colour_outside_of_the_table_is_named(write, tmp_path):
    path = write(tmp_path / "mask.png", np.array([[RED, (1, 2, 3)]], np.uint8))
    with pytest.raises(ValueError, match="colour #010203 is outside of the table of 2 classes"):
        COLOURS.read(path)


def test_colours_where_ids_are_expected_are_refused(write, tmp_path):
    path = write(tmp_path / "mask.png", np.array([[RED]], np.uint8))
    with pytest.raises(ValueError, match="RGB, where ids are expected"):
        TABLE.read(path)


def test_a_jpeg_is_refused(write, tmp_path):
    path = tmp_path / "mask.jpg"
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(path)
    with pytest.raises(ValueError, match="JPEG"):
        TABLE.read(path)


@pytest.mark.parametrize(("dtype", "message"), [(np.float32, "it is F"), (np.int32, re.escape("no whole numbers"))])
def test_what_holds_no_ids_is_refused(tmp_path, dtype, message):
    path = tmp_path / "mask.tiff"
    Image.fromarray(np.array([[-1, 1]], dtype)).save(path)
    with pytest.raises(ValueError, match=message):
        TABLE.read(path)


def test_the_default_colours_are_those_of_pascal_voc():
    first = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128)]
    assert default_palette(9) == [*first, (128, 128, 128), (64, 0, 0)]
    assert default_palette(256)[255] == (224, 224, 192)
    assert len(set(default_palette(OUTSIDE))) == OUTSIDE


def test_a_table_is_another_by_what_it_means_and_not_by_its_colours():
    assert TABLE.identity() == ClassTable(TABLE.names, [RED] * 3, TABLE.ids).identity()
    assert TABLE.identity() != ClassTable.of_ids({7: "sky", 3: "road", 9: "car"}).identity()
    assert TABLE.identity() != ClassTable.of_ids({7: "sky", 3: "road", 9: "bus"}, ignored=[0]).identity()
