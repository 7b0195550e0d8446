"""All that is done to training images once they are pixels: one definition for resident sets and for worker processes.

A worker decodes and crops, which needs the original pixels; where the images lie on the device, the crop happens
there. Everything after it is the same code on the same batch. All draws are functions of (seed, epoch, sample index):
neither the batch nor the process matters. They are made on the host, where the indices are, and only small tables of
parameters go to the device; so nothing ever waits for it.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from pdvit.config.policy import Policy, parse_policy
from pdvit.config.schema import AugmentConfig
from pdvit.data.augment import draws, erase
from pdvit.data.augment.crop import DRAWS, crop_batch, crop_boxes, shift_images
from pdvit.data.augment.operations import operate
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.randomness import fold, uniform

# Where the user says nothing, for images that were decoded from files.
SCALE, HFLIP = (0.35, 1.0), 0.5


class Stream(IntEnum):
    """What a sample's numbers are drawn for."""

    CROP = 1
    FLIP = 2
    POLICY = 3
    JITTER = 4
    ERASE = 5
    NOISE = 6


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images; `scale` None is no crop, a `policy` of None no RandAugment."""

    preprocessing: Preprocessing
    seed: int
    scale: tuple[float, float] | None
    ratio: tuple[float, float]
    shift: int
    hflip: float
    policy: Policy | None
    jitter: float
    reprob: float

    @classmethod
    def of(cls, config: AugmentConfig, decoded: bool, preprocessing: Preprocessing, seed: int) -> "Augmentation":
        """Fill in what the user left open: crop and flip for decoded image files, neither for embedded sets."""
        policy = parse_policy(config.auto_augment)
        return cls(
            preprocessing,
            seed,
            config.scale or (SCALE if decoded else None),
            config.ratio,
            config.shift,
            (HFLIP if decoded else 0.0) if config.hflip is None else config.hflip,
            policy,
            0.0 if policy else config.color_jitter,  # as in timm
            config.reprob,
        )

    def describe(self) -> str:
        """Say in a few words what is done."""
        parts = [f"crop of {self.scale[0]:.0%} to {self.scale[1]:.0%}"] if self.scale else []
        parts += [f"shift by up to {self.shift}"] if self.shift else []
        parts += [f"flip {self.hflip:.0%}"] if self.hflip else []
        parts += [f"RandAugment {self.policy.magnitude}"] if self.policy else []
        parts += [f"colour jitter {self.jitter:g}"] if self.jitter else []
        parts += [f"erase {self.reprob:.0%}"] if self.reprob else []
        return ", ".join(parts) or "none"

    def boxes(self, epoch: int, index: Tensor, heights: Tensor, widths: Tensor) -> Tensor:
        """Return the crop of each image, `(B, 4)`: top, left, height, width. All arguments lie on the host."""
        assert self.scale is not None
        return crop_boxes(self._draws(Stream.CROP, epoch, index, DRAWS), heights, widths, self.scale, self.ratio)

    def crop(self, images: Tensor, epoch: int, index: Tensor) -> Tensor:
        """Crop a batch that lies on the device, uint8 `(B, 3, h, w)`, to the input size."""
        if self.scale is None:
            return images
        sides = [torch.tensor(side).expand(len(images)) for side in images.shape[2:]]
        boxes = self.boxes(epoch, index, *sides).to(images.device, non_blocking=True)
        return crop_batch(images, boxes, self.preprocessing.size, self.preprocessing.interpolation)

    def __call__(self, images: Tensor, epoch: int, index: Tensor) -> Tensor:
        """Return the model's input, float32, from uint8 images `(B, 3, size, size)`; `index` lies on the host."""
        device = images.device
        if self.shift:
            drawn = uniform(fold(self.seed, epoch), index, 2).to(device, non_blocking=True)
            images = shift_images(images, self.shift, drawn)
        if self.hflip:
            flip = self._draws(Stream.FLIP, epoch, index, 1)[:, :, None, None] < self.hflip
            images = torch.where(flip.to(device, non_blocking=True), images.flip(3), images)
        if self.policy:
            drawn = self._draws(Stream.POLICY, epoch, index, self.policy.layers * draws.DRAWS)
            images = operate(images, *draws.draw_policy(drawn, self.policy), self.preprocessing.fill(device))
        if self.jitter:
            drawn = self._draws(Stream.JITTER, epoch, index, 6)
            images = operate(images, *draws.draw_jitter(drawn, self.jitter), self.preprocessing.fill(device))
        normalised = self.preprocessing.normalise(images)
        if self.reprob:
            drawn = self._draws(Stream.ERASE, epoch, index, erase.DRAWS)
            boxes = erase.erase_boxes(drawn, self.reprob, *images.shape[2:])
            normalised = erase.erase(normalised, boxes, fold(self.seed, epoch, Stream.NOISE), index)
        return normalised

    def _draws(self, stream: Stream, epoch: int, index: Tensor, count: int) -> Tensor:
        return uniform(fold(self.seed, epoch, stream), index, count)
