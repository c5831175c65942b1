# SPDX-License-Identifier: Apache-2.0

"""Everything of a model that needs no references: photo to features."""

from torch import Tensor, nn

from anomalib_resad.method.backbone import FeaturePyramid
from anomalib_resad.method.features import Features
from anomalib_resad.method.joined_levels import JoinedLevels


class Encoder(nn.Module):
    """The frozen backbone, and behind it the joining of its levels, if they are to be joined.

    Args:
        backbone (FeaturePyramid): The backbone.
        key_channels (int): Channels of the keys by which joined levels are searched; 0 leaves the levels apart.

    Attributes:
        channels (list[int]): Channels of each level of the features.
        key_channels (int): Channels of the keys, at most those of all levels together; 0 where there are none.
    """

    def __init__(self, backbone: FeaturePyramid, key_channels: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        self.join = JoinedLevels(backbone.channels, key_channels) if key_channels else None
        self.channels = list(backbone.channels) if self.join is None else self.join.channels[:1]
        self.key_channels = 0 if self.join is None else self.join.channels[1]

    def forward(self, images: Tensor) -> Features:
        """Encode normalized images, shape ``(B, 3, H, W)``."""
        levels = self.backbone(images)
        return Features(levels) if self.join is None else self.join(levels)
