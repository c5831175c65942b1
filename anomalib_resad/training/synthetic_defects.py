# SPDX-License-Identifier: Apache-2.0

"""Synthetic defects, painted on good photos: beside real ones, or in their place where there are none."""

import random

import numpy as np
import torch
from anomalib.data.utils.generators import PerlinAnomalyGenerator
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from anomalib_resad.enrollment.draws import key_of, seeded

# Share of the photos that get a defect where no training photo has a real one.
SHARE_WITHOUT_REAL = 0.5


def check_share(share: float) -> None:
    """Refuse what is no share of the good images.

    Raises:
        ValueError: If it is not within 0 to 1.
    """
    if not 0 <= share <= 1:
        msg = f"synthetic={share} must be a share of the good images, 0 to 1."
        raise ValueError(msg)


def is_painted(seed: int, epoch: int, path: str, share: float) -> bool:
    """Whether a good photo shows a synthetic defect in an epoch, for that share of the photos."""
    return share > 0 and bool(seeded(seed, epoch, key_of(path), "defect").random() < share)


def paint_photo(photo: Tensor, path: str, seed: int) -> tuple[Tensor, Tensor]:
    """The painted version of a photo, always the same one: many photos make many defects, and each can be kept.

    Args:
        photo (Tensor): Photo in 0..1 at the model's input size, shape ``(3, H, W)``.
        path (str): Its file.
        seed (int): Seed of the defects.

    Returns:
        tuple[Tensor, Tensor]: As of :func:`paint`.
    """
    with isolate_rng(include_cuda=False):
        derived = int(seeded(seed, key_of(path)).integers(2**31))
        random.seed(derived)  # the generator draws from all three
        np.random.seed(derived)  # noqa: NPY002
        torch.manual_seed(derived)
        # A new one each time: it draws one of its settings (a threshold) when it is made.
        return paint(PerlinAnomalyGenerator(anomaly_source_path=None, probability=1.0), photo)


def paint(generator: PerlinAnomalyGenerator, image: Tensor) -> tuple[Tensor, Tensor]:
    """Paint one defect.

    Half of the defects are anomalib's, patches of altered noise. The other half show the photo's own texture at the
    wrong place, mirrored, lighter or darker: as real defects do, they resemble the product more than noise does.

    Args:
        generator (PerlinAnomalyGenerator): Gives the shapes, and the noise.
        image (Tensor): Photo in 0..1, shape ``(3, H, W)``.

    Returns:
        tuple[Tensor, Tensor]: The painted photo, and where it is, shape ``(H, W)``.
    """
    height, width = image.shape[-2:]
    painted, mask = generator(image)
    shape = mask.reshape(height, width) > 0
    if torch.rand(()) < 0.5:
        return painted.clamp(0, 1), shape
    shifts = [int(torch.randint(side // 10, side - side // 10 + 1, ())) for side in (height, width)]
    texture = image.flip(1 + int(torch.randint(2, ()))).roll(shifts, (1, 2))
    mean = texture.mean(dim=(1, 2), keepdim=True)
    contrast, shift, blend = (
        float(torch.empty(()).uniform_(*limits)) for limits in ((0.6, 1.5), (-0.15, 0.15), (0.3, 1))
    )
    texture = ((texture - mean) * contrast + mean + shift).clamp(0, 1)
    return torch.where(shape, blend * texture + (1 - blend) * image, image), shape
