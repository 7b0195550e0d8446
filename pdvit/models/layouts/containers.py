"""Files that are no state dict, named for what they are, by their content."""

import re
import zipfile
from pathlib import Path

from pdvit.errors import UserError

ZIP = b"PK\3\4"
STARTS = (  # regular expression for the first bytes, what it is, and what to do
    (rb"version https://git-lfs", "a pointer of git-lfs, not the file that it stands for", "run: git lfs pull"),
    (
        rb"\s*<(?:!doctype|html|\?xml)",
        "a web page, not weights",
        "download the file itself: open the address in a browser",
    ),
    (rb"GGUF", "a GGUF file, whose weights are for llama.cpp", "use the weights that it was made from"),
    (rb"\x89HDF", "an HDF5 file, as of Keras", "save the weights with torch or safetensors"),
    (rb"\x08[\x01-\x1f][\x12\x1a\x22\x2a\x32\x3a\x42]", "an ONNX model", "use the weights that it was exported from"),
)
PARTS = (  # a name in the zip, likewise
    (
        r"/constants\.pkl$",
        "a model of TorchScript",
        "save its weights alone: torch.save(torch.jit.load('FILE').state_dict(), 'weights.pt')",
    ),
    (
        r"(?:^|/)(?:serialized_exported_program\.json|archive_format)$",
        "a program of torch.export",
        "save its weights alone: torch.save(torch.export.load('FILE').state_dict, 'weights.pt')",
    ),
    (r"(?:^|/)data\.pkl$|\.npy$", "", ""),  # torch.save, and NumPy
    (r"", "a zipped folder", "unpack it, and name the folder"),
)


def refuse_container(file: Path, where: str) -> None:
    """Raise UserError if a file is of a known format that holds no state dict."""
    with file.open("rb") as opened:
        start = opened.read(64)
    found = next(((what, tip) for pattern, what, tip in STARTS if re.match(pattern, start, re.IGNORECASE)), ("", ""))
    if start.startswith(ZIP) and zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        for pattern, *found_in_zip in PARTS:
            if any(re.search(pattern, name) for name in names):
                found = (found_in_zip[0], found_in_zip[1])
                break
    what, tip = found
    if what:
        raise UserError(f"it is {what}", where, tip.replace("FILE", file.name))
