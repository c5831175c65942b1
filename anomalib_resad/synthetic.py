# SPDX-License-Identifier: Apache-2.0

"""Synthetic defects, for training data that holds no real ones."""

import logging

import torch
from anomalib.data import Batch
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from lightning.pytorch import Callback, LightningModule, Trainer

logger = logging.getLogger(__name__)


class SyntheticDefects(Callback):
    """Paint anomalib's Perlin-noise defects on half of the training images, if no training image has a real one.

    It runs before the pre-processor, on images in 0..1.

    Args:
        probability (float): Share of the images that get a defect.
    """

    def __init__(self, probability: float = 0.5) -> None:
        self.generator = PerlinAnomalyGenerator(anomaly_source_path=None, probability=probability)
        self.active = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether the training data holds real defects."""
        if not getattr(pl_module, "is_trainable", True):
            return
        samples = getattr(getattr(getattr(trainer, "datamodule", None), "train_data", None), "samples", None)
        self.active = samples is None or not bool((samples.label_index == 1).any())
        if self.active:
            logger.info("The training data holds no real defects: synthetic ones (Perlin noise) stand in.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Replace images, masks and labels of the batch."""
        del trainer, pl_module, batch_idx
        if not self.active:
            return
        images, masks = self.generator(batch.image)
        batch.update(
            image=images,
            gt_mask=masks.squeeze(1).bool(),
            gt_label=(masks.flatten(1).amax(dim=1) > 0).to(torch.bool),
        )
