# SPDX-License-Identifier: Apache-2.0

"""A post-processor that keeps the ranking of the scores and, once it has a threshold, the threshold."""

import logging
from typing import Any

import torch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

logger = logging.getLogger(__name__)


class RankKeepingPostProcessor(PostProcessor):
    """Normalize scores without clamping, with a threshold that is learned in training and then kept.

    anomalib's own post-processor clamps scores to 0..1 before the metrics run, so that all scores beyond the
    validation range tie. Raw scores are no way out: torchmetrics passes a batch through a sigmoid if, and only if, one
    of its scores lies outside of 0..1, which shuffles the batches against each other. Here
    ``0.5 + u / (2 (1 + |u|))`` with ``u = 2 (score - threshold) / (max - min)`` maps any score into (0, 1): 0.5 at the
    threshold, the same slope as anomalib's there, and strictly increasing. Without statistics, u is the score.

    Residual scores share one scale for all products, so a model that was trained elsewhere keeps the threshold and
    the range of its source categories: enrolling a product must not learn them from that product's labeled images.
    """

    # Set by a model that has nothing left to train.
    keep_statistics: bool = False

    @property
    def has_statistics(self) -> bool:
        """Whether a threshold and a range were learned."""
        return not bool(torch.isnan(self.image_threshold) | torch.isnan(self.image_min))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if there is no threshold."""
        del trainer, pl_module
        if self.enable_thresholding and not self.has_statistics:
            logger.warning(
                "No threshold was learned, so labels and F1 mean nothing; AUROC is not affected. Train with validation "
                "data (CrossCategory holds some out; other datamodules: val_split_mode), or pass a trained checkpoint."
            )

    on_predict_start = on_test_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401  # Lightning's type; anomalib passes a Batch
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Collect scores, unless the statistics are to be kept."""
        if not (self.keep_statistics and self.has_statistics):
            super().on_validation_batch_end(trainer, pl_module, outputs, *args, **kwargs)

    @staticmethod
    def _normalize(
        preds: Tensor | None,
        norm_min: Tensor,
        norm_max: Tensor,
        threshold: Tensor,
    ) -> Tensor | None:
        if preds is None:
            return None
        threshold = torch.where(torch.isnan(threshold), (norm_max + norm_min) / 2, threshold)
        value_range = norm_max - norm_min
        has_range = ~torch.isnan(norm_min) & ~torch.isnan(norm_max)
        u = 2 * (preds - threshold) / torch.where(value_range > 0, value_range, torch.ones_like(value_range))
        u = torch.where(has_range, u, preds)
        return 0.5 + u / (2 * (1 + u.abs()))
