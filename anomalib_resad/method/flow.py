# SPDX-License-Identifier: Apache-2.0

"""The feature distribution estimator: a RealNVP-type flow per level, conditioned on the patch position.

Paper: ResAD (arXiv 2410.20047), section 3.4, after CFLOW-AD. The flow itself is FrEIA's.
"""

import math
import warnings
from typing import Any

import torch
from FrEIA.framework import SequenceINN
from FrEIA.modules import AllInOneBlock
from torch import Tensor, nn

SOFT_CLAMP = 1.9


def position_encoding(channels: int, height: int, width: int) -> Tensor:
    """Sine and cosine encoding of a grid: the first half of the channels for the column, the second for the row.

    Args:
        channels (int): Number of channels, a multiple of 4.
        height (int): Rows of the grid.
        width (int): Columns of the grid.

    Returns:
        Tensor: Encoding, shape ``(height * width, channels)``, row by row.

    Raises:
        ValueError: If ``channels`` is not a multiple of 4.
    """
    if channels % 4 or channels < 4:
        msg = f"The position condition needs a positive multiple of 4 channels, got {channels}."
        raise ValueError(msg)
    half = channels // 2
    frequencies = torch.exp(torch.arange(0, half, 2, dtype=torch.float64) * -(math.log(1e4) / half))

    def encode(count: int) -> Tensor:
        angles = torch.arange(count, dtype=torch.float64)[:, None] * frequencies  # (count, half / 2)
        return torch.stack((angles.sin(), angles.cos()), dim=2).reshape(count, half)

    columns = encode(width)[None].expand(height, -1, -1)
    rows = encode(height)[:, None].expand(-1, width, -1)
    return torch.cat((columns, rows), dim=2).reshape(height * width, channels).float()


class CouplingBlock(AllInOneBlock):
    """FrEIA's block, with a method where it has a lambda, so that the model can be pickled (``export_type torch``)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, global_affine_type="SOFTPLUS", **kwargs)
        del self.global_scale_activation

    def global_scale_activation(self, scale: Tensor) -> Tensor:
        """FrEIA's SOFTPLUS activation of the global scale."""
        return 0.1 * self.softplus(scale)


def _subnet(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 2 * inputs), nn.ReLU(), nn.Linear(2 * inputs, outputs))


class PositionFlow(nn.Module):
    """A normalizing flow over patch vectors of one level that knows where each patch stands.

    Args:
        channels (int): Channels of the level.
        coupling_layers (int): Number of coupling layers; 8 in the paper, 10 in ResAD++.
        position_channels (int): Channels of the position condition; 256 in the paper, 0 for none.
    """

    def __init__(self, channels: int, coupling_layers: int = 8, position_channels: int = 256) -> None:
        super().__init__()
        self.channels = channels
        self.position_channels = position_channels
        condition = {"cond": 0, "cond_shape": (position_channels,)} if position_channels else {}
        self.blocks = SequenceINN(channels)
        with warnings.catch_warnings():
            # FrEIA warns that soft permutations of more than 512 channels are slow to draw: 0.4 s each at 1024.
            warnings.filterwarnings("ignore", message="Soft permutation")
            for _ in range(coupling_layers):
                self.blocks.append(
                    CouplingBlock,
                    subnet_constructor=_subnet,
                    affine_clamping=SOFT_CLAMP,
                    permute_soft=True,
                    **condition,
                )
        self._grid = (0, 0)
        self.register_buffer("_positions", torch.zeros(0, position_channels), persistent=False)

    def positions(self, height: int, width: int) -> Tensor:
        """Position encoding of a grid, kept from call to call, shape ``(H * W, position_channels)``."""
        if self._grid == (height, width):
            return self.get_buffer("_positions")
        encoding = position_encoding(self.position_channels, height, width).to(self.get_buffer("_positions").device)
        if not torch.compiler.is_compiling():
            self._grid = (height, width)
            self.register_buffer("_positions", encoding, persistent=False)
        return encoding

    def transform(self, vectors: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map vectors to the latent space.

        Args:
            vectors (Tensor): Patch vectors, shape ``(N, C)``.
            positions (Tensor | None): Their position encodings, shape ``(N, P)``.

        Returns:
            tuple[Tensor, Tensor]: Latent vectors ``(N, C)`` and log-determinants of the Jacobian ``(N,)``.
        """
        return self.blocks(vectors, [positions] if self.position_channels else None)

    def log_likelihood(self, vectors: Tensor, positions: Tensor | None) -> Tensor:
        """Log-likelihood per channel: ``log p(x) / C`` with a standard normal latent, shape ``(N,)``.

        Dividing by the channels keeps levels of different width on one scale.
        """
        return self.log_likelihoods(vectors, positions)[0]

    def log_likelihoods(self, vectors: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-likelihoods per channel under the normal Gaussian N(0, I) and the abnormal one, N(1, I) (ResAD++).

        Args:
            vectors (Tensor): Patch vectors, shape ``(N, C)``.
            positions (Tensor | None): Their position encodings, shape ``(N, P)``.

        Returns:
            tuple[Tensor, Tensor]: Both of shape ``(N,)``.
        """
        latent, log_det = self.transform(vectors, positions)
        log_p = log_det - 0.5 * (latent.square().sum(dim=1) + self.channels * math.log(2 * math.pi))
        # ||z - 1||^2 = ||z||^2 - 2 sum(z) + C
        toward_abnormal = latent.sum(dim=1) - 0.5 * self.channels
        return log_p / self.channels, (log_p + toward_abnormal) / self.channels

    def maps(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Both log-likelihoods of a feature map: ``(B, C, H, W)`` to twice ``(B, H, W)``, in nats per channel."""
        batch, channels, height, width = features.shape
        vectors = features.permute(0, 2, 3, 1).reshape(-1, channels)
        positions = self.positions(height, width).repeat(batch, 1) if self.position_channels else None
        normal, abnormal = self.log_likelihoods(vectors, positions)
        return normal.reshape(batch, height, width), abnormal.reshape(batch, height, width)

    def forward(self, features: Tensor) -> Tensor:
        """Log-likelihood map of a feature map: ``(B, C, H, W)`` to ``(B, H, W)``, in nats per channel."""
        return self.maps(features)[0]
