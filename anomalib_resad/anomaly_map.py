# SPDX-License-Identifier: Apache-2.0

"""From likelihoods (or distances) of the levels to one anomaly map and one score.

Paper: ResAD (arXiv 2410.20047), section 3.4: s = 1 - exp(log p) per level, bilinear upsampling, sum over the levels;
the score of an image is the maximum of its map. ResAD++ (its published code): the mean of that map and the map of the
abnormal Gaussian's probability.
"""

from collections.abc import Sequence

import torch
from anomalib.data import InferenceBatch
from anomalib.models.components import GaussianBlur2d
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_resad.distributed import largest


def log_likelihood_to_anomaly(log_p: Tensor, ceiling: Tensor) -> Tensor:
    """Anomaly of one level: ``1 - exp(log p - ceiling)``, near 0 for the likeliest patches, at most 1.

    The published code takes the maximum over the test set as the ceiling, so that an image's score depends on the
    other images (defect 3). Here it is a constant that was learned in training.

    Args:
        log_p (Tensor): Log-likelihoods per channel, any shape.
        ceiling (Tensor): Highest log-likelihood of normal training patches, a scalar.
    """
    return 1 - torch.exp(log_p - ceiling)


def fuse(likelihood_anomalies: Sequence[Tensor], probabilities: Sequence[Tensor]) -> list[Tensor]:
    """Merge the two maps of ResAD++ level by level, so that their sum over the levels is a mean in 0..1.

    The published code sums the one over the levels and averages the other, so that they range over 0..3 and 0..1 and
    the second hardly counts (defect 4). Here both are averaged. A patch that is likelier than any normal one of the
    training is as normal as these, 0: below zero it would leave the scale.

    Args:
        likelihood_anomalies (Sequence[Tensor]): Of each level, shape ``(B, H_l, W_l)``, at most 1.
        probabilities (Sequence[Tensor]): Probability of the abnormal Gaussian, of the same shapes, in 0..1.
    """
    share = 0.5 / len(probabilities)
    return [
        share * (anomaly.clamp(min=0) + probability)
        for anomaly, probability in zip(likelihood_anomalies, probabilities, strict=True)
    ]


class AnomalyMapGenerator(nn.Module):
    """Sum the levels' anomalies at image resolution, smooth, and score the image by its most anomalous place.

    Args:
        levels (int): Number of levels.
        sigma (float): Standard deviation of the Gaussian smoothing in pixels; 4 at 224 pixels in the published code,
            0 for none.
        top_share (float): The score is the mean of this share of the patches of a single level, the most anomalous
            ones, before they are smoothed, which hides small defects; 0 takes the maximum of the map (both papers).
    """

    MOMENTUM = 0.1

    def __init__(self, levels: int, sigma: float = 4.0, top_share: float = 0.0) -> None:
        super().__init__()
        self.top_share = top_share
        self.blur = GaussianBlur2d(kernel_size=2 * int(4 * sigma + 0.5) + 1, sigma=sigma) if sigma > 0 else None
        self.register_buffer("ceilings", torch.full((levels,), float("nan")))
        self.ceilings: Tensor

    @torch.no_grad()
    def update_ceiling(self, level: int, log_p: Tensor, mask: Tensor) -> None:
        """Follow the highest log-likelihood of normal patches (of all processes), as a moving average over batches.

        Args:
            level (int): Index of the level.
            log_p (Tensor): Log-likelihoods per channel, shape ``(N,)``.
            mask (Tensor): 1 for abnormal positions, shape ``(N,)``.
        """
        normal = log_p.detach()[mask == 0]
        highest = largest(normal.max() if normal.numel() else log_p.new_tensor(-torch.inf))
        if torch.isinf(highest):
            return
        ceiling = self.ceilings[level]
        updated = highest if torch.isnan(ceiling) else torch.lerp(ceiling, highest, self.MOMENTUM)
        self.ceilings[level] = updated

    def likelihoods_to_anomalies(self, log_p: Sequence[Tensor]) -> list[Tensor]:
        """Anomaly of each level, shape ``(B, H_l, W_l)`` in and out; an untrained ceiling counts as 0."""
        ceilings = torch.nan_to_num(self.ceilings)
        return [log_likelihood_to_anomaly(level, ceilings[index]) for index, level in enumerate(log_p)]

    def forward(self, anomalies: Sequence[Tensor], image_size: Sequence[int]) -> InferenceBatch:
        """Merge the levels.

        Args:
            anomalies (Sequence[Tensor]): One map per level, shape ``(B, H_l, W_l)``.
            image_size (Sequence[int]): Height and width of the result.

        Returns:
            InferenceBatch: ``pred_score`` of shape ``(B,)`` and ``anomaly_map`` of shape ``(B, 1, H, W)``.
        """
        height, width = image_size
        anomaly_map = torch.stack(
            [
                self._enlarge(level.shape[-2], int(height)).T @ level @ self._enlarge(level.shape[-1], int(width))
                for level in anomalies
            ]
        ).sum(dim=0)[:, None]  # (B, 1, H, W)
        if not self.top_share:
            return InferenceBatch(pred_score=anomaly_map.amax(dim=(1, 2, 3)), anomaly_map=anomaly_map)
        (patches,) = (level.flatten(1) for level in anomalies)
        most = max(1, round(self.top_share * patches.shape[1]))
        return InferenceBatch(pred_score=patches.topk(most, dim=1).values.mean(dim=1), anomaly_map=anomaly_map)

    def _enlarge(self, patches: int, pixels: int) -> Tensor:
        """Bilinear interpolation and smoothing along one side, as a matrix ``(patches, pixels)``.

        Both are linear and separable, so two small products of such matrices do for the whole map what a convolution
        of its pixels with a 33 x 33 kernel does, in a tenth of the time.
        """
        units = torch.eye(patches).to(self.ceilings)[:, None]
        units = F.interpolate(units, size=pixels, mode="linear", align_corners=False)
        if self.blur is not None:
            weights = self.blur.kernel.sum(dim=-1).reshape(1, 1, -1)
            margin = weights.shape[-1] // 2
            units = F.conv1d(F.pad(units, (margin, margin), mode=self.blur.border_type), weights)
        return units.squeeze(1)
