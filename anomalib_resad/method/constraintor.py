# SPDX-License-Identifier: Apache-2.0

"""The feature constraintor: pulls normal residuals of all categories into one region.

Paper: ResAD (arXiv 2410.20047), section 3.3; the kinds are those of its table 2b, where Conv-BN-ReLU is the best. The
MLP is for levels of vision transformers, whose patches are no local pattern for a convolution.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

ConstraintorKind = Literal[
    "conv_bn_relu",
    "basic_block",
    "bottleneck",
    "multi_scale_fusion",
    "multi_scale_fusion+basic_block",
    "multi_scale_fusion+bottleneck",
    "mlp",
    "none",
]


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


def _conv_bn(inputs: int, outputs: int, kernel_size: int) -> nn.Sequential:
    """A convolution that keeps the size, and batch norm, which makes a bias superfluous."""
    conv = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """ResNet's basic block (arXiv 1512.03385, figure 5 left): two 3x3 convolutions beside a shortcut.

    Args:
        channels (int): Channels of the level.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv_bn(channels, channels, 3), nn.ReLU(), _conv_bn(channels, channels, 3))

    def forward(self, residual: Tensor) -> Tensor:
        """Constrain residuals, shape ``(B, C, H, W)`` in and out."""
        return F.relu(residual + self.body(residual))


class Bottleneck(nn.Module):
    """ResNet's bottleneck block (arXiv 1512.03385, figure 5 right): 1x1, 3x3 on a quarter of the channels, 1x1.

    Args:
        channels (int): Channels of the level.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = max(1, channels // 4)
        self.body = nn.Sequential(
            _conv_bn(channels, width, 1),
            nn.ReLU(),
            _conv_bn(width, width, 3),
            nn.ReLU(),
            _conv_bn(width, channels, 1),
        )

    def forward(self, residual: Tensor) -> Tensor:
        """Constrain residuals, shape ``(B, C, H, W)`` in and out."""
        return F.relu(residual + self.body(residual))


class MLP(nn.Module):
    """Two linear layers per patch, with a ReLU between them.

    It starts from the identity, as ``relu(x) - relu(-x)``: the hidden layer is twice as wide as the level.

    Args:
        channels (int): Channels of the level.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(2 * channels, channels)
        identity = torch.eye(channels)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.cat([identity, -identity]))
            self.out.weight.copy_(torch.cat([identity, -identity], dim=1))
        nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, residual: Tensor) -> Tensor:
        """Constrain residuals, shape ``(B, C, H, W)`` in and out."""
        patches = residual.permute(0, 2, 3, 1)  # (B, H, W, C)
        return self.out(F.relu(self.hidden(patches))).permute(0, 3, 1, 2)


def resize_map(features: Tensor, size: Sequence[int]) -> Tensor:
    """Bring a feature map ``(B, C, h, w)`` to another size: area averages when shrinking, bilinear when growing."""
    height, width = int(size[0]), int(size[1])
    if tuple(features.shape[-2:]) == (height, width):
        return features
    if height <= features.shape[-2]:
        return F.adaptive_avg_pool2d(features, (height, width))
    return F.interpolate(features, size=(height, width), mode="bilinear", align_corners=False)


class MultiScaleFusion(nn.Module):
    """Every level receives all levels, each brought to its size and channels, and keeps its own beside them.

    The exchange of HRNet (arXiv 1908.07919, figure 3): 1x1 convolutions with batch norm, a sum, a ReLU.

    Args:
        channels (Sequence[int]): Channels of each level.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.exchange = nn.ModuleList(
            nn.ModuleList(_conv_bn(inputs, outputs, 1) for inputs in channels) for outputs in channels
        )

    def forward(self, residuals: Sequence[Tensor]) -> list[Tensor]:
        """Fuse the levels, shape ``(B, C_l, H_l, W_l)`` in and out."""
        fused = []
        for own, converters in zip(residuals, self.exchange, strict=True):
            assert isinstance(converters, nn.ModuleList)
            resized = [resize_map(level, own.shape[-2:]) for level in residuals]
            received = [convert(level) for convert, level in zip(converters, resized, strict=True)]
            fused.append(F.relu(own + torch.stack(received).sum(dim=0)))
        return fused


BLOCKS: dict[str, type[nn.Module]] = {
    "conv_bn_relu": ConvBnReLU,
    "basic_block": BasicBlock,
    "bottleneck": Bottleneck,
    "mlp": MLP,
    "none": nn.Identity,
}


def make_constraintors(
    kind: ConstraintorKind, channels: Sequence[int]
) -> tuple[MultiScaleFusion | None, nn.ModuleList]:
    """Make the modules of one kind of constraintor.

    Args:
        kind (ConstraintorKind): The kind. ``multi_scale_fusion+basic_block`` means that the levels are fused first, and
            then each level has a basic block of its own.
        channels (Sequence[int]): Channels of each level.

    Returns:
        tuple[MultiScaleFusion | None, nn.ModuleList]: The fusion of all levels, ``None`` for kinds without one, and one
            block for each level, which may be the identity.
    """
    fusion = MultiScaleFusion(channels) if kind.startswith("multi_scale_fusion") and channels else None
    block = BLOCKS[kind.removeprefix("multi_scale_fusion").removeprefix("+") or "none"]
    return fusion, nn.ModuleList(block(count) for count in channels)
