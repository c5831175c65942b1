# SPDX-License-Identifier: Apache-2.0

"""How anomalous each patch is, given its nearest reference: what all estimators share, and the plain distance."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_resad.method.features import Features, Rows
from anomalib_resad.method.reference_bank import Metric


class Estimator(nn.Module):
    """Judges features that have met their references. Subclasses that learn have :meth:`losses` too."""

    trains = False

    @property
    def judges_neighborhoods(self) -> bool:
        """Whether neighborhoods are judged beside patches; else features and banks have none."""
        return False

    def forward(self, features: Features, matched: Sequence[Tensor]) -> list[Tensor]:
        """Anomaly of each patch.

        Args:
            features (Features): Features of photos.
            matched (Sequence[Tensor]): The nearest reference of each patch, of the shapes of ``features.values``, and
                of each neighborhood, if there are any.

        Returns:
            list[Tensor]: One map per level, shape ``(B, H_l, W_l)``.
        """
        raise NotImplementedError

    def losses(
        self, photos: Sequence[Features], references: Sequence[Rows], masks: Sequence[Tensor], progress: float
    ) -> Iterator[dict[str, Tensor]]:
        """Losses of one batch, one dictionary for each step of the optimizer; a step minimizes the sum of its losses.

        Args:
            photos (Sequence[Features]): Features of each photo, a batch of one; their sizes may differ.
            references (Sequence[Rows]): References of each photo.
            masks (Sequence[Tensor]): 1 for defective pixels, shape ``(H, W)``, of each photo.
            progress (float): How much of the training is done, 0 to 1.
        """
        raise NotImplementedError

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """Parameters to train: those with weight decay, then those without."""
        return [[value for value in self.parameters() if value.requires_grad], []]


def distance(features: Tensor, matched: Tensor, metric: Metric) -> Tensor:
    """Distance of each patch to its match, ``(B, C, H, W)`` to ``(B, H, W)``: Euclidean, or one minus the cosine."""
    if metric == "l2":
        return (features - matched).norm(dim=1)
    return 1 - F.cosine_similarity(features, matched, dim=1)


class Distance(Estimator):
    """The plain distance to the nearest reference, which needs no training.

    Args:
        metric (Metric): ``"l2"`` or ``"cosine"``.
    """

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self.metric: Metric = metric

    def forward(self, features: Features, matched: Sequence[Tensor]) -> list[Tensor]:
        """Distance of each patch; see :meth:`Estimator.forward`."""
        return [distance(x, m, self.metric) for x, m in zip(features.values, matched, strict=True)]
