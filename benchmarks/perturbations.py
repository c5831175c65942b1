# SPDX-License-Identifier: Apache-2.0

"""What can happen to photos between enrollment and inspection, as torchvision transforms."""

from typing import Any

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

BAD_REFERENCE = "bad_reference"
MARGIN = 0.25  # of the shorter side; enough for rotations up to 20 degrees


class Rotate(v2.Transform):
    """Rotate a photo and its mask about the center; mirrored content fills the corners, since black ones are defects.

    Args:
        degrees (float): Angle.
    """

    def __init__(self, degrees: float) -> None:
        super().__init__()
        self.degrees = degrees

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:  # noqa: ANN401  # torchvision's signature
        """Pad by mirroring, rotate, cut the middle."""
        del params
        height, width = functional.get_size(inpt)
        margin = int(MARGIN * min(height, width))
        padded = functional.pad(inpt, [margin], padding_mode="reflect")
        rotated = functional.rotate(padded, self.degrees, interpolation=v2.InterpolationMode.BILINEAR)
        return functional.center_crop(rotated, [height, width])


def perturbation(condition: str, level: float) -> v2.Transform:
    """The transform of a condition.

    Args:
        condition (str): ``noise`` (standard deviation, photos in 0..1), ``blur`` (sigma in pixels), ``brightness``
            (factor), ``jpeg`` (quality 1..100), or ``rotation`` (degrees).
        level (float): How strongly.

    Raises:
        ValueError: If there is no such condition.
    """
    if condition == "noise":
        return v2.GaussianNoise(sigma=level)
    if condition == "blur":
        return v2.GaussianBlur(kernel_size=2 * int(3 * level) + 1, sigma=level)
    if condition == "brightness":
        return v2.ColorJitter(brightness=(level, level))
    if condition == "jpeg":
        to_bytes, to_floats = v2.ToDtype(torch.uint8, scale=True), v2.ToDtype(torch.float32, scale=True)
        return v2.Compose([to_bytes, v2.JPEG(int(level)), to_floats])
    if condition == "rotation":
        return Rotate(level)
    msg = f"condition '{condition}' is not known; use noise, blur, brightness, jpeg, rotation or {BAD_REFERENCE}."
    raise ValueError(msg)
