# SPDX-License-Identifier: Apache-2.0

"""The default model's patch features: all levels on one grid, and short keys to match them by."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


def _of_length(length: float, x: Tensor) -> Tensor:
    """Scale each position of ``(B, C, H, W)`` to a length. Exported, `F.normalize` would divide in every channel."""
    return x * (length * x.square().sum(dim=1, keepdim=True).clamp(min=1e-24).rsqrt())


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
