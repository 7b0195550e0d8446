"""Image files: which formats are opened, and how their EXIF says that they stand."""

from contextlib import suppress
from io import BytesIO
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

# All that is decoded: Pillow would give renamed PostScript to Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")


def open_image(file: Path | BytesIO) -> Image.Image:
    """Return an image of a supported format, whose pixels are not read yet; raises Pillow's errors."""
    return Image.open(file, formats=FORMATS)


def upright(image: Image.Image) -> Image.Image:
    """Decode an open image, and turn it as its EXIF says; EXIF that is damaged is left alone, as viewers do."""
    image.filename = ""  # type: ignore[attr-defined]  # else Pillow maps the file of a grey TIFF on its side, as noise
    image.load()
    with suppress(Exception):  # Pillow raises nearly anything
        ImageOps.exif_transpose(image, in_place=True)
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of an open image after its turn, from the header."""
    with suppress(Exception):
        exif = Image.Image.getexif(image)  # that of PNG would decode the pixels
        if exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8) and image.format != "TIFF":  # Pillow itself turns these
            return image.size[::-1]
    return image.size
