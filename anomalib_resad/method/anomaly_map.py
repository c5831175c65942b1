# SPDX-License-Identifier: Apache-2.0

"""From the anomalies of the levels to one anomaly map and one score.

Paper: ResAD (arXiv 2410.20047), section 3.4: bilinear upsampling, sum over the levels; the score of an image is the
maximum of its map.
"""

from collections.abc import Sequence

import torch
from anomalib.models.components import GaussianBlur2d
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class AnomalyMapGenerator(nn.Module):
    """Sum the levels' anomalies at image resolution, smooth, and score the image by its most anomalous place.

    Args:
        sigma (float): Standard deviation of the Gaussian smoothing in pixels; 4 at 224 pixels in the published code,
            0 for none.
        top_share (float): The score is the mean of this share of the patches of a single level, the most anomalous
            ones, before they are smoothed, which hides small defects: one of an even number, such as 0.01; 0 takes the
            maximum of the map (both papers).
    """

    def __init__(self, sigma: float = 4.0, top_share: float = 0.0) -> None:
        super().__init__()
        self.top_share = top_share
        self.blur = GaussianBlur2d(kernel_size=2 * int(4 * sigma + 0.5) + 1, sigma=sigma) if sigma > 0 else None

    def forward(self, anomalies: Sequence[Tensor], image_size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Merge the levels.

        Args:
            anomalies (Sequence[Tensor]): One map per level, shape ``(B, H_l, W_l)``.
            image_size (Sequence[int]): Height and width of the result.

        Returns:
            tuple[Tensor, Tensor]: Scores, shape ``(B,)``, and maps, shape ``(B, 1, H, W)``.
        """
        height, width = image_size
        anomaly_map = torch.stack(
            [
                self._enlarge(level, level.shape[-2], height).T @ level @ self._enlarge(level, level.shape[-1], width)
                for level in anomalies
            ]
        ).sum(dim=0)[:, None]  # (B, 1, H, W)
        if not self.top_share:
            return anomaly_map.amax(dim=(1, 2, 3)), anomaly_map
        (patches,) = (level.flatten(1) for level in anomalies)
        most = _rounded_share(patches.shape[1], round(1 / self.top_share))
        return patches.topk(most, dim=1).values.mean(dim=1), anomaly_map

    def _enlarge(self, like: Tensor, patches: int, pixels: int) -> Tensor:
        """Bilinear interpolation and smoothing along one side, as a matrix ``(patches, pixels)``.

        Both are linear and separable, so two small products of such matrices do for the whole map what a convolution
        of its pixels with a 33 x 33 kernel does, in a tenth of the time.
        """
        units = torch.eye(patches).to(like)[:, None]
        units = F.interpolate(units, size=pixels, mode="linear", align_corners=False)
        if self.blur is not None:
            weights = self.blur.kernel.sum(dim=-1).reshape(1, 1, -1)
            margin = weights.shape[-1] // 2
            units = F.conv1d(F.pad(units, (margin, margin), mode=self.blur.border_type), weights)
        return units.squeeze(1)


def _rounded_share(count: int, divisor: int) -> int:
    """``max(1, round(count / divisor))`` of an even divisor.

    With integer additions and divisions alone, because ``count`` is symbolic in an export for photos of any shape, and
    OpenVINO has no rule for the rounding and the maximum of such numbers.
    """
    is_odd = count // divisor - 2 * (count // (2 * divisor))  # `round` takes a half to the even number
    rounded = (count + divisor // 2 - 1 + is_odd) // divisor
    return rounded + 1 // (rounded + 1)  # 1 instead of 0
