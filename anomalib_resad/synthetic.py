# SPDX-License-Identifier: Apache-2.0

"""Synthetic defects, painted on good photos: beside real ones, or in their place where there are none."""

import logging
import random

import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.data.utils.generators import PerlinAnomalyGenerator
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from anomalib_resad.feature_cache import FeatureCache
from anomalib_resad.photos import seeded

logger = logging.getLogger(__name__)

# Share of the photos that get a defect where no training photo has a real one.
SHARE_WITHOUT_REAL = 0.5


def paint(generator: PerlinAnomalyGenerator, image: Tensor) -> tuple[Tensor, Tensor]:
    """Paint one defect.

    Half of the defects are anomalib's, patches of altered noise. The other half show the photo's own texture at the
    wrong place, turned, lighter or darker: as real defects do, they resemble the product more than noise does.

    Args:
        generator (PerlinAnomalyGenerator): Gives the shapes, and the noise.
        image (Tensor): Photo in 0..1, shape ``(3, H, W)``.

    Returns:
        tuple[Tensor, Tensor]: The painted photo, and where it is, shape ``(H, W)``.
    """
    height, width = image.shape[-2:]
    painted, mask = generator(image)
    shape = mask.reshape(height, width) > 0
    if torch.rand(()) < 0.5:
        return painted.clamp(0, 1), shape
    shifts = [int(torch.randint(side // 10, side - side // 10 + 1, ())) for side in (height, width)]
    texture = image.flip(1 + int(torch.randint(2, ()))).roll(shifts, (1, 2))
    mean = texture.mean(dim=(1, 2), keepdim=True)
    contrast, shift, blend = (
        float(torch.empty(()).uniform_(*limits)) for limits in ((0.6, 1.5), (-0.15, 0.15), (0.3, 1))
    )
    texture = ((texture - mean) * contrast + mean + shift).clamp(0, 1)
    return torch.where(shape, blend * texture + (1 - blend) * image, image), shape


class SyntheticDefects(Callback):
    """Paint defects on some of the good training images, on others in each epoch.

    Each photo has one painted version, always the same, so that its features can be kept: many photos make many
    defects. The callback runs before the pre-processor, on images in 0..1.

    Args:
        share (float): Share of the good images that get a defect. Where no training image has a real one, it is 0.5 at
            least.
        seed (int): Seed of the defects.
        cache (FeatureCache | None): Features that are kept; a version that is among them need not be painted again.
    """

    def __init__(self, share: float = 0.0, seed: int = 0, cache: FeatureCache | None = None) -> None:
        if not 0 <= share <= 1:
            msg = f"synthetic={share} must be a share of the good images, 0 to 1."
            raise ValueError(msg)
        self.share = share
        self.seed = seed
        self.cache = cache
        self.share_now = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether the training data holds real defects."""
        if not getattr(pl_module, "is_trainable", True):
            return
        samples = getattr(getattr(getattr(trainer, "datamodule", None), "train_data", None), "samples", None)
        has_real = samples is not None and bool((samples.label_index == 1).any())
        self.share_now = self.share if has_real else max(self.share, SHARE_WITHOUT_REAL)
        if not has_real:
            logger.info("The training data holds no real defects: synthetic ones stand in.")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: ImageBatch, batch_idx: int
    ) -> None:
        """Replace images, masks and labels of the batch, and tell the model which version of each photo it sees."""
        del batch_idx
        if not self.share_now:
            return
        assert batch.image is not None
        assert batch.image_path is not None
        images = batch.image.clone()
        masks = torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool, device=images.device)
        if batch.gt_mask is not None:
            masks |= batch.gt_mask.bool()
        labels = masks.flatten(1).any(dim=1) if batch.gt_label is None else batch.gt_label.bool()
        names = list(batch.image_path)
        for index, path in enumerate(batch.image_path):
            chance = seeded(self.seed, trainer.current_epoch, path, "defect")
            if labels[index] or chance.random() >= self.share_now:
                continue
            names[index] = f"{path} painted"
            kept = self.cache.get(names[index]) if self.cache is not None else None
            if kept is not None:
                masks[index] = kept[-1]
                continue
            with isolate_rng(include_cuda=False):
                seed = int(seeded(self.seed, path).integers(2**31))
                random.seed(seed)  # the generator draws from all three
                np.random.seed(seed)  # noqa: NPY002
                torch.manual_seed(seed)
                # A new one each time: it draws one of its settings (a threshold) when it is made.
                generator = PerlinAnomalyGenerator(anomaly_source_path=None, probability=1.0)
                images[index], masks[index] = paint(generator, images[index])
        batch.update(image=images, gt_mask=masks, gt_label=labels | masks.flatten(1).any(dim=1))
        pl_module.batch_versions = names  # type: ignore[assignment]
