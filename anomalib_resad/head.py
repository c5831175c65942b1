# SPDX-License-Identifier: Apache-2.0

"""The default model's trainable part: what residuals look like where a photo is defective, beside two distances."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_resad.distributed import total

# Share of a normal residual's mean squared length below which two patches count as equal, so that the logarithm stays
# finite and copies of a patch do not decide how far distances spread.
EQUAL = 5e-3
TINY = 1e-12  # keeps what never varied from being divided by zero


class FusedHead(nn.Module):
    """Anomaly of each patch from three pieces of evidence, each in units of its spread over normal source patches.

    1. The logit of a classifier of the residual: what defects look like. It sees magnitudes, channel by channel, not
       signs: which side of its reference a patch lies on depends on the product.
    2. The logarithm of the residual's length: how far the nearest reference is.
    3. The logarithm of the distance to the nearest patch elsewhere in the photo: how rare the patch is there.

    The distances alone are strong on products that were never seen, and the classifier alone is not: it overfits to the
    few source categories. So each distance counts twice.

    Args:
        channels (int): Channels of the residuals.
        hidden (int): Hidden units.
        dropout (float): Share of the channels that are hidden from the classifier in training. High, because a few
            source categories have far fewer kinds of defects than residuals have channels.
    """

    MOMENTUM = 0.02
    WEIGHTS = (1.0, 2.0, 2.0)

    def __init__(self, channels: int, hidden: int = 32, dropout: float = 0.5) -> None:
        super().__init__()
        self.classifier = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )
        # Running statistics of normal patches, the same in training and in evaluation (batch norm's are not).
        count = len(self.WEIGHTS)
        self.register_buffer("power", torch.ones(channels))  # mean square of each channel
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("variance", torch.ones(count))
        self.register_buffer("batches", torch.zeros(()))
        self.power: Tensor
        self.mean: Tensor
        self.variance: Tensor
        self.batches: Tensor

    def evidence(self, residuals: Tensor, within: Tensor) -> Tensor:
        """The three pieces of evidence of some patches.

        Args:
            residuals (Tensor): ``x - x*``, shape ``(N, C)``.
            within (Tensor): Squared distances to the nearest patch elsewhere in the same photo, shape ``(N,)``.

        Returns:
            Tensor: Logit and two log-distances, shape ``(N, 3)``.
        """
        logit = self.classifier(residuals.abs() * self.power.clamp(min=TINY).rsqrt())
        shortest = EQUAL * self.power.sum() + TINY
        distances = torch.cat([residuals.square().sum(dim=1, keepdim=True), within[:, None]], dim=1)
        return torch.cat([logit, torch.maximum(distances, shortest).log()], dim=1)

    def forward(self, residuals: Tensor, within: Tensor) -> Tensor:
        """Anomaly of each patch, ``(B * H * W, C)`` and ``(B, H, W)`` to ``(B, H, W)``, about 0 for normal patches."""
        evidence = self.evidence(residuals, within.flatten())
        weights = torch.tensor(self.WEIGHTS).to(evidence) * self.variance.clamp(min=TINY).rsqrt()
        return ((evidence - self.mean) * weights).sum(dim=1).reshape(within.shape)

    def loss(self, residuals: Tensor, within: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy; normal and abnormal patches count the same, however rare the abnormal ones are.

        Args:
            residuals (Tensor): Shape ``(N, C)``.
            within (Tensor): As of :meth:`evidence`; only the statistics depend on it.
            labels (Tensor): 1 for abnormal patches, shape ``(N,)``.
        """
        normal = labels == 0
        if self.training:
            self._follow(residuals[normal], within[normal])
        logits = self.evidence(residuals, within)[:, 0]
        losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
        sides = [losses[side].mean() for side in (normal, ~normal) if bool(side.any())]
        return torch.stack(sides).sum() / 2

    @torch.no_grad()
    def _follow(self, residuals: Tensor, within: Tensor) -> None:
        """Let the statistics follow normal patches (of all processes), as they are without dropout.

        The first batches count the same, later ones as a moving average.
        """
        count = total(residuals.new_tensor(len(residuals)))
        if count < 2:
            return
        self.batches += 1
        weight = max(self.MOMENTUM, 1 / float(self.batches))
        self.power.lerp_(total(residuals.square().sum(dim=0)) / count, weight)
        self.eval()
        evidence = self.evidence(residuals, within)
        self.train()
        mean = total(evidence.sum(dim=0)) / count
        self.mean.lerp_(mean, weight)
        self.variance.lerp_(total((evidence - mean).square().sum(dim=0)) / count, weight)
