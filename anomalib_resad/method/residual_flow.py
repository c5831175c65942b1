# SPDX-License-Identifier: Apache-2.0

"""The papers' estimator: residuals are constrained, and a flow per level says how likely they are.

ResAD (arXiv 2410.20047), sections 3.2 to 3.4; ResAD++ (arXiv 2509.23741), as in its published code.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_resad.method.codebook import Codebook, codebook_loss, match_distribution
from anomalib_resad.method.constraintor import ConstraintorKind, make_constraintors
from anomalib_resad.method.distributed import largest, mean_of_known
from anomalib_resad.method.estimators import Estimator
from anomalib_resad.method.features import Features, Rows, to_rows
from anomalib_resad.method.flow import PositionFlow
from anomalib_resad.method.likelihood_maps import average_maps, log_likelihood_to_anomaly
from anomalib_resad.method.loss import (
    OneClass,
    PushPull,
    abnormal_probability,
    average_boundary,
    flow_loss,
    normal_boundary,
    one_class_loss,
    orthogonality,
)
from anomalib_resad.method.presets import check_known
from anomalib_resad.method.reference_bank import Metric, nearest_of_each_level

Residual = Literal["none", "difference", "squared"]
MOMENTUM = 0.1  # of the ceilings' moving average


def residual(features: Tensor, matched: Tensor, kind: Residual = "difference") -> Tensor:
    """Residual of a level, shape ``(B, C, H, W)``.

    ``x - x*`` (paper), its element-wise square (published code), or the features themselves (the papers' ablation).
    """
    if kind == "none":
        return features
    difference = features - matched
    return difference if kind == "difference" else difference.square()


def level_masks(mask: Tensor, levels: Sequence[Tensor]) -> list[Tensor]:
    """Masks at the levels' resolutions: a patch is abnormal if any of its pixels is, ``(B, H, W)`` to ``(B, h, w)``."""
    return [F.adaptive_max_pool2d(mask[:, None].float(), level.shape[-2:]).squeeze(1) for level in levels]


class ResidualFlow(Estimator):
    """Residual -> (codebook) -> constraintor -> flow -> anomaly, level by level.

    Args:
        channels (Sequence[int]): Channels of each level.
        metric (Metric): How the nearest reference is found, ``"l2"`` (paper) or ``"cosine"``.
        residual (Residual): ``"difference"`` (paper), ``"squared"``, or ``"none"`` for plain features.
        constraintor (ConstraintorKind): What constrains the residuals; ``"mlp"`` is for vision transformers.
        occ (OneClass): What the constraintor learns; with ``"none"`` it stays as it starts.
        coupling_layers (int): Coupling layers of each flow.
        position_channels (int): Channels of the flow's position condition, 0 for none.
        codebook_size (int): Codes of normal residuals per level, 0 for no codebook.
        efdm (float): Share of the way from the residuals' distribution to that of their codes, 0 for none. Codebook
            and distribution matching serve each other: without the one there is none of the other.
        abnormal_gaussian (bool): Let the flow also tell abnormal patches, as a second Gaussian, N(1, I).
        push_pull (PushPull): The flow's terms, plain (``"hinge"``, BGAD) or ``"log_barrier"``.
        warmup (float): Share of the training in which the flow learns the likelihood of normal patches alone.
        push_pull_weight (float): Weight of the semi-push-pull terms (lambda of the paper).
        flow_batch_size (int): Most patch vectors of a level in one flow step.
        flow_steps (int | None): Most flow steps per batch of images; ``None`` uses every patch.

    Raises:
        ValueError: If an argument has an unknown or impossible value.
    """

    trains = True

    def __init__(
        self,
        channels: Sequence[int],
        metric: Metric = "l2",
        residual: Residual = "difference",
        constraintor: ConstraintorKind = "conv_bn_relu",
        occ: OneClass = "abnormal_invariant",
        coupling_layers: int = 8,
        position_channels: int = 256,
        codebook_size: int = 0,
        efdm: float = 0.0,
        abnormal_gaussian: bool = False,
        push_pull: PushPull = "hinge",
        warmup: float = 0.0,
        push_pull_weight: float = 1.0,
        flow_batch_size: int = 8192,
        flow_steps: int | None = None,
    ) -> None:
        super().__init__()
        check_known("residual", residual, get_args(Residual))
        check_known("constraintor", constraintor, get_args(ConstraintorKind))
        check_known("occ", occ, get_args(OneClass))
        check_known("push_pull", push_pull, get_args(PushPull))
        if not 0 <= efdm <= 1 or codebook_size < 0:
            msg = f"efdm={efdm} must be a share, 0 to 1, and codebook_size={codebook_size} a number of codes or 0."
            raise ValueError(msg)
        self.metric: Metric = metric
        self.residual_kind: Residual = residual
        self.constraintor_kind: ConstraintorKind = constraintor
        self.occ: OneClass = occ
        self.efdm = efdm
        self.abnormal_gaussian = abnormal_gaussian
        self.push_pull: PushPull = push_pull
        self.warmup = warmup
        self.push_pull_weight = push_pull_weight
        self.flow_batch_size = flow_batch_size
        self.flow_steps = flow_steps
        with_codes = channels if codebook_size and efdm else []
        self.codebooks = nn.ModuleList(Codebook(count, codebook_size) for count in with_codes)
        self.fusion, self.constraintors = make_constraintors(constraintor, channels)
        self.flows = nn.ModuleList(PositionFlow(count, coupling_layers, position_channels) for count in channels)
        self.boundaries: Tensor
        if push_pull == "log_barrier":
            self.register_buffer("boundaries", torch.full((len(channels),), float("nan")))
        self.register_buffer("ceilings", torch.full((len(channels),), float("nan")))
        self.ceilings: Tensor

    # -- scoring ------------------------------------------------------------------------------------------------------

    def forward(self, features: Features, matched: Sequence[Tensor]) -> list[Tensor]:
        """Anomaly of each patch; see :meth:`Estimator.forward`. A ceiling that was not learned counts as 0."""
        constrained = self.constrain(self.toward_codes(self.residuals(features, matched)))
        maps = [flow.maps(level) for flow, level in zip(self.flows, constrained, strict=True)]  # type: ignore[operator]
        ceilings = torch.nan_to_num(self.ceilings)
        anomalies = [log_likelihood_to_anomaly(log_p, ceilings[level]) for level, (log_p, _) in enumerate(maps)]
        if self.abnormal_gaussian:
            return average_maps(anomalies, [abnormal_probability(*pair) for pair in maps])
        return anomalies

    def residuals(self, features: Features, matched: Sequence[Tensor]) -> list[Tensor]:
        """Residuals of all levels, shape ``(B, C_l, H_l, W_l)`` each."""
        return [residual(x, m, self.residual_kind) for x, m in zip(features.values, matched, strict=True)]

    def toward_codes(self, residuals: Sequence[Tensor]) -> list[Tensor]:
        """Move the residuals' distribution toward that of their codes, in training as in test; shapes stay."""
        if not self.codebooks:
            return list(residuals)
        pairs = zip(residuals, self.codebooks, strict=True)
        return [match_distribution(r, codebook(r), self.efdm) for r, codebook in pairs]

    def constrain(self, residuals: Sequence[Tensor]) -> list[Tensor]:
        """Constrain the residuals of all levels, shapes in and out alike."""
        mixed = residuals if self.fusion is None else self.fusion(residuals)
        return [constrain(r) for constrain, r in zip(self.constraintors, mixed, strict=True)]

    # -- training -----------------------------------------------------------------------------------------------------

    def losses(
        self, photos: Sequence[Features], references: Sequence[Rows], masks: Sequence[Tensor], progress: float
    ) -> Iterator[dict[str, Tensor]]:
        """Steps of the flow over shuffled patches; the first one trains constraintor and codebook too.

        See :meth:`Estimator.losses`; here all photos have one size.
        """
        features = Features([torch.cat(level) for level in zip(*(photo.values for photo in photos), strict=True)])
        with torch.no_grad():
            each = [
                nearest_of_each_level(photo, rows, self.metric) for photo, rows in zip(photos, references, strict=True)
            ]
        matched = [torch.cat(level) for level in zip(*each, strict=True)]
        of_levels = level_masks(torch.stack(list(masks)), features.values)
        occ, constrained = self.constrain_loss(features, matched, of_levels)
        for step, loss in enumerate(self.flow_losses(constrained, of_levels, warming_up=progress < self.warmup)):
            yield {"occ": occ if step == 0 else occ.detach(), "flow": loss}

    def constrain_loss(
        self, features: Features, matched: Sequence[Tensor], masks: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """One-class loss and codebook loss, the mean over the levels, and the constrained residuals.

        Args:
            features (Features): Features of the batch.
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
        residuals = self.toward_codes(residuals)
        constrained = self.constrain(residuals)
        for f, r, y in zip(constrained, residuals, labels, strict=True):
            rows = to_rows(f)
            losses.append(one_class_loss(self.occ, rows, to_rows(r), y))
            if self.constraintor_kind == "mlp" and self.occ != "none":
                # Columns of unit length: as published, the term grows with the square of the number of positions.
                losses.append(orthogonality(F.normalize(rows[y == 0], dim=0)))
        return torch.stack(losses).sum() / len(residuals), [f.detach() for f in constrained]

    def flow_losses(
        self, constrained: Sequence[Tensor], masks: Sequence[Tensor], warming_up: bool = False
    ) -> Iterator[Tensor]:
        """Losses of the flow steps of one batch: every level in each step, over shuffled patch vectors.

        Each step takes patches of each level, dealt out evenly over the steps: no level is left untrained because it
        has fewer patches than a batch, as in the published code.

        Args:
            constrained (Sequence[Tensor]): Constrained residuals, shape ``(B, C_l, H_l, W_l)``.
            masks (Sequence[Tensor]): 1 for abnormal positions, shape ``(B, H_l, W_l)``.
            warming_up (bool): Likelihood of normal positions alone, no other term.

        Yields:
            Tensor: The loss of one step, a scalar: the mean over the levels.
        """
        needed = -(-max(mask.numel() for mask in masks) // self.flow_batch_size)
        count = needed if self.flow_steps is None else min(needed, self.flow_steps)
        orders = [torch.randperm(mask.numel(), device=mask.device) for mask in masks]
        for step in range(count):
            losses = []
            for level, (f, mask, order) in enumerate(zip(constrained, masks, orders, strict=True)):
                chosen = order[step::count][: self.flow_batch_size]
                flow: PositionFlow = self.flows[level]  # type: ignore[assignment]
                height, width = f.shape[-2:]
                positions = flow.positions(height, width)[chosen % (height * width)] if flow.position_channels else None
                likelihoods = flow.log_likelihoods(to_rows(f)[chosen], positions)
                labels = mask.flatten()[chosen]
                self.update_ceiling(level, likelihoods[0], labels)
                losses.append(self._loss_of(level, likelihoods, labels, warming_up))
            yield torch.stack(losses).mean()

    def _loss_of(self, level: int, likelihoods: tuple[Tensor, Tensor], labels: Tensor, warming_up: bool) -> Tensor:
        """Loss of one level's flow in one step, of its two log-likelihoods and the labels, all shape ``(N,)``."""
        boundary = None
        if self.push_pull == "log_barrier" and not warming_up:
            normal = likelihoods[0][labels == 0]
            known = normal_boundary(normal) if normal.numel() else normal.new_tensor(float("nan"))
            known = mean_of_known(known)
            if not torch.isnan(known):
                boundary = average_boundary(self.boundaries[level], known)
                self.boundaries[level] = boundary
        weight = 0.0 if warming_up else self.push_pull_weight
        with_abnormal = self.abnormal_gaussian and not warming_up
        return flow_loss(self.push_pull, likelihoods, labels, weight, with_abnormal, boundary)

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
        self.ceilings[level] = highest if torch.isnan(ceiling) else torch.lerp(ceiling, highest, MOMENTUM)

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """Constraintors and flows; codes without decay, which would draw them away from the residuals."""
        codes = list(self.codebooks.parameters())
        parts = (self.constraintors, self.flows, self.fusion)
        networks = [value for part in parts if part is not None for value in part.parameters() if value.requires_grad]
        return [networks, codes]
