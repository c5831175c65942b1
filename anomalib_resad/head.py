# SPDX-License-Identifier: Apache-2.0

"""The default model's trainable part: what residuals look like where a photo is defective, beside how long they are."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_resad.reference_bank import to_rows

# Squared length below which two patches count as equal, so that the logarithm stays finite.
EQUAL = 1e-3


class FusedHead(nn.Module):
    """Anomaly of each patch: the abnormal class's logit plus the logarithm of the distance, both standardized.

    The distance alone is strong on products that were never seen, and a classifier alone is not: it overfits to the
    few source categories. Each compensates for the other's weakness, so both count the same, in units of their
    standard deviation over normal source patches. The classifier sees magnitudes of residuals, channel by channel, not
    their signs: which side of its reference a patch lies on depends on the product.

    Args:
        channels (int): Channels of the residuals.
        hidden (int): Hidden units.
        dropout (float): Share of the channels that are hidden from the classifier in training. High, because a few
            source categories have far fewer kinds of defects than residuals have channels.
    """

    def __init__(self, channels: int, hidden: int = 32, dropout: float = 0.5) -> None:
        super().__init__()
        self.classifier = nn.Sequential(
            nn.BatchNorm1d(channels, affine=False),
            nn.Dropout(dropout),
            nn.Linear(channels, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )
        self.standardize = nn.BatchNorm1d(2, affine=False)  # keeps mean and deviation of the two on normal patches

    def evidence(self, residuals: Tensor) -> Tensor:
        """Logit and log-distance of residuals ``x - x*``, shape ``(N, C)`` to ``(N, 2)``."""
        logit = self.classifier(residuals.abs())
        distance = residuals.square().sum(dim=1, keepdim=True).clamp(min=EQUAL).log()
        return torch.cat([logit, distance], dim=1)

    def forward(self, residuals: Tensor) -> Tensor:
        """Anomaly of each patch, ``(B, C, H, W)`` to ``(B, H, W)``, about 0 for normal patches, without bounds."""
        batch, _, height, width = residuals.shape
        return self.standardize(self.evidence(to_rows(residuals))).sum(dim=1).reshape(batch, height, width)

    def loss(self, residuals: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy; normal and abnormal patches count the same, however rare the abnormal ones are.

        Args:
            residuals (Tensor): Shape ``(N, C)``.
            labels (Tensor): 1 for abnormal patches, shape ``(N,)``.
        """
        evidence = self.evidence(residuals)
        normal = labels == 0
        if int(normal.sum()) > 1:
            self.standardize(evidence[normal].detach())
        losses = F.binary_cross_entropy_with_logits(evidence[:, 0], labels.float(), reduction="none")
        sides = [losses[side].mean() for side in (normal, ~normal) if bool(side.any())]
        return torch.stack(sides).sum() / 2
