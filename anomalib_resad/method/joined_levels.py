# SPDX-License-Identifier: Apache-2.0

"""The default model's patch features: all levels on one grid, short keys to match them by, and neighborhoods.

Inside, positions come before channels, ``(B, H, W, C)``: that is how rows of a bank lie, and lengths are summed along
memory. What is returned is a view in PyTorch's order.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_resad.enrollment.neighborhoods import SIDE, STEP
from anomalib_resad.method.features import Features


def neighborhoods_of(keys: Tensor) -> Tensor:
    """Mean keys of neighborhoods, which see what single patches miss: where normal patches lie that belong elsewhere.

    Args:
        keys (Tensor): Shape ``(B, K, H, W)``.

    Returns:
        Tensor: Of unit length, shape ``(B, K, H / 2 - 1, W / 2 - 1)``, and at least 1 a side.
    """
    sides = [min(SIDE, side) if isinstance(side, int) else SIDE for side in keys.shape[-2:]]  # of an export: symbols
    means = F.avg_pool2d(keys, sides, STEP)
    return means / torch.linalg.vector_norm(means, dim=1, keepdim=True).clamp(min=1e-12)


def _of_length(length: float, x: Tensor) -> Tensor:
    """Scale vectors along the last axis. Exported, `F.normalize` would divide in every channel."""
    return x * (length / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12))


class JoinedLevels(nn.Module):
    """Join the levels to one feature map, with a map of keys beside it.

    Each level is brought to the grid of the second one (stride 8 of a pyramid), normalized to unit length at each
    position, so that no level outweighs the others, and concatenated. Residuals are taken of all these channels, but
    the nearest reference is looked for in a projection of them, which costs a fraction. Its directions are the first
    principal ones of the source's features (:meth:`learn`); before that they are random and orthogonal, which keeps
    distances too, but takes twice as many (Johnson and Lindenstrauss, 1984).

    Args:
        channels (Sequence[int]): Channels of the levels.
        keys (int): Channels of the keys; the sum of the levels' where that is less.

    Attributes:
        channels (list[int]): Channels of the two maps.
        learned (Tensor): Whether the directions were learned.
    """

    SEED = 0

    def __init__(self, channels: Sequence[int], keys: int) -> None:
        super().__init__()
        total = sum(channels)
        keys = min(keys, total)
        self.channels = [total, keys]
        normal = torch.randn(total, keys, generator=torch.Generator().manual_seed(self.SEED))
        self.register_buffer("directions", torch.linalg.qr(normal).Q.T.contiguous())
        self.register_buffer("learned", torch.tensor(False))
        self.directions: Tensor
        self.learned: Tensor

    def forward(self, levels: Sequence[Tensor]) -> Features:
        """Join levels of shape ``(B, C_l, H_l, W_l)``.

        Returns:
            Features: One level of unit length, shape ``(B, C_1 + C_2 + ..., H_2, W_2)``, its keys, of unit length too,
                shape ``(B, keys, H_2, W_2)``, and their neighborhoods.
        """
        height, width = levels[min(1, len(levels) - 1)].shape[-2:]
        grid = (height, width)
        share = len(levels) ** -0.5
        # Channels last before a level grows, for PyTorch. Then positions on one axis, for OpenVINO: for maps with two
        # it chooses a layout that it leaves at a cost. Channels are moved before that, which costs nothing there.
        last = [level.contiguous(memory_format=torch.channels_last) for level in levels]
        places = [self._on_grid(level, grid).permute(0, 2, 3, 1).flatten(1, 2) for level in last]
        joined = torch.cat([_of_length(share, level) for level in places], dim=-1)
        keys = _of_length(1.0, joined @ self.directions.T)
        joined, keys = (rows.unflatten(1, grid).permute(0, 3, 1, 2) for rows in (joined, keys))
        return Features([joined], keys, neighborhoods_of(keys))

    def with_keys(self, joined: Tensor) -> Features:
        """Features of levels that were joined before, shape ``(B, C, H, W)``."""
        places = joined.permute(0, 2, 3, 1).flatten(1, 2)
        keys = _of_length(1.0, places @ self.directions.T).unflatten(1, joined.shape[-2:]).permute(0, 3, 1, 2)
        return Features([joined], keys, neighborhoods_of(keys))

    @torch.no_grad()
    def learn(self, photos: Iterable[Tensor]) -> None:
        """Take the principal directions of good photos, without removing the mean, which is part of a cosine.

        Args:
            photos (Iterable[Tensor]): Joined levels of good photos, shape ``(B, C, H, W)`` each.
        """
        moment = torch.zeros(self.channels[0], self.channels[0], dtype=torch.float64)
        for joined in photos:
            rows = joined.permute(0, 2, 3, 1).flatten(0, 2)
            moment += (rows.T @ rows / len(rows)).cpu().double()
        _, vectors = torch.linalg.eigh(moment)  # ascending
        self.directions.copy_(vectors[:, -self.channels[1] :].flip(1).T)
        self.learned.fill_(True)

    @staticmethod
    def _on_grid(level: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pool a finer level, enlarge a coarser one."""
        if level.shape[-2] < grid[0]:
            return F.interpolate(level, size=grid, mode="bilinear", align_corners=False)
        if level.shape[-2:] == grid and not torch.compiler.is_compiling():
            return level  # exported, it is pooled one by one: OpenVINO rearranges what comes from a convolution itself
        times = level.shape[-2] // grid[0]
        if level.shape[-2:] == (times * grid[0], times * grid[1]):
            return F.avg_pool2d(level, times)  # the same numbers; OpenVINO has a fast one of these only
        return F.adaptive_avg_pool2d(level, grid)
