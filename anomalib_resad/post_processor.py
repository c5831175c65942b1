# SPDX-License-Identifier: Apache-2.0

"""A post-processor that keeps the ranking of the scores and, once it has a threshold, the threshold."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, distributed

from anomalib_resad.enrollment.calibration import OwnScores, least_rate, pooled_spread, product_threshold
from anomalib_resad.enrollment.thresholds import Thresholds, normalize, product_map_threshold
from anomalib_resad.method.distributed import is_distributed

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

    A product may have thresholds of its own (:meth:`calibrate`), which are used instead of the source's and leave those
    as they are. A few scores of a product hardly tell how far its good photos scatter. So this spread is learned on
    the source categories, together with the threshold.

    Attributes:
        product_threshold (Tensor): Raw threshold of the enrolled product's scores; NaN for the source's.
        map_offset (Tensor): How much higher that is than the threshold of its maps; NaN if unknown.
        spread (Tensor): Standard deviation of good images' raw scores within the source categories; NaN if unknown.
        patch_spread (Tensor): The same where single patches are judged alone, without their neighborhoods; NaN if
            unknown, or if the model judges no neighborhoods.
    """

    # Set by a model that has nothing left to train.
    keep_statistics: bool = False

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401  # anomalib's arguments
        super().__init__(**kwargs)
        self.register_buffer("product_threshold", torch.tensor(math.nan))
        self.register_buffer("map_offset", torch.tensor(math.nan))
        self.register_buffer("spread", torch.tensor(math.nan))
        self.register_buffer("patch_spread", torch.tensor(math.nan))
        self.product_threshold: Tensor
        self.map_offset: Tensor
        self.spread: Tensor
        self.patch_spread: Tensor
        self._scored: dict[str, float] = {}  # raw scores of good validation images by path
        self._scored_by_patches: dict[str, float] = {}  # of all validation images, without neighborhoods

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        for name in ("product_threshold", "map_offset", "spread", "patch_spread"):  # earlier checkpoints lack them
            state_dict.setdefault(f"{prefix}{name}", torch.tensor(math.nan))
        super()._load_from_state_dict(state_dict, prefix, *args)

    # -- of the product -----------------------------------------------------------------------------------------------

    @property
    def image_threshold(self) -> Tensor:
        """Raw threshold of the scores: the product's, else the source's."""
        return torch.where(torch.isnan(self.product_threshold), super().image_threshold, self.product_threshold)

    @property
    def pixel_threshold(self) -> Tensor:
        """Raw threshold of the maps; see :func:`~anomalib_resad.enrollment.thresholds.product_map_threshold`."""
        learned = super().pixel_threshold, super().image_threshold
        return product_map_threshold(*learned, self.product_threshold, self.map_offset, torch)

    @property
    def source_thresholds(self) -> tuple[Tensor, Tensor]:
        """Raw thresholds of scores and maps that were learned on the source categories."""
        return super().image_threshold, super().pixel_threshold

    def spread_of(self, neighborhoods: bool) -> float:
        """The spread for a product whose neighborhoods are judged, or are not; NaN if unknown."""
        if neighborhoods or bool(torch.isnan(self.patch_spread)):
            return self.spread.item()
        return self.patch_spread.item()

    def calibrate(self, own: OwnScores, rate: float, neighborhoods: bool) -> None:
        """Give the enrolled product a threshold of its own; see :func:`calibration.product_threshold`.

        Args:
            own (OwnScores): What its reference photos score, each against the others.
            rate (float): Target false-alarm rate.
            neighborhoods (bool): Whether its neighborhoods are judged beside its patches.
        """
        scores, spread = own.scores, self.spread_of(neighborhoods)
        if len(scores) < 2:
            logger.warning(
                "false_alarm_rate=%g needs two reference photos or more, each scored against the others; there is %d. "
                "The source categories' threshold stays.",
                rate,
                len(scores),
            )
            self.forget_product()
            return
        self.product_threshold.fill_(product_threshold(scores, spread, rate))
        self.map_offset.fill_(own.map_offset)
        if rate < least_rate(len(scores)):
            logger.warning(
                "%d reference photos cannot show a false-alarm rate under %.0f %%; for the target of %g %% %s. "
                "Check the labels on good photos, or enroll more.",
                len(scores),
                100 * least_rate(len(scores)),
                100 * rate,
                "it is extrapolated from their own scatter, a guess"
                if math.isnan(spread)
                else "it is extrapolated from their scatter and the source's",
            )

    def forget_product(self) -> None:
        """Go back to the source categories' thresholds."""
        self.product_threshold.fill_(math.nan)
        self.map_offset.fill_(math.nan)

    def thresholds(self, scores: Sequence[float], neighborhoods: bool) -> Thresholds:
        """What goes beside an exported model.

        Args:
            scores (Sequence[float]): The reference photos' leave-one-out scores.
            neighborhoods (bool): As of :meth:`calibrate`.
        """
        return Thresholds(
            image_threshold=self.image_threshold.item(),
            pixel_threshold=self.pixel_threshold.item(),
            image_range=(self.image_min.item(), self.image_max.item()),
            pixel_range=(self.pixel_min.item(), self.pixel_max.item()),
            source_threshold=self.source_thresholds[0].item(),
            spread=self.spread_of(neighborhoods),
            leave_one_out=tuple(scores),
        )

    # -- of the source ------------------------------------------------------------------------------------------------

    @property
    def has_statistics(self) -> bool:
        """Whether a threshold and a range were learned."""
        return not bool(torch.isnan(self.image_threshold) | torch.isnan(self.image_min))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if there is no threshold."""
        del trainer, pl_module
        if self.enable_thresholding and not self.has_statistics and torch.isnan(self.product_threshold):
            logger.warning(
                "No threshold was learned, so labels and F1 mean nothing; AUROC is not affected. Train with validation "
                "data (CrossCategory holds some out; other datamodules: val_split_mode), or pass a trained checkpoint."
            )

    on_predict_start = on_test_start

    def keep_patch_scores(self, scores: dict[str, float]) -> None:
        """Keep what validation images score by single patches alone, by path, until the end of the epoch."""
        self._scored_by_patches.update(scores)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401  # Lightning's type; anomalib passes a Batch
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Collect scores, unless the statistics are to be kept."""
        if self.keep_statistics and self.has_statistics:
            return
        super().on_validation_batch_end(trainer, pl_module, outputs, *args, **kwargs)
        if outputs.gt_label is None or outputs.image_path is None:
            return
        scores = zip(outputs.image_path, outputs.pred_score.tolist(), outputs.gt_label.tolist(), strict=True)
        self._scored.update({path: score for path, score, label in scores if not label})

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn thresholds, ranges and spreads, the same in every process of a distributed training."""
        super().on_validation_epoch_end(trainer, pl_module)
        scored, by_patches = _of_all_processes(self._scored), _of_all_processes(self._scored_by_patches)
        self._scored, self._scored_by_patches = {}, {}
        if not scored:
            return
        samples = getattr(getattr(getattr(trainer, "datamodule", None), "val_data", None), "samples", None)
        known = (
            samples.set_index("image_path").category.to_dict() if samples is not None and "category" in samples else {}
        )
        categories = [known.get(path, "") for path in scored]
        self.spread.fill_(pooled_spread(list(scored.values()), categories))
        if by_patches:
            self.patch_spread.fill_(pooled_spread([by_patches[path] for path in scored], categories))

    @staticmethod
    def _normalize(
        preds: Tensor | None,
        norm_min: Tensor,
        norm_max: Tensor,
        threshold: Tensor,
    ) -> Tensor | None:
        return None if preds is None else normalize(preds, threshold, norm_min, norm_max, torch)


def _of_all_processes(own: dict[str, float]) -> dict[str, float]:
    """What each process of a distributed training has found."""
    parts: list[Any] = [own]
    if is_distributed():
        parts = [None] * distributed.get_world_size()
        distributed.all_gather_object(parts, own)
    return {path: score for part in parts for path, score in part.items()}
