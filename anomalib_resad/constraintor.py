# SPDX-License-Identifier: Apache-2.0

"""The feature constraintor: pulls normal residuals of all categories into one region.

Paper: ResAD (arXiv 2410.20047), section 3.3; Conv-BN-ReLU is the best entry of its table 2b.
"""

from torch import Tensor, nn


class ConvBnReLU(nn.Module):
    """A 3x3 convolution that keeps channels and size, batch norm, ReLU.

    It starts from the identity kernel: then the first output is how far each channel of the residual exceeds its
    usual size. From a random kernel, short training tended to map abnormal residuals to zero like normal ones.

    Args:
        channels (int): Channels of the level.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        nn.init.dirac_(self.conv.weight)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, residual: Tensor) -> Tensor:
        """Constrain residuals, shape ``(B, C, H, W)`` in and out."""
        return self.relu(self.bn(self.conv(residual)))
