# SPDX-License-Identifier: Apache-2.0

"""The feature constraintor: pulls normal residuals of all categories into one region.

Paper: ResAD (arXiv 2410.20047), section 3.3; Conv-BN-ReLU is the best entry of its table 2b.
"""

from torch import Tensor, nn


class ConvBnReLU(nn.Module):
    """A 3x3 convolution that keeps channels and size, batch norm, ReLU.

    Args:
        channels (int): Channels of the level.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, residual: Tensor) -> Tensor:
        """Constrain residuals, shape ``(B, C, H, W)`` in and out."""
        return self.relu(self.bn(self.conv(residual)))
