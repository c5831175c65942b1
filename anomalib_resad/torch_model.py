# SPDX-License-Identifier: Apache-2.0

"""ResAD as one PyTorch module: photo to anomaly map and score.

Yao et al., "ResAD: A Simple Framework for Class Generalizable Anomaly Detection", NeurIPS 2024, arXiv 2410.20047.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_resad.anomaly_map import AnomalyMapGenerator
from anomalib_resad.backbone import FeaturePyramid
from anomalib_resad.constraintor import ConvBnReLU
from anomalib_resad.flow import PositionFlow
from anomalib_resad.loss import abnormal_invariant_occ, negative_log_likelihood, semi_push_pull
from anomalib_resad.reference_bank import Metric, ReferenceBank, match, to_rows

Residual = Literal["difference", "squared"]
Estimator = Literal["flow", "distance"]


def residual(features: Tensor, matched: Tensor, kind: Residual = "difference") -> Tensor:
    """Residual of a level, ``x - x*`` (paper) or its element-wise square (published code), shape ``(B, C, H, W)``."""
    difference = features - matched
    return difference if kind == "difference" else difference.square()


def distance(features: Tensor, matched: Tensor, metric: Metric) -> Tensor:
    """Distance of each patch to its match, ``(B, C, H, W)`` to ``(B, H, W)``: Euclidean, or one minus the cosine."""
    if metric == "l2":
        return (features - matched).norm(dim=1)
    return 1 - F.cosine_similarity(features, matched, dim=1)


class ResADModel(nn.Module):
    """image -> backbone -> match -> residual -> constraintor -> flow -> log-likelihood -> anomaly map -> score.

    Training evaluation, test, predict and every export run the same :meth:`forward`. The score of an image depends on
    the image, the bank and the weights alone.

    Args:
        backbone (str): timm model name.
        layers (Sequence[str]): Levels of the backbone.
        pre_trained (bool): Use timm's pretrained weights.
        weights (Path | str | None): Local backbone file instead.
        match (Metric): Which reference is the nearest, by ``"l2"`` (paper) or ``"cosine"``.
        residual (Residual): ``"difference"`` (paper) or ``"squared"``.
        coupling_layers (int): Coupling layers of each flow.
        position_channels (int): Channels of the flow's position condition, 0 for none.
        sigma (float): Gaussian smoothing of the map in pixels.
        estimator (Estimator): ``"flow"``, or ``"distance"`` for the plain nearest-neighbor distance of the same
            references, which needs no training.
    """

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        pre_trained: bool = True,
        weights: Path | str | None = None,
        match: Metric = "l2",
        residual: Residual = "difference",
        coupling_layers: int = 8,
        position_channels: int = 256,
        sigma: float = 4.0,
        estimator: Estimator = "flow",
    ) -> None:
        super().__init__()
        for argument, value, known in (
            ("residual", residual, ("difference", "squared")),
            ("estimator", estimator, ("flow", "distance")),
        ):
            if value not in known:
                msg = f"{argument}='{value}' is not known; use one of {known}."
                raise ValueError(msg)
        self.residual_kind: Residual = residual
        self.estimator: Estimator = estimator
        self.backbone = FeaturePyramid(backbone, layers, pre_trained, weights)
        channels = self.backbone.channels
        self.bank = ReferenceBank(channels, match)
        flow_channels = channels if estimator == "flow" else []
        self.constraintors = nn.ModuleList(ConvBnReLU(count) for count in flow_channels)
        self.flows = nn.ModuleList(PositionFlow(count, coupling_layers, position_channels) for count in flow_channels)
        self.anomaly_map = AnomalyMapGenerator(len(channels), sigma)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score normalized images against the bank.

        Args:
            images (Tensor): Images, shape ``(B, 3, H, W)``.

        Returns:
            InferenceBatch: ``pred_score`` of shape ``(B,)``, ``anomaly_map`` of shape ``(B, 1, H, W)``.
        """
        features = self.backbone(images)
        return self.score(features, self.bank(features), images.shape[-2:])

    def score(self, features: Sequence[Tensor], matched: Sequence[Tensor], image_size: Sequence[int]) -> InferenceBatch:
        """Score features that have met their references, one map ``(B, C_l, H_l, W_l)`` per level each."""
        if self.estimator == "distance":
            anomalies = [distance(x, m, self.bank.metric) for x, m in zip(features, matched, strict=True)]
        else:
            constrained = [
                constrain(residual(x, m, self.residual_kind))
                for constrain, x, m in zip(self.constraintors, features, matched, strict=True)
            ]
            log_p = [flow(level) for flow, level in zip(self.flows, constrained, strict=True)]
            anomalies = self.anomaly_map.likelihoods_to_anomalies(log_p)
        return self.anomaly_map(anomalies, image_size)

    @torch.no_grad()
    def match_each(self, features: Sequence[Tensor], references: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Match each image of a batch against references of its own.

        Args:
            features (Sequence[Tensor]): One map per level, shape ``(B, C_l, H_l, W_l)``.
            references (Sequence[Sequence[Tensor]]): Per image and level, rows of shape ``(N, C_l)``.

        Returns:
            list[Tensor]: Matched references, of the features' shapes.
        """
        metric = self.bank.metric
        return [
            torch.cat([match(image[None], rows[number], metric) for image, rows in zip(level, references, strict=True)])
            for number, level in enumerate(features)
        ]

    def constrain_loss(
        self, features: Sequence[Tensor], matched: Sequence[Tensor], masks: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Abnormal-invariant one-class loss, the mean over the levels, and the constrained residuals.

        Args:
            features (Sequence[Tensor]): One map per level, shape ``(B, C_l, H_l, W_l)``.
            matched (Sequence[Tensor]): Their references, of the same shapes.
            masks (Sequence[Tensor]): 1 for abnormal positions, shape ``(B, H_l, W_l)``.

        Returns:
            tuple[Tensor, list[Tensor]]: The loss, and one map per level, detached: the flow's loss does not reach the
                constraintor (paper, section 3.4: joint training is unstable).
        """
        losses, constrained = [], []
        for constrain, x, m, mask in zip(self.constraintors, features, matched, masks, strict=True):
            r = residual(x, m, self.residual_kind)
            f = constrain(r)
            losses.append(abnormal_invariant_occ(to_rows(f), to_rows(r), mask.flatten()))
            constrained.append(f.detach())
        return torch.stack(losses).mean(), constrained

    def flow_losses(
        self,
        constrained: Sequence[Tensor],
        masks: Sequence[Tensor],
        batch_size: int,
        steps: int | None,
        push_pull_weight: float = 1.0,
    ) -> Iterator[Tensor]:
        """Losses of the flow steps of one batch: every level in each step, over shuffled patch vectors.

        Each step takes patches of each level, dealt out evenly over the steps: no level is left untrained because it
        has fewer patches than ``batch_size`` (defect 1 of the published code).

        Args:
            constrained (Sequence[Tensor]): Constrained residuals, shape ``(B, C_l, H_l, W_l)``.
            masks (Sequence[Tensor]): 1 for abnormal positions, shape ``(B, H_l, W_l)``.
            batch_size (int): Most patch vectors of a level in one step.
            steps (int | None): Most steps; ``None`` for all patches.
            push_pull_weight (float): Weight of the semi-push-pull terms (lambda).

        Yields:
            Tensor: The loss of one step, a scalar: the mean over the levels.
        """
        largest = max(mask.numel() for mask in masks)
        needed = -(-largest // batch_size)
        count = needed if steps is None else min(needed, steps)
        orders = [torch.randperm(mask.numel(), device=mask.device) for mask in masks]
        for step in range(count):
            losses = []
            for level, (f, mask, order) in enumerate(zip(constrained, masks, orders, strict=True)):
                chosen = order[step::count][:batch_size]
                flow: PositionFlow = self.flows[level]  # type: ignore[assignment]
                height, width = f.shape[-2:]
                positions = flow.positions(height, width)[chosen % (height * width)] if flow.position_channels else None
                log_p = flow.log_likelihood(to_rows(f)[chosen], positions)
                labels = mask.flatten()[chosen]
                self.anomaly_map.update_ceiling(level, log_p, labels)
                losses.append(negative_log_likelihood(log_p, labels) + push_pull_weight * semi_push_pull(log_p, labels))
            yield torch.stack(losses).mean()
