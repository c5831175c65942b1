# SPDX-License-Identifier: Apache-2.0

"""ResAD as one PyTorch module: photo to anomaly map and score.

Yao et al., "ResAD: A Simple Framework for Class Generalizable Anomaly Detection", NeurIPS 2024, arXiv 2410.20047, and
"ResAD++: Towards Class Agnostic Anomaly Detection via Residual Feature Learning", IJCV 2026, arXiv 2509.23741. The
constructor's defaults are the first; ``ResADModel(**settings)`` with those of ``variants.py`` makes either, or the
default of this package, whose levels are joined and whose head takes the place of constraintor and flow.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_resad.anomaly_map import AnomalyMapGenerator, fuse
from anomalib_resad.backbone import FeaturePyramid
from anomalib_resad.codebook import Codebook, codebook_loss, match_distribution
from anomalib_resad.constraintor import ConstraintorKind, make_constraintors
from anomalib_resad.embedding import JoinedLevels, distance_within
from anomalib_resad.flow import PositionFlow
from anomalib_resad.head import FusedHead
from anomalib_resad.loss import (
    OneClass,
    PushPull,
    abnormal_probability,
    one_class_loss,
    orthogonality,
)
from anomalib_resad.reference_bank import Metric, ReferenceBank, to_rows
from anomalib_resad.training_losses import TrainingLosses
from anomalib_resad.variants import check_known

Residual = Literal["none", "difference", "squared"]
Estimator = Literal["fused", "flow", "distance"]

# Share of a photo's patches, the most anomalous ones, whose mean is its score where the levels are joined.
TOP_SHARE = 0.01


def residual(features: Tensor, matched: Tensor, kind: Residual = "difference") -> Tensor:
    """Residual of a level, shape ``(B, C, H, W)``.

    ``x - x*`` (paper), its element-wise square (published code), or the features themselves (the papers' ablation).
    """
    if kind == "none":
        return features
    difference = features - matched
    return difference if kind == "difference" else difference.square()


def distance(features: Tensor, matched: Tensor, metric: Metric) -> Tensor:
    """Distance of each patch to its match, ``(B, C, H, W)`` to ``(B, H, W)``: Euclidean, or one minus the cosine."""
    if metric == "l2":
        return (features - matched).norm(dim=1)
    return 1 - F.cosine_similarity(features, matched, dim=1)


class ResADModel(TrainingLosses):
    """image -> backbone -> match -> residual -> constraintor -> flow -> log-likelihood -> anomaly map -> score.

    Training evaluation, test, predict and every export run the same :meth:`forward`. The score of an image depends on
    the image, the bank and the weights alone.

    Args:
        backbone (str): timm model name.
        layers (Sequence[str] | None): Levels of the backbone; by default see `backbone.Backbone.default_layers`.
        pre_trained (bool): Use timm's pretrained weights.
        weights (Path | str | None): Local backbone file instead.
        match (Metric): Which reference is the nearest, by ``"l2"`` (paper) or ``"cosine"``.
        residual (Residual): ``"difference"`` (paper), ``"squared"``, or ``"none"`` for plain features.
        constraintor (ConstraintorKind): What constrains the residuals; ``"mlp"`` is for vision transformers.
        occ (OneClass): What the constraintor learns; with ``"none"`` it stays as it starts.
        coupling_layers (int): Coupling layers of each flow.
        position_channels (int): Channels of the flow's position condition, 0 for none.
        codebook_size (int): Codes of normal residuals per level, 0 for no codebook.
        efdm (float): Share of the way from the residuals' distribution to that of their codes, 0 for none. Codebook
            and matching serve each other: without the one there is none of the other.
        abnormal_gaussian (bool): Let the flow also tell abnormal patches, as a second Gaussian, N(1, I).
        push_pull (PushPull): The flow's terms, plain (``"hinge"``, BGAD) or ``"log_barrier"``.
        sigma (float): Gaussian smoothing of the map in pixels.
        projection (int): Channels of the keys by which the levels are matched, joined; 0 matches each by itself.
        estimator (Estimator): ``"flow"`` (constraintor and flow), ``"fused"`` (the small head of joined levels), or
            ``"distance"`` for the plain nearest-neighbor distance of the same references, which needs no training.
        image_size (Sequence[int] | None): Height and width of the input, which transformers must know beforehand.

    Raises:
        ValueError: If an argument has an unknown or impossible value.
    """

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        weights: Path | str | None = None,
        match: Metric = "l2",
        residual: Residual = "difference",
        constraintor: ConstraintorKind = "conv_bn_relu",
        occ: OneClass = "abnormal_invariant",
        coupling_layers: int = 8,
        position_channels: int = 256,
        codebook_size: int = 0,
        efdm: float = 0.0,
        abnormal_gaussian: bool = False,
        push_pull: PushPull = "hinge",
        sigma: float = 4.0,
        projection: int = 0,
        estimator: Estimator = "flow",
        image_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_known("residual", residual, get_args(Residual))
        check_known("constraintor", constraintor, get_args(ConstraintorKind))
        check_known("occ", occ, get_args(OneClass))
        check_known("push_pull", push_pull, get_args(PushPull))
        check_known("estimator", estimator, get_args(Estimator))
        if not 0 <= efdm <= 1 or codebook_size < 0:
            msg = f"efdm={efdm} must be a share, 0 to 1, and codebook_size={codebook_size} a number of codes or 0."
            raise ValueError(msg)
        if projection < 0 or (estimator == "fused" and not projection):
            msg = f"projection={projection} must be a number of channels, such as 64; 0 only where estimator='flow'."
            raise ValueError(msg)
        self.residual_kind: Residual = residual
        self.constraintor_kind: ConstraintorKind = constraintor
        self.occ: OneClass = occ
        self.efdm = efdm
        self.abnormal_gaussian = abnormal_gaussian
        self.push_pull: PushPull = push_pull
        self.estimator: Estimator = estimator
        self.backbone = FeaturePyramid(backbone, layers, pre_trained, weights, image_size)
        channels = list(self.backbone.channels)
        self.join = JoinedLevels(channels, projection) if projection else None
        self.bank = ReferenceBank(channels if self.join is None else self.join.channels, match, self.join is not None)
        if self.join is not None:
            channels = self.join.channels[:1]
        trained = channels if estimator == "flow" else []  # channels of the levels that have trainable parts
        matched = trained if codebook_size and efdm else []
        self.codebooks = nn.ModuleList(Codebook(count, codebook_size) for count in matched)
        self.fusion, self.constraintors = make_constraintors(constraintor, trained)
        self.flows = nn.ModuleList(PositionFlow(count, coupling_layers, position_channels) for count in trained)
        self.boundaries: Tensor
        if trained and push_pull == "log_barrier":
            self.register_buffer("boundaries", torch.full((len(trained),), float("nan")))
        self.head = FusedHead(channels[0]) if estimator == "fused" else None
        self.anomaly_map = AnomalyMapGenerator(len(channels), sigma, TOP_SHARE if self.join is not None else 0.0)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score normalized images against the bank.

        Args:
            images (Tensor): Images, shape ``(B, 3, H, W)``.

        Returns:
            InferenceBatch: ``pred_score`` of shape ``(B,)``, ``anomaly_map`` of shape ``(B, 1, H, W)``.
        """
        return self.detect(self.encode(images), self.bank.enrolled, images.shape[-2:])

    def encode(self, images: Tensor) -> list[Tensor]:
        """Everything that needs no references: normalized images ``(B, 3, H, W)`` to maps ``(B, C_l, H_l, W_l)``.

        The maps are the levels', or that of the joined levels and that of their keys. The bank holds the same of the
        reference photos. On the edge this is one file, and :meth:`detect` another (``anomalib_resad.deploy``).
        """
        features = self.backbone(images)
        return list(features) if self.join is None else self.join(features)

    def detect(self, features: Sequence[Tensor], rows: Sequence[Tensor], image_size: Sequence[int]) -> InferenceBatch:
        """Everything that needs references.

        Args:
            features (Sequence[Tensor]): What :meth:`encode` gave, shape ``(B, C_l, H_l, W_l)`` each.
            rows (Sequence[Tensor]): Bank rows of each level, shape ``(N_l, C_l)``.
            image_size (Sequence[int]): Height and width of the map.

        Returns:
            InferenceBatch: As of :meth:`forward`.
        """
        return self.score(features, self.bank.match(features, rows), image_size)

    def score(self, features: Sequence[Tensor], matched: Sequence[Tensor], image_size: Sequence[int]) -> InferenceBatch:
        """Score features that have met their references, one map ``(B, C_l, H_l, W_l)`` per level each.

        Behind joined features stand their keys, which have no references of their own.
        """
        keys = features[-1]
        features = features[: len(matched)]
        if self.estimator == "distance":
            anomalies = [distance(x, m, self.bank.metric) for x, m in zip(features, matched, strict=True)]
        elif self.head is not None:
            pairs = zip(features, matched, strict=True)
            anomalies = [self.head(to_rows(x) - to_rows(m), distance_within(keys)) for x, m in pairs]
        else:
            constrained = self.constrain(self.match_residuals(self.residuals(features, matched)))
            maps = [flow.maps(level) for flow, level in zip(self.flows, constrained, strict=True)]  # type: ignore[operator]
            anomalies = self.anomaly_map.likelihoods_to_anomalies([log_p for log_p, _ in maps])
            if self.abnormal_gaussian:
                anomalies = fuse(anomalies, [abnormal_probability(*pair) for pair in maps])
        return self.anomaly_map(anomalies, image_size)

    def residuals(self, features: Sequence[Tensor], matched: Sequence[Tensor]) -> list[Tensor]:
        """Residuals of all levels, shape ``(B, C_l, H_l, W_l)`` each."""
        return [residual(x, m, self.residual_kind) for x, m in zip(features, matched, strict=True)]

    def match_residuals(self, residuals: Sequence[Tensor]) -> list[Tensor]:
        """Match the residuals' distribution to the codebook's, in training as in test (defect 9), if there is one."""
        if not self.codebooks:
            return list(residuals)
        pairs = zip(residuals, self.codebooks, strict=True)
        return [match_distribution(r, codebook(r), self.efdm) for r, codebook in pairs]

    def constrain(self, residuals: Sequence[Tensor]) -> list[Tensor]:
        """Constrain the residuals of all levels, shapes in and out alike."""
        fused = residuals if self.fusion is None else self.fusion(residuals)
        return [constrain(r) for constrain, r in zip(self.constraintors, fused, strict=True)]

    @torch.no_grad()
    def match_each(self, features: Sequence[Tensor], references: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Match each image of a batch against references of its own.

        Args:
            features (Sequence[Tensor]): One map per level, shape ``(B, C_l, H_l, W_l)``.
            references (Sequence[Sequence[Tensor]]): Per image and level, rows of shape ``(N, C_l)``.

        Returns:
            list[Tensor]: Matched references, of the features' shapes.
        """
        images = [[level[number : number + 1] for level in features] for number in range(len(references))]
        matched = [self.bank.match(image, rows) for image, rows in zip(images, references, strict=True)]
        return [torch.cat(level) for level in zip(*matched, strict=True)]

    def constrain_loss(
        self, features: Sequence[Tensor], matched: Sequence[Tensor], masks: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """One-class loss and codebook loss, the mean over the levels, and the constrained residuals.

        Args:
            features (Sequence[Tensor]): One map per level, shape ``(B, C_l, H_l, W_l)``.
            matched (Sequence[Tensor]): Their references, of the same shapes.
            masks (Sequence[Tensor]): 1 for abnormal positions, shape ``(B, H_l, W_l)``.

        Returns:
            tuple[Tensor, list[Tensor]]: The loss (the codebook shares no parameter with the constraintor, so their sum
                trains each on its own), and one map per level, detached: the flow's loss does not reach the
                constraintor (paper, section 3.4: joint training is unstable).
        """
        residuals = self.residuals(features, matched)
        labels = [mask.flatten() for mask in masks]
        losses = []
        for codebook, r, y in zip(self.codebooks, residuals, labels, strict=False):  # none where there is no codebook
            codebook.start_from(to_rows(r), y)  # type: ignore[operator]
            losses.append(codebook_loss(to_rows(r), codebook.codes, y))  # type: ignore[arg-type]
        residuals = self.match_residuals(residuals)
        constrained = self.constrain(residuals)
        for f, r, y in zip(constrained, residuals, labels, strict=True):
            rows = to_rows(f)
            losses.append(one_class_loss(self.occ, rows, to_rows(r), y))
            if self.constraintor_kind == "mlp" and self.occ != "none":
                # Columns of unit length: as published, the term grows with the square of the number of positions.
                losses.append(orthogonality(F.normalize(rows[y == 0], dim=0)))
        return torch.stack(losses).sum() / len(residuals), [f.detach() for f in constrained]
