# SPDX-License-Identifier: Apache-2.0

"""What head and flows are trained by: losses of one batch whose features have met their references."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from anomalib_resad.anomaly_map import AnomalyMapGenerator
from anomalib_resad.distributed import mean_of_known
from anomalib_resad.embedding import distance_within
from anomalib_resad.flow import PositionFlow
from anomalib_resad.head import FusedHead
from anomalib_resad.loss import (
    PushPull,
    average_boundary,
    focal,
    log_barrier_likelihood,
    log_barrier_push_pull,
    negative_log_likelihood,
    normal_boundary,
    semi_push_pull,
)
from anomalib_resad.reference_bank import ReferenceBank, nearest_rows, to_rows

# Most normal and most abnormal patches of a training image that the head is trained on. Each image counts the same
# then, however large its defect is, and matching all of its patches would be most of the cost.
PATCHES = (96, 32)
# Least share of a patch that a defect must cover for the patch to be abnormal; patches with less belong to no class.
ABNORMAL_SHARE = 0.1


class TrainingLosses(nn.Module):
    """The part of :class:`~anomalib_resad.torch_model.ResADModel` that only training needs."""

    head: FusedHead | None
    bank: ReferenceBank
    flows: nn.ModuleList
    anomaly_map: AnomalyMapGenerator
    push_pull: PushPull
    abnormal_gaussian: bool
    boundaries: Tensor

    def head_loss(self, features: Sequence[Tensor], references: Sequence[Sequence[Tensor]], shares: Tensor) -> Tensor:
        """Loss of the head, on some normal and some abnormal patches of each image, which chance decides.

        Only these are matched.

        Args:
            features (Sequence[Tensor]): Joined levels and keys, shapes ``(B, C, H, W)`` and ``(B, K, H, W)``.
            references (Sequence[Sequence[Tensor]]): Rows of both for each image, shapes ``(N, C)`` and ``(N, K)``.
            shares (Tensor): How much of each patch is defective, 0 to 1, shape ``(B, H, W)``.
        """
        assert self.head is not None
        residuals, within, labels = [], [], []
        distances = distance_within(features[1]).flatten(1)
        for image, keys, (rows, row_keys), share, distance_map in zip(
            *features, references, shares.flatten(1), distances, strict=True
        ):
            shuffled = torch.randperm(len(share), device=share.device)
            sides = (share[shuffled] == 0, share[shuffled] >= ABNORMAL_SHARE)
            chosen = torch.cat([shuffled[side][:most] for side, most in zip(sides, PATCHES, strict=True)])
            nearest = nearest_rows(to_rows(keys[None])[chosen], row_keys, self.bank.metric)
            residuals.append(to_rows(image[None])[chosen] - rows[nearest])
            within.append(distance_map[chosen])
            labels.append(share[chosen] > 0)
        return self.head.loss(torch.cat(residuals), torch.cat(within), torch.cat(labels))

    def flow_losses(
        self,
        constrained: Sequence[Tensor],
        masks: Sequence[Tensor],
        batch_size: int,
        steps: int | None,
        push_pull_weight: float = 1.0,
        warming_up: bool = False,
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
            warming_up (bool): Likelihood of normal positions alone, no other term.

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
                likelihoods = flow.log_likelihoods(to_rows(f)[chosen], positions)
                labels = mask.flatten()[chosen]
                self.anomaly_map.update_ceiling(level, likelihoods[0], labels)
                losses.append(self._flow_loss(level, likelihoods, labels, push_pull_weight, warming_up))
            yield torch.stack(losses).mean()

    def _flow_loss(
        self, level: int, likelihoods: tuple[Tensor, Tensor], labels: Tensor, push_pull_weight: float, warming_up: bool
    ) -> Tensor:
        """Loss of one level's flow in one step, of its two log-likelihoods and the labels, all shape ``(N,)``."""
        log_p, log_p_abnormal = likelihoods
        barrier = self.push_pull == "log_barrier"
        likelihood = log_barrier_likelihood if barrier else negative_log_likelihood
        loss = likelihood(log_p, labels)
        if warming_up:
            return loss
        if self.abnormal_gaussian:
            loss = loss + likelihood(log_p_abnormal, 1 - labels) + focal(log_p, log_p_abnormal, labels)
        if not barrier:
            return loss + push_pull_weight * semi_push_pull(log_p, labels)
        normal = log_p[labels == 0]
        boundary = mean_of_known(normal_boundary(normal) if normal.numel() else log_p.new_tensor(float("nan")))
        if not torch.isnan(boundary):
            boundary = average_boundary(self.boundaries[level], boundary)
            self.boundaries[level] = boundary
            loss = loss + push_pull_weight * log_barrier_push_pull(log_p, labels, boundary)
        return loss
