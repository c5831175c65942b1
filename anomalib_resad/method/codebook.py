# SPDX-License-Identifier: Apache-2.0

"""Codebook of normal residuals, and distribution matching, so that residuals of a new product look familiar.

ResAD++ (arXiv 2509.23741), as in its published code: a vector-quantization codebook (VQ-VAE, arXiv 1711.00937) learns
what normal residuals look like; then, per image and channel, the sorted residuals move part of the way to their sorted
quantized ones (exact feature distribution matching, EFDM, CVPR 2022, arXiv 2203.07740).
"""

import torch
from torch import Tensor, nn

from anomalib_resad.method.distributed import take_from_first
from anomalib_resad.method.reference_bank import nearest, nearest_rows

SPLIT = 4096  # residuals that are compared with all codes at once, which bounds the memory


def codebook_loss(rows: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
    """Mean square of the differences between normal residuals and their nearest codes.

    VQ-VAE's commitment term is left out: it would pull an encoder towards the codes, and residuals of a frozen
    backbone have none. (The published code keeps it, a constant factor of 1.25 on the value.)

    Args:
        rows (Tensor): Residuals, shape ``(N, C)``.
        codes (Tensor): Codebook, shape ``(K, C)``.
        mask (Tensor): 1 for abnormal positions, shape ``(N,)``.

    Returns:
        Tensor: The loss, a scalar; 0 where there is no normal position.
    """
    normal = rows[mask == 0]
    index = torch.cat([nearest_rows(part, codes.detach()) for part in normal.split(SPLIT)])
    nearest = codes[index]
    return (nearest - normal).square().sum() / max(normal.numel(), 1)


def match_distribution(residual: Tensor, quantized: Tensor, strength: float) -> Tensor:
    """Move each value of a channel towards the value of the same rank among the quantized ones (EFDM).

    Each image is matched on its own. Residuals of exactly zero (where a ReLU silenced both the patch and its match)
    have no order among themselves; they share the mean of their targets, else the result would depend on how a
    runtime's sort breaks ties.

    Args:
        residual (Tensor): Residuals, shape ``(B, C, H, W)``.
        quantized (Tensor): Their nearest codes, of the same shape.
        strength (float): Share of the way, 0 for none and 1 for the quantized distribution; the published code's
            ``1 - alpha``.

    Returns:
        Tensor: Matched residuals, shape ``(B, C, H, W)``.
    """
    values, order = residual.flatten(2).sort(dim=2)  # (B, C, H * W)
    targets = quantized.flatten(2).sort(dim=2).values
    tied = (values == 0).to(values.dtype)
    shared = (targets * tied).sum(dim=2, keepdim=True) / tied.sum(dim=2, keepdim=True).clamp(min=1)
    targets = torch.where(values == 0, shared, targets)
    # Put the values back where they came from: a scatter, not a second sort, for 0.7 of the time.
    moved = torch.zeros_like(values).scatter(2, order, torch.lerp(values, targets, strength))
    return moved.reshape(residual.shape)


class Codebook(nn.Module):
    """Codes of one level's normal residuals.

    Args:
        channels (int): Channels of the level.
        size (int): Number of codes; 1536 in the published code.
    """

    def __init__(self, channels: int, size: int = 1536) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.rand(size, channels) / size)
        self.register_buffer("started", torch.tensor(0.0))
        self.started: Tensor

    @torch.no_grad()
    def start_from(self, rows: Tensor, mask: Tensor) -> None:
        """Take the first codes from normal residuals, once.

        Random codes would have to travel to the residuals in steps of the learning rate, and most would never be the
        nearest of any.

        Args:
            rows (Tensor): Residuals, shape ``(N, C)``.
            mask (Tensor): 1 for abnormal positions, shape ``(N,)``.
        """
        if self.started:
            return
        normal = rows[mask == 0]
        if normal.shape[0] > 0:
            chosen = torch.randint(normal.shape[0], (self.codes.shape[0],), device=normal.device)
            self.codes.copy_(normal[chosen])
            self.started.fill_(1.0)
        take_from_first(self.codes, self.started)

    def forward(self, residual: Tensor) -> Tensor:
        """Replace each residual by its nearest code, shape ``(B, C, H, W)`` in and out."""
        return nearest(residual, self.codes.detach(), "l2")
