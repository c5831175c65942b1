# SPDX-License-Identifier: Apache-2.0

"""Your own products in MVTec AD's folder layout: any image format, masks optional."""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset, ImageItem
from anomalib.data.utils import LabelName, Split, TestSplitMode, ValSplitMode
from pandas import DataFrame
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler
from torchvision.transforms.v2 import Resize
from torchvision.transforms.v2.functional import to_dtype, to_image
from torchvision.tv_tensors import Mask

from anomalib_resad.data.category_batches import CategoryBatches
from anomalib_resad.data.masks import check_masks, listed, read_mask
from anomalib_resad.enrollment.decoding import BitDepth, PhotoError
from anomalib_resad.enrollment.image_size import Size
from anomalib_resad.enrollment.photos import (
    EXTENSIONS,
    check_photos,
    is_hidden,
    is_photo_file,
    list_photos,
    read_header,
    read_pixels,
)

logger = logging.getLogger(__name__)

LAYOUT = "<category>/train/good, <category>/test/good, <category>/test/<defect>, <category>/ground_truth/<defect>"

GOOD = {"good", "ok", "normal"}  # names of folders of good photos, in any case


def as_image(pixels: np.ndarray) -> Tensor:
    """A photo as anomalib's data sets give it: uint8 ``(H, W, 3)`` to float in 0..1, shape ``(3, H, W)``."""
    return to_dtype(to_image(pixels.copy()), torch.float32, scale=True)


class SamplesDataset(AnomalibDataset):
    """A data set that is given its samples.

    Args:
        samples (DataFrame): anomalib's columns; ``mask_path`` is empty where there is no mask.
        task (str): ``"segmentation"`` for masks beside the images, of those that have one, else ``"classification"``.

    Attributes:
        bit_depth (BitDepth): Bits of a channel that files of more than 8 bits use; :class:`PhotoCheck` sets it.
        sizes (Mapping[str, Size]): By category, height and width that photos are resized to, where each category has
            its own; a training sets it.
    """

    bit_depth: BitDepth = "auto"
    sizes: Mapping[str, Size] = MappingProxyType({})

    def __init__(self, samples: DataFrame, task: str) -> None:
        super().__init__()
        self.samples = samples
        self.samples.attrs["task"] = task

    def __getitem__(self, index: int) -> ImageItem:
        """One image, read as enrollment and the edge read photos, and its mask, all zero for good ones.

        Raises:
            PhotoError: If the photo or the mask cannot be used.
        """
        sample = self.samples.iloc[index]
        image = as_image(read_pixels(sample.image_path, self.bit_depth))
        mask = None
        if self.samples.attrs["task"] == "segmentation" and _is_drawn(sample):
            defective = sample.label_index == LabelName.ABNORMAL
            shown = read_mask(sample.mask_path, read_header(sample.image_path)) if defective else None
            mask = Mask(torch.zeros(image.shape[-2:]) if shown is None else torch.from_numpy(shown))
        own = self.sizes.get(sample.category) if self.sizes else None
        transform = self.augmentations if own is None else Resize(own, antialias=True)
        if transform:
            augmented = transform(image) if mask is None else transform(image, mask)
            image, mask = (augmented, None) if mask is None else augmented
        return ImageItem(
            image=image,
            gt_mask=None if mask is None else cast("Mask", mask).to(torch.uint8),
            gt_label=torch.tensor(int(sample.label_index)),
            image_path=sample.image_path,
            mask_path=sample.mask_path,
        )


def _is_drawn(sample: Any) -> bool:  # noqa: ANN401  # a row of samples
    """Whether it is known which pixels are defective: of good photos, none is."""
    return sample.label_index == LabelName.NORMAL or sample.mask_path != ""


def in_order(data: AnomalibDataModule, dataset: AnomalibDataset) -> DataLoader:
    """Photos to evaluate; those without a mask in batches of their own, which pixel metrics pass over.

    Args:
        data (AnomalibDataModule): Says how many images a batch has, and how many processes load them.
        dataset (AnomalibDataset): The images.
    """
    kinds = ["drawn" if _is_drawn(sample) else "not drawn" for sample in dataset.samples.itertuples()]
    batches = CategoryBatches(SequentialSampler(kinds), data.eval_batch_size, False, kinds)
    collate = data.external_collate_fn or dataset.collate_fn
    return DataLoader(dataset, batch_sampler=batches, num_workers=data.num_workers, collate_fn=collate)


def _photos_in(folder: Path) -> list[Path]:
    """The photos of a folder and of the folders in it; none of a folder that holds none."""
    try:
        return list_photos(folder)
    except PhotoError:
        return []


def _is_good(folder: Path) -> bool:
    return folder.name.lower() in GOOD


def _mask_of(image: Path, defect: Path, root: Path) -> str:
    """The mask of a defective image: its stem, with or without ``_mask``, any image format; empty if there is none."""
    folder = root / "ground_truth" / defect.name / image.parent.relative_to(defect)
    if not folder.is_dir():
        return ""
    files = sorted(path for path in folder.iterdir() if is_photo_file(path))
    masks = [path for stem in (f"{image.stem}_mask", image.stem) for path in files if path.stem == stem]
    return str(masks[0]) if masks else ""


def product_samples(root: Path) -> DataFrame:
    """List the images of one product.

    Args:
        root (Path): Folder of the product.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there are no good training images.
    """
    if not root.is_dir():
        siblings = sorted(path.name for path in root.parent.glob("*") if path.is_dir()) if root.parent.is_dir() else []
        msg = f"There is no folder {root}; {root.parent} holds {siblings or 'no folders'}. The layout is {LAYOUT}."
        raise FileNotFoundError(msg)
    rows = [
        {
            "image_path": str(image),
            "label": folder.name,
            "label_index": LabelName.NORMAL if _is_good(folder) else LabelName.ABNORMAL,
            "mask_path": "" if _is_good(folder) else _mask_of(image, folder, root),
            "split": split.value,
        }
        for split in (Split.TRAIN, Split.TEST)
        for folder in sorted((root / split.value).glob("*/"))
        if not is_hidden(Path(folder.name))
        for image in _photos_in(folder)
    ]
    samples = DataFrame(rows, columns=["image_path", "label", "label_index", "mask_path", "split"])
    if not ((samples.split == Split.TRAIN.value) & (samples.label_index == LabelName.NORMAL)).any():
        formats = ", ".join(sorted(EXTENSIONS))
        msg = f"{root / 'train' / 'good'} holds no image. The layout is {LAYOUT}; formats: {formats}."
        raise ValueError(msg)
    samples["label_index"] = samples.label_index.astype(int)
    return samples


class ProductFolder(AnomalibDataModule):
    """One product in MVTec AD's layout: ``train/good``, ``test/good``, ``test/<defect>``, ``ground_truth/<defect>``.

    Unlike anomalib's ``MVTecAD`` it takes any image format and needs no masks; unlike ``Folder`` it finds the defect
    folders by itself. As a source of :class:`~anomalib_resad.CrossCategory`, one entry can name several products,
    separated by commas.

    Args:
        root (Path | str): Folder that holds the product folders.
        category (str): Name of the product's folder.
        train_batch_size (int): Images per training batch.
        eval_batch_size (int): Images per validation and test batch.
        num_workers (int): Processes that load images.
        val_split_mode (ValSplitMode | str): Where validation images come from. By default nowhere: enrolling needs
            none. To train on this product alone choose ``"synthetic"``, which gives the model a threshold without
            touching the test images.
        val_split_ratio (float): Share of the images that validation takes.
        seed (int | None): Seed of the split.
    """

    def __init__(
        self,
        root: Path | str,
        category: str,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 4,
        val_split_mode: ValSplitMode | str = ValSplitMode.NONE,
        val_split_ratio: float = 0.2,
        seed: int | None = 0,
    ) -> None:
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            test_split_mode=TestSplitMode.FROM_DIR,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        self.root = Path(root)
        self.category = category

    @property
    def name(self) -> str:  # type: ignore[override]  # as anomalib's own datamodules do
        """The name of the folder that holds the products."""
        return self.root.resolve().name

    def _setup(self, _stage: str | None = None) -> None:
        samples = product_samples(self.root / self.category)
        check_photos(samples.image_path, f"images of {self.category}")
        samples = check_masks(samples, self.category)
        defective = samples[samples.label_index == LabelName.ABNORMAL]
        missing = defective.image_path[defective.mask_path == ""].tolist()
        if 0 < len(missing) < len(defective):
            logger.warning(
                "%s: %d of %d defective photos have no mask, and do not count in pixel metrics: %s. Add the masks, or "
                "move these photos away.",
                self.category,
                len(missing),
                len(defective),
                listed(missing),
            )
        for split, attribute in ((Split.TRAIN, "train_data"), (Split.TEST, "test_data")):
            own = samples[samples.split == split.value].reset_index(drop=True)
            masks = own.mask_path[own.label_index == LabelName.ABNORMAL] != ""
            # Photos to train on are shuffled into batches that have masks, or have none.
            is_read = masks.all() or (split == Split.TEST and masks.any())
            task = "segmentation" if is_read else "classification"
            setattr(self, attribute, SamplesDataset(own, task))

    def _create_test_split(self) -> None:
        """The test images are those of the test folder, be there normals or not."""

    def val_dataloader(self):  # noqa: ANN201  # anomalib's own annotation is a union of Lightning's
        """Validation images; none by default."""
        if isinstance(getattr(self, "val_data", None), SamplesDataset):  # a share of the test images
            return in_order(self, self.val_data)
        return super().val_dataloader() if hasattr(self, "val_data") else []

    def test_dataloader(self) -> DataLoader:
        """Test images."""
        return in_order(self, self.test_data)
