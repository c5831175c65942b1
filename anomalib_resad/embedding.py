# SPDX-License-Identifier: Apache-2.0

"""The default model's patch features: all levels on one grid, short keys to match them by, and how rare each is."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


def _of_length(length: float, x: Tensor) -> Tensor:
    """Scale each position of ``(B, C, H, W)`` to a length. Exported, `F.normalize` would divide in every channel."""
    return x * (length * x.square().sum(dim=1, keepdim=True).clamp(min=1e-24).rsqrt())


def distance_within(keys: Tensor) -> Tensor:
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
    batch, _, height, width = keys.shape
    margin = min(height, width) // 14
    rows, columns = (torch.arange(side, device=keys.device) for side in (height, width))
    near_rows = (rows[:, None] - rows[None, ::2]).abs() <= margin
    near_columns = (columns[:, None] - columns[None, ::2]).abs() <= margin
    near = near_rows[:, None, :, None] & near_columns[None, :, None, :]  # (H, W, H / 2, W / 2)
    highest = 1 - 2 * near.reshape(height * width, -1).to(keys)  # cosine: -1 rules out
    exporting = torch.compiler.is_compiling()
    nearest = [
        torch.minimum(part.flatten(2).transpose(1, 2) @ part[..., ::2, ::2].flatten(2), highest).amax(dim=2)
        for part in ([keys] if exporting else keys.split(1))  # one by one: the batch changes no rounding then
    ]
    return (2 - 2 * torch.cat(nearest)).clamp(min=0).reshape(batch, height, width)


class JoinedLevels(nn.Module):
    """Join the levels to one feature map, with a map of keys beside it.

    Each level is brought to the grid of the second one (stride 8 of a pyramid), normalized to unit length at each
    position, so that no level outweighs the others, and concatenated. Residuals are taken of all these channels, but
    the nearest reference is looked for in a random projection of them, which costs a fraction: random orthogonal
    directions keep distances within a few per cent (Johnson and Lindenstrauss, 1984), for any backbone, untrained.

    Args:
        channels (Sequence[int]): Channels of the levels.
        keys (int): Channels of the keys; the sum of the levels' where that is less.

    Attributes:
        channels (list[int]): Channels of the two maps.
    """

    SEED = 0

    def __init__(self, channels: Sequence[int], keys: int) -> None:
        super().__init__()
        total = sum(channels)
        keys = min(keys, total)
        self.channels = [total, keys]
        normal = torch.randn(total, keys, generator=torch.Generator().manual_seed(self.SEED))
        self.register_buffer("directions", torch.linalg.qr(normal).Q.T.reshape(keys, total, 1, 1).contiguous())
        self.directions: Tensor

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Join levels of shape ``(B, C_l, H_l, W_l)``.

        Returns:
            list[Tensor]: The joined levels, of unit length, shape ``(B, C_1 + C_2 + ..., H_2, W_2)``, and the keys,
                of unit length too, shape ``(B, keys, H_2, W_2)``.
        """
        height, width = features[min(1, len(features) - 1)].shape[-2:]
        grid = (height, width)
        share = len(features) ** -0.5
        joined = torch.cat([_of_length(share, self._on_grid(level, grid)) for level in features], dim=1)
        return [joined, _of_length(1.0, F.conv2d(joined, self.directions))]

    @staticmethod
    def _on_grid(level: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pool a finer level, enlarge a coarser one."""
        if level.shape[-2] < grid[0]:
            return F.interpolate(level, size=grid, mode="bilinear", align_corners=False)
        return level if level.shape[-2:] == grid else F.adaptive_avg_pool2d(level, grid)
