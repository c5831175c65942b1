# SPDX-License-Identifier: Apache-2.0

"""How rare a patch is within its own photo: the distance to the most similar patch elsewhere in it."""

import torch
from torch import Tensor


def self_similarity_distance(keys: Tensor) -> Tensor:
    """Squared distance of each patch to the nearest one elsewhere in its own photo.

    A few references do not show everything that a good product looks like, but what is normal tends to recur within a
    photo, and a defect does not. Elsewhere is further away than a 14th of the photo's shorter side, because what
    is next to a defect belongs to it. Every second patch of every second row stands for all of them: a quarter of
    the cost of a reference photo's.

    Args:
        keys (Tensor): Of unit length at each position, shape ``(B, K, H, W)``.

    Returns:
        Tensor: Shape ``(B, H, W)``; 4, the largest possible, where there is nothing elsewhere.
    """
    batch, count, height, width = keys.shape
    near_rows, near_columns = (_near(side, (height // 14, width // 14), keys.device) for side in (height, width))
    near = near_rows[:, None, :, None] & near_columns[None, :, None, :]  # (H, W, H / 2, W / 2)
    highest = 1 - 2 * near.reshape(height * width, -1).to(keys)  # cosine: -1 rules out
    exporting = torch.compiler.is_compiling()
    nearest = []
    for part in [keys] if exporting else keys.split(1):  # one by one: the batch changes no rounding then
        places = part.permute(0, 2, 3, 1)
        some = places[:, ::2, ::2].reshape(part.shape[0], -1, count)  # len() would fix the batch in exports
        cosines = places.reshape(part.shape[0], -1, count) @ some.transpose(1, 2)
        nearest.append(torch.minimum(cosines, highest).amax(dim=2))
    return (2 - 2 * torch.cat(nearest)).clamp(min=0).reshape(batch, height, width)


def _near(side: int, margins: tuple[int, int], device: torch.device) -> Tensor:
    """Which of every second position along a side are within both margins of each position.

    Both are asked for rather than their minimum, which OpenVINO cannot take of sides that an export leaves open.
    """
    positions = torch.arange(side, device=device)
    away = (positions[:, None] - positions[None, ::2]).abs()
    return (away <= margins[0]) & (away <= margins[1])
