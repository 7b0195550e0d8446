import math

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_ops
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V

from pdvit.data.augment.operations import LEVELS, MOVES, NAMES, operate

FILL = torch.tensor([124.0, 116.0, 104.0])[:, None, None]
BILINEAR = InterpolationMode.BILINEAR


def photographs(size=32):
    """Return parts of scikit-learn's photographs, one of a single level, and one of few levels."""
    from sklearn.datasets import load_sample_image

    flower, china = (torch.from_numpy(load_sample_image(name).copy()) for name in ("flower.jpg", "china.jpg"))
    parts = [image[at : at + 4 * size : 4, at : at + 4 * size : 4] for image in (flower, china) for at in (0, 100, 200)]
    parts += [torch.full((size, size, 3), 77, dtype=torch.uint8), (parts[0] // 64) * 64]
    return torch.stack(parts).permute(0, 3, 1, 2).contiguous()


def affine(image, shear=(0.0, 0.0), translate=(0, 0)):
    # torchvision's RandAugment shears by the arc tangent, around the corner
    degrees = [math.degrees(math.atan(value)) for value in shear]
    corner = [0, 0] if any(shear) else None
    return V.affine(image, 0.0, list(translate), 1.0, degrees, BILINEAR, FILL.flatten().tolist(), corner)


EXACT = ("Equalize", "Invert", "Posterize", "Solarize")
FACTORS = [0.1, 0.55, 1.0, 1.9]
REFERENCES = {
    "AutoContrast": ([0.0], lambda image, _: V.autocontrast(image)),
    "Equalize": ([0.0], lambda image, _: V.equalize(image)),
    "Invert": ([0.0], lambda image, _: V.invert(image)),
    "Posterize": ([0, 1, 3, 4], lambda image, bits: V.posterize(image, int(bits))),
    "Solarize": ([0, 26, 128, 255], lambda image, threshold: V.solarize(image, threshold)),
    "Color": (FACTORS, V.adjust_saturation),
    "Contrast": (FACTORS, V.adjust_contrast),
    "Brightness": (FACTORS, V.adjust_brightness),
    "Sharpness": (FACTORS, V.adjust_sharpness),
    "Rotate": (
        [-30.0, -7.5, 0.0, 30.0],
        lambda image, degrees: V.rotate(image, degrees, BILINEAR, fill=FILL.flatten().tolist()),
    ),
    "ShearX": ([-0.3, 0.0, 0.17], lambda image, factor: affine(image, shear=(factor, 0.0))),
    "ShearY": ([-0.3, 0.0, 0.17], lambda image, factor: affine(image, shear=(0.0, factor))),
    "TranslateX": ([-0.25, 0.0, 0.125], lambda image, share: affine(image, translate=(-share * image.shape[2], 0))),
    "TranslateY": ([-0.25, 0.0, 0.125], lambda image, share: affine(image, translate=(0, -share * image.shape[1]))),
}


def ours(name, images, values):
    arguments = torch.tensor(values)[:, None]
    return operate(images, torch.full(arguments.shape, NAMES.index(name)), arguments, FILL)


@pytest.mark.parametrize("name", REFERENCES)
def test_each_operation_is_torchvisions_image_by_image(name):
    values, reference = REFERENCES[name]
    images = photographs()
    each = [float(values[number % len(values)]) for number in range(len(images))]
    for found, image, value in zip(ours(name, images, each), images, each, strict=True):
        difference = (found.int() - reference(image, value).int()).abs()
        if name in EXACT:
            assert difference.max() == 0
        elif name in LEVELS:  # the last digit of a product decides between two levels
            assert difference.max() <= 1
        else:  # torchvision weighs pixels at the image's edge with the fill twice
            assert (difference > 1).float().mean() < 0.08
            assert (difference > 1)[:, 12:20, 12:20].sum() == 0


ARGUMENTS = {
    "Posterize": 2,
    "Solarize": 100,
    "SolarizeAdd": 70,
    "Rotate": 20.0,
    "ShearX": 0.2,
    "ShearY": -0.2,
    "TranslateXRel": 0.2,
    "TranslateYRel": -0.3,
}


@pytest.mark.parametrize("name", [*LEVELS, "Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"])
def test_each_operation_is_near_what_timm_does_with_pillow(name):
    images, value = photographs(), float(ARGUMENTS.get(name, 1.7))
    found = ours(name.removesuffix("Rel"), images, [value] * len(images))
    more = {"resample": Image.Resampling.BILINEAR, "fillcolor": tuple(int(level) for level in FILL.flatten())}
    moves = name.removesuffix("Rel") in MOVES
    for image, result in zip(images, found, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        given = [] if name in ("AutoContrast", "Equalize", "Invert") else [int(value) if value > 1.7 else value]
        given = [20.0] if name == "Rotate" else given
        expected = timm_ops.NAME_TO_OP[name](picture, *given, **(more if moves else {}))
        difference = np.abs(np.asarray(expected).astype(int) - result.permute(1, 2, 0).numpy())
        # where a moved image ends, Pillow cuts sharply
        assert np.quantile(difference, 0.9 if moves else 1.0) <= 2


def test_an_image_is_changed_alike_in_any_batch_and_is_left_alone():
    images = photographs().repeat(6, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(-1, len(NAMES), (len(images), 2), generator=generator)
    arguments = 0.1 + 0.2 * torch.rand(len(images), 2, generator=generator)
    before = images.clone()
    whole = operate(images, chosen, arguments, FILL)
    assert torch.equal(images, before)
    for size in (1, 7):
        parts = zip(*(value.split(size) for value in (images, chosen, arguments)), strict=True)
        assert torch.equal(torch.cat([operate(*part, FILL) for part in parts]), whole)
    nothing = (chosen < 0).all(1)
    assert torch.equal(whole[nothing], images[nothing])
    assert len(set(chosen.flatten().tolist())) == len(NAMES) + 1
