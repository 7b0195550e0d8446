import errno
import io
import os
import random
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import v2

from pdvit.config.schema import AugmentConfig
from pdvit.data.augment import Augmentation
from pdvit.data.images import BadImage, read_crops, try_read
from pdvit.data.masks.table import mask_values
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.sources.split import FileSplit, ItemSplit, image_size
from tests.unit.data.batches import grey_tiff

PLAIN = Preprocessing(size=8, crop_pct=1.0, interpolation="bilinear", mean=(0.0,) * 3, std=(1.0,) * 3)


def attempt(path):
    return try_read(FileSplit([path], torch.tensor([0])), 0)


def read(path):
    image = attempt(path)
    assert isinstance(image, Image.Image), image
    assert image.mode == "RGB"
    in_memory = try_read(ItemSplit(((Image.open(path),),), [0], torch.tensor([0]), "images"), 0)
    assert np.array_equal(in_memory, image)
    return image


def colour(image):
    return np.asarray(image, dtype=int)[1, 1].tolist()


@pytest.mark.parametrize(
    ("name", "mode", "value", "expected"),
    [
        ("grey.png", "L", 100, [100, 100, 100]),
        ("bits.png", "1", 1, [255, 255, 255]),
        ("both.png", "LA", (90, 10), [90, 90, 90]),
        ("clear.png", "RGBA", (10, 20, 30, 40), [10, 20, 30]),
        ("plain.bmp", "RGB", (10, 20, 30), [10, 20, 30]),
        ("plain.webp", "RGB", (255, 255, 255), [255, 255, 255]),
        ("print.tif", "CMYK", (0, 255, 255, 0), [255, 0, 0]),
        ("print.jpg", "CMYK", (0, 0, 0, 0), [255, 255, 255]),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, name, mode, value, expected):
    Image.new(mode, (4, 4), value).save(tmp_path / name)
    assert colour(read(tmp_path / name)) == pytest.approx(expected, abs=2)


# 16 bits are scaled, not clipped: a half-bright image must not turn white.
@pytest.mark.parametrize(("value", "grey"), [(0, 0), (128 * 257, 128), (65535, 255)])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_their_brightness(tmp_path, suffix, value, grey):
    file = tmp_path / f"deep.{suffix}"
    Image.fromarray(np.full((4, 4), value, dtype=np.uint16)).save(file)
    assert colour(read(file)) == pytest.approx([grey] * 3, abs=1)


TURNED = {0: lambda p: p, 1: lambda p: p, 2: np.fliplr, 3: lambda p: np.rot90(p, 2), 4: np.flipud}
TURNED |= {
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: np.rot90(np.flipud(p)),
    8: np.rot90,
}


@pytest.mark.parametrize("form", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", TURNED)
def test_images_and_masks_are_turned_as_their_exif_says(tmp_path, form, orientation):
    photo, path, exif = photograph(96, 64), tmp_path / "turned", Image.Exif()
    photo.save(path, form, lossless=True)
    expected = Image.fromarray(TURNED[orientation](np.asarray(Image.open(path))))
    exif[ExifTags.Base.Orientation] = orientation
    photo.save(path, form, exif=exif, lossless=True)
    assert np.array_equal(read(path), expected)
    assert image_size(FileSplit([path], torch.tensor([0])), 0) == expected.size
    (crop,), (box,) = crops([path], replace(PLAIN, size=48), scale=(0.9, 0.9), hflip=0)
    cropped = v2.functional.resized_crop(expected, *box(*expected.size[::-1]), [48, 48])
    assert (v2.functional.pil_to_tensor(cropped).int() - crop).abs().float().mean() < 1
    if form in ("png", "tiff"):
        photo.convert("L").save(path, form, exif=exif)
        assert np.array_equal(mask_values(Image.open(path)), TURNED[orientation](np.asarray(photo.convert("L"))))


def test_the_range_of_a_tiff_is_its_own_or_it_is_refused(tmp_path):
    file = tmp_path / "deep.tif"
    file.write_bytes(grey_tiff(16, np.array([0, 128 * 257, 65535, 257], "<u2").tobytes(), white=True))
    assert np.asarray(read(file))[0, :, 0].tolist() == [255, 127, 0, 254]
    with pytest.raises(ValueError, match="0 is white"):
        mask_values(Image.open(file))
    file.write_bytes(grey_tiff(12, b"\x00\x0f\xff\x80\x00\x00"))  # 0x000, 0xfff, 0x800, 0x000
    assert np.asarray(read(file))[0, :, 0].tolist() == pytest.approx([0, 255, 127, 0], abs=1)
    file.write_bytes(grey_tiff(32, np.array([0, 100, 255, 70000], "<u4").tobytes()))
    assert "no known range" in attempt(file).reason


def encoded(form):
    content = io.BytesIO()
    Image.effect_noise((24, 24), 60).convert("RGB").save(content, form)
    return content.getvalue()


def bomb():
    """Return a PNG that claims to have 10^10 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"
HALVES = (encoded("JPEG")[:-200], encoded("PNG")[:-200], encoded("PNG")[:20])


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"this is text", *HALVES, bomb(), POSTSCRIPT], ids=range(8))
def test_a_file_that_does_not_decode_says_why_and_starts_no_ghostscript(tmp_path, monkeypatch, content):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("it was started"))
    file = tmp_path / "bad.png"
    file.write_bytes(content)
    bad = attempt(file)
    assert isinstance(bad, BadImage)
    assert bad.name == str(file)
    assert bad.reason


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"])
def test_no_damage_ends_in_a_traceback(tmp_path, form):
    rng, sound, file = random.Random(0), encoded(form), tmp_path / "damaged.png"
    for _ in range(150):
        content = bytearray(sound)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(min(len(content), rng.choice([64, 4096])))] = rng.randrange(256)
        file.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
        assert isinstance(attempt(file), Image.Image | BadImage)


def crops(paths, preprocessing, **settings):
    """Return the crops of image files, and the functions from their sizes to the boxes of these."""
    split, index = FileSplit(paths, torch.zeros(len(paths), dtype=torch.long)), torch.arange(len(paths))
    augmentation = Augmentation.for_split(split, AugmentConfig(**settings), preprocessing, 3)
    samples = read_crops(augmentation, split, 0, index.tolist())
    return [image for image, _, _ in samples], augmentation.crop_boxes(0, index)


def photograph(*size):
    """Return one of scikit-learn's photographs."""
    return Image.fromarray(load_sample_image("flower.jpg")).resize(size)


# A JPEG is decoded at half its size where the crop is twice the input: not the same pixels, but near them.
@pytest.mark.parametrize(("form", "size", "step", "mean"), [("PNG", (96, 64), 1, 0.05), ("JPEG", (200, 160), 2, 2.5)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_pixels_of_a_crop_are_those_of_torchvision(tmp_path, form, size, step, mean, interpolation):
    path = tmp_path / "photograph"
    photograph(*size).save(path, form)
    how = Preprocessing(48, 1.0, interpolation, (0.0,) * 3, (1.0,) * 3)
    found, boxes = crops([path] * 8, how, scale=(0.5, 0.9))
    whole, mode = Image.open(path), v2.InterpolationMode(interpolation)
    expected = []
    for top, left, tall, wide in (box(*size[::-1]) for box in boxes):
        edges = [round(edge / step) * step for edge in (top, left, top + tall, left + wide)]
        box = (*edges[:2], edges[2] - edges[0], edges[3] - edges[1])
        expected.append(v2.functional.pil_to_tensor(v2.functional.resized_crop(whole, *box, [48, 48], mode)))
    difference = (torch.stack(expected).int() - torch.stack(found)).abs().float()
    assert difference.mean() < mean
    assert difference.max() <= (4 if step == 1 else 60)


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_a_machine_that_runs_short_is_not_taken_for_a_bad_image(error, monkeypatch):
    def run_short(split, index):
        raise error

    monkeypatch.setattr(FileSplit, "open", run_short)
    with pytest.raises(type(error)):
        try_read(FileSplit([Path("0.png")], torch.tensor([0])), 0)


def test_a_pipe_is_a_bad_image_and_nothing_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "0.png")
    assert attempt(tmp_path / "0.png").reason == "it is a pipe, not a file"
