# SPDX-License-Identifier: Apache-2.0

"""The default model's estimator: what residuals look like where a photo is defective, beside two distances."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_resad.method.distributed import total
from anomalib_resad.method.estimators import Estimator
from anomalib_resad.method.features import Features, Rows, to_rows
from anomalib_resad.method.reference_bank import Metric, nearest, nearest_rows
from anomalib_resad.method.self_similarity import self_similarity_distance

# Share of a normal residual's mean squared length below which two patches count as equal, so that the logarithm stays
# finite and copies of a patch do not decide how far distances spread.
EQUAL = 5e-3
TINY = 1e-12  # keeps what never varied from being divided by zero
# Most normal and most abnormal patches of a training image that the classifier sees. Each image counts the same then,
# however large its defect is, and matching all of its patches would be most of the cost.
PATCHES = (96, 32)
# Least share of a patch that a defect must cover for the patch to be abnormal; patches with less belong to no class.
ABNORMAL_SHARE = 0.1


class EvidenceHead(Estimator):
    """Anomaly of each patch from four pieces of evidence, each in units of its spread over normal source patches.

    1. The logit of a classifier of the residual: what defects look like. It sees magnitudes, channel by channel, not
       signs: which side of its reference a patch lies on depends on the product.
    2. The logarithm of the residual's length: how far the nearest reference is.
    3. The logarithm of the distance to the nearest patch elsewhere in the photo: how rare the patch is there.
    4. The logarithm of the distance of the neighborhood, a mean of 4 x 4 patches, to the nearest one of the references.

    The second one leads: it is strong on products that were never seen. The classifier overfits to the few source
    categories, and rarity misleads wherever nothing recurs in a good photo. So both correct it only
    (benchmarks/experiments.md, the fourth round). Neighborhoods err on other products than patches do.

    Args:
        channels (int): Channels of the residuals.
        metric (Metric): How the nearest reference is found, ``"l2"`` or ``"cosine"``.
        hidden (int): Hidden units.
        dropout (float): Share of the channels that are hidden from the classifier in training. High, because a few
            source categories have far fewer kinds of defects than residuals have channels.
    """

    MOMENTUM = 0.02
    WEIGHTS = (0.125, 2.0, 0.4, 1.0)
    WEIGHTS_0_1 = (1.0, 2.0, 2.0)  # what version 0.1.0 trained and calibrated with, without neighborhoods
    trains = True

    def __init__(self, channels: int, metric: Metric = "cosine", hidden: int = 32, dropout: float = 0.5) -> None:
        super().__init__()
        self.metric: Metric = metric
        self.classifier = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )
        # Running statistics of normal patches, the same in training and in evaluation (batch norm's are not).
        self.register_buffer("power", torch.ones(channels))  # mean square of each channel
        self.register_buffer("batches", torch.zeros(()))
        self._weigh(torch.tensor(self.WEIGHTS))
        self.power: Tensor
        self.mean: Tensor
        self.variance: Tensor
        self.batches: Tensor
        self.weights: Tensor

    def _weigh(self, weights: Tensor) -> None:
        """Take the weights of so many pieces of evidence, which are kept with what was trained."""
        self.register_buffer("weights", weights)
        self.register_buffer("mean", torch.zeros_like(weights))
        self.register_buffer("variance", torch.ones_like(weights))

    @property
    def judges_neighborhoods(self) -> bool:
        """See :class:`Estimator`; heads that were trained before there were any do not."""
        return len(self.weights) > len(self.WEIGHTS_0_1)

    def forward(self, features: Features, matched: Sequence[Tensor]) -> list[Tensor]:
        """Anomaly of each patch, about 0 for normal ones; see :meth:`Estimator.forward`."""
        (values,), (match, *others) = features.values, matched
        residuals = to_rows(values) - to_rows(match)
        return [self.anomalies(residuals, self._beside(features, others))]

    def _beside(self, features: Features, neighborhoods: Sequence[Tensor]) -> Tensor:
        """Squared distances beside those of the patches, see :meth:`evidence`, shape ``(B, H, W, 1 or 2)``.

        Args:
            features (Features): Features of photos.
            neighborhoods (Sequence[Tensor]): The nearest ones of the references, if they are judged; zeros where a
                product's are not: these are as far away as usual.
        """
        assert features.keys is not None
        distances = [self_similarity_distance(features.keys)]
        if self.judges_neighborhoods:
            assert features.neighborhoods is not None
            (match,) = neighborhoods
            away = (features.neighborhoods - match).square().sum(dim=1, keepdim=True)
            away = torch.where(match.square().sum(dim=1, keepdim=True) > 0, away, self.mean[-1].exp())
            size = features.keys.shape[-2:]
            distances.append(F.interpolate(away, size=size, mode="bilinear", align_corners=False).squeeze(1))
        return torch.stack(distances, dim=-1)

    def losses(
        self, photos: Sequence[Features], references: Sequence[Rows], masks: Sequence[Tensor], progress: float
    ) -> Iterator[dict[str, Tensor]]:
        """One step, on some normal and some abnormal patches of each image, drawn at random; only these are matched.

        See :meth:`Estimator.losses`.
        """
        del progress
        residuals, distances, labels = [], [], []
        for photo, rows, mask in zip(photos, references, masks, strict=True):
            assert photo.keys is not None
            assert rows.keys is not None
            (values,) = photo.values
            height, width = values.shape[-2:]
            share = F.adaptive_avg_pool2d(mask[None, None].float(), (height, width)).flatten()  # (H * W,)
            beside = self._beside(photo, self._nearest_neighborhoods(photo, rows))[0].flatten(0, 1)
            shuffled = torch.randperm(len(share), device=share.device)
            sides = (share[shuffled] == 0, share[shuffled] >= ABNORMAL_SHARE)
            chosen = torch.cat([shuffled[side][:most] for side, most in zip(sides, PATCHES, strict=True)])
            matched = nearest_rows(to_rows(photo.keys)[chosen], rows.keys, self.metric)
            residuals.append(to_rows(values)[chosen] - rows.values[0][matched])
            distances.append(beside[chosen])
            labels.append(share[chosen] > 0)
        yield {"head": self.loss(torch.cat(residuals), torch.cat(distances), torch.cat(labels))}

    def _nearest_neighborhoods(self, photo: Features, rows: Rows) -> list[Tensor]:
        if photo.neighborhoods is None or rows.neighborhoods is None:
            return []
        return [nearest(photo.neighborhoods, rows.neighborhoods, self.metric)]

    def evidence(self, residuals: Tensor, beside: Tensor) -> Tensor:
        """All pieces of evidence of some patches.

        Args:
            residuals (Tensor): ``x - x*``, shape ``(N, C)``.
            beside (Tensor): Squared distances to the nearest patch elsewhere in the same photo, and of the neighborhood
                to its nearest, if it is judged, shape ``(N, 1 or 2)``.

        Returns:
            Tensor: Logit and log-distances, shape ``(N, 3 or 4)``.
        """
        logit = self.classifier(residuals.abs() * self.power.clamp(min=TINY).rsqrt())
        shortest = EQUAL * self.power.sum() + TINY
        lengths = torch.linalg.vector_norm(residuals, dim=1, keepdim=True)
        distances = torch.cat([lengths.square(), beside], dim=1)
        return torch.cat([logit, torch.maximum(distances, shortest).log()], dim=1)

    def anomalies(self, residuals: Tensor, beside: Tensor) -> Tensor:
        """Weighted sum of the evidence, ``(B * H * W, C)`` and ``(B, H, W, 1 or 2)`` to ``(B, H, W)``."""
        evidence = self.evidence(residuals, beside.flatten(0, 2))
        weights = self.weights * self.variance.clamp(min=TINY).rsqrt()
        return ((evidence - self.mean) * weights).sum(dim=1).reshape(beside.shape[:-1])

    def loss(self, residuals: Tensor, beside: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy; normal and abnormal patches count the same, however rare the abnormal ones are.

        Args:
            residuals (Tensor): Shape ``(N, C)``.
            beside (Tensor): As of :meth:`evidence`; only the statistics depend on it.
            labels (Tensor): 1 for abnormal patches, shape ``(N,)``.
        """
        normal = labels == 0
        if self.training:
            self._follow(residuals[normal], beside[normal])
        logits = self.evidence(residuals, beside)[:, 0]
        losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
        sides = [losses[side].mean() for side in (normal, ~normal) if bool(side.any())]
        return torch.stack(sides).sum() / 2

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        weights = state_dict.setdefault(f"{prefix}weights", torch.tensor(self.WEIGHTS_0_1))
        if weights.shape != self.weights.shape:
            self._weigh(weights.to(self.power.device, copy=True))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def _follow(self, residuals: Tensor, beside: Tensor) -> None:
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
        evidence = self.evidence(residuals, beside)
        self.train()
        mean = total(evidence.sum(dim=0)) / count
        self.mean.lerp_(mean, weight)
        self.variance.lerp_(total((evidence - mean).square().sum(dim=0)) / count, weight)
