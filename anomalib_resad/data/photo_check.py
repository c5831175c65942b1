# SPDX-License-Identifier: Apache-2.0

"""The rules for photos where anomalib itself reads them: `anomalib predict` on a folder, and its own data sets.

anomalib reads with ``Image.open(path).convert("RGB")``, which makes white of 16-bit gray, takes the high bytes of deep
colors, and turns TIFF alone by its orientation. Here every file's header is checked before anything is computed, and
where anomalib gives other pixels than :mod:`anomalib_resad.enrollment.decoding`, the photo is read again.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule, ImageItem
from anomalib.data.datasets.base.video import AnomalibVideoDataset
from anomalib.data.predict import PredictDataset
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.data.utils.synthetic import SyntheticAnomalyDataset
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchvision.transforms.v2 import Resize

from anomalib_resad.data.masks import check_masks
from anomalib_resad.data.product_folder import SamplesDataset, as_image
from anomalib_resad.enrollment.decoding import BitDepth
from anomalib_resad.enrollment.photos import (
    check_photos,
    is_hidden,
    is_read_alike,
    read_header,
    read_like,
    refuse,
)

logger = logging.getLogger(__name__)

SPLITS = ("train_data", "val_data", "test_data", "reference_data")


class PredictPhotos(PredictDataset):
    """anomalib's photos to predict on, read by the rules.

    Attributes:
        bit_depth (int): Bits of a channel of all of them.
    """

    bit_depth: int = 8

    def __getitem__(self, index: int) -> ImageItem:
        """One photo.

        Raises:
            PhotoError: If it cannot be used.
        """
        path = self.image_filenames[index]
        image = as_image(read_like(path, self.bit_depth))
        return ImageItem(image=self.transform(image) if self.transform else image, image_path=str(path))


class PhotoCheck(Callback):
    """Refuses photos that cannot be used before anything is computed, and reads those again that anomalib gets wrong.

    Args:
        bit_depth (BitDepth): Bits of a channel that files of more than 8 bits use; ``"auto"``: what they state.
    """

    def __init__(self, bit_depth: BitDepth = "auto") -> None:
        self.bit_depth = bit_depth
        self._own: set[str] = set()  # photos that are read by the rules already

    # -- before anything is computed ----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the headers of all files, and all masks; of a folder to predict on, leave out hidden ones.

        Raises:
            PhotoError: If some cannot be used.
        """
        del pl_module
        for dataset in _datasets(trainer, stage):
            if type(dataset) is PredictDataset:
                dataset.__class__ = PredictPhotos  # a loader does not let its data set be replaced
                _leave_out_hidden(dataset)
            if isinstance(dataset, SamplesDataset):
                dataset.bit_depth = self.bit_depth
            if isinstance(dataset, SamplesDataset | PredictPhotos):
                self._own.update(_paths(dataset))
            check_photos(_paths(dataset), "photos", bit_depth=self.bit_depth if stage == "fit" else None)
            if isinstance(dataset, SyntheticAnomalyDataset):
                _check_painted(_paths(trainer.datamodule.train_data))  # type: ignore[attr-defined]
            elif not isinstance(dataset, SamplesDataset | PredictDataset) and stage != "predict":
                check_masks(dataset.samples, "the data set", as_anomalib=True)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse photos of another bit depth than those in the bank, which was filled just now.

        Raises:
            PhotoError: If there are some.
        """
        self._check_depth(trainer, pl_module, "test")
        _start_anew(trainer, trainer.test_loop)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the photos of a validation outside of a training by what is known only now."""
        del pl_module
        if trainer.state.fn == TrainerFn.VALIDATING:
            _start_anew(trainer, trainer.validate_loop)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same before a prediction.

        Raises:
            PhotoError: If there are some.
        """
        self._check_depth(trainer, pl_module, "predict")
        _start_anew(trainer, trainer.predict_loop)

    @staticmethod
    def _check_depth(trainer: Trainer, pl_module: Any, stage: str) -> None:  # noqa: ANN401  # a ResAD
        bit_depth = pl_module.model.bank.record.bit_depth
        for dataset in _datasets(trainer, stage):
            if isinstance(dataset, SamplesDataset | PredictPhotos):
                dataset.bit_depth = bit_depth
            check_photos(_paths(dataset), "photos", bit_depth=bit_depth, exact=True)

    # -- what anomalib read -------------------------------------------------------------------------------------------

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Read photos again where anomalib read them differently.

        Raises:
            PhotoError: If one cannot be used.
        """
        del trainer, batch_idx, dataloader_idx
        images = batch.image
        if not isinstance(images, Tensor) or not getattr(batch, "image_path", None):
            return
        others = [index for index, path in enumerate(batch.image_path) if path not in self._own]
        wrong = [index for index in others if not is_read_alike(batch.image_path[index])]
        if not wrong:
            return
        photos = list(images)
        for index in wrong:
            pixels = read_like(batch.image_path[index], pl_module.model.bank.record.bit_depth)
            photos[index] = as_image(pixels).to(images)
        if len({photo.shape for photo in photos}) > 1:  # the data set resized the others
            for resize in extract_transforms_by_type(getattr(pl_module.pre_processor, "transform", None), Resize):
                photos = [resize(photo) for photo in photos]
        batch.image = torch.stack(photos)

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Name the files that could not be decoded, which anomalib's own reading does not.

        Raises:
            PhotoError: If there are some.
        """
        del pl_module
        if isinstance(exception, OSError | SyntaxError):  # what Pillow raises
            for dataset in _datasets(trainer, str(trainer.state.stage and trainer.state.stage.value)):
                check_photos(_paths(dataset), "photos", decode=True, bit_depth=self.bit_depth)


def _start_anew(trainer: Trainer, loop: Any) -> None:  # noqa: ANN401  # Lightning's loops
    """Let loaders begin again: their processes read by the bit depth and the size from before the enrollment."""
    if isinstance(getattr(trainer, "datamodule", None), AnomalibDataModule):
        trainer.datamodule._update_augmentations()  # type: ignore[attr-defined]
    loop.reset()


def _datasets(trainer: Trainer, stage: str) -> Iterator[Any]:
    """The data sets of a stage: what a prediction is made on, the test images, or all of a datamodule's."""
    source = trainer.predict_loop._data_source.instance if stage == "predict" else None
    for loader in source if isinstance(source, list) else [source]:
        if isinstance(getattr(loader, "dataset", None), PredictDataset):
            yield loader.dataset  # type: ignore[union-attr]
    datamodule: Any = getattr(trainer, "datamodule", None)
    for split in ("test_data",) if stage in ("test", "predict") else SPLITS:
        dataset = getattr(datamodule, split, None)
        if hasattr(dataset, "samples") and not isinstance(dataset, AnomalibVideoDataset):  # whose files are no photos
            yield dataset


def _paths(dataset: Any) -> list[str]:  # noqa: ANN401
    if isinstance(dataset, PredictDataset):
        return [str(path) for path in dataset.image_filenames]
    return [str(path) for path in dataset.samples.get("image_path", ())]


def _check_painted(paths: list[str]) -> None:
    """Refuse photos that anomalib has painted synthetic defects on, and has read wrongly for that.

    Raises:
        PhotoError: If there are some.
    """
    why = (
        "anomalib paints its synthetic defects on what it reads, which is not this photo; save it in 8 bits, not turned"
    )
    refuse([f"{path}: {why}" for path in paths if not read_header(path).is_shown_alike], "photos for synthetic defects")


def _leave_out_hidden(dataset: PredictDataset) -> None:
    names = [Path(name) for name in dataset.image_filenames]
    folder = os.path.commonpath([name.parent for name in names])
    shown = [name for name in names if not is_hidden(name.relative_to(folder))]
    if len(shown) < len(names):
        logger.warning("%s: %d hidden files were left out.", folder, len(names) - len(shown))
    dataset.image_filenames = shown
