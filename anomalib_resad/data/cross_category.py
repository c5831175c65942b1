# SPDX-License-Identifier: Apache-2.0

"""Train on many categories of many data sets, test on one that was never trained on."""

import copy
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.utils import LabelName, TestSplitMode, ValSplitMode
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from pandas import DataFrame
from torch.utils.data import DataLoader, SequentialSampler

from anomalib_resad.data.category_batches import CategoryBatches
from anomalib_resad.data.masks import check_masks, listed
from anomalib_resad.data.product_folder import ProductFolder, SamplesDataset, in_order
from anomalib_resad.enrollment.draws import draw, seeded
from anomalib_resad.enrollment.photos import check_photos

logger = logging.getLogger(__name__)

LEAST_GROUP = 3  # images of one label of a category of which at least one is held out


def category_name(datamodule: AnomalibDataModule) -> str:
    """Name of a datamodule's category with its data set (``MVTecAD/bottle``), or the data set's alone."""
    return f"{datamodule.name}/{datamodule.category}" if datamodule.category else datamodule.name


def split_categories(datamodule: AnomalibDataModule) -> list[AnomalibDataModule]:
    """One datamodule per category of a comma-separated list: ``category: "candle, capsules"`` makes two.

    ``category: "*"`` makes one of each folder of the root that holds ``train/good``.

    Raises:
        ValueError: If there is no such folder.
    """
    names = [name.strip() for name in str(datamodule.category or "").split(",")]
    if names == ["*"]:
        root = Path(getattr(datamodule, "root", "."))
        names = sorted(path.parent.parent.name for path in root.glob("*/train/good"))
        if not names:
            msg = f"category='*' finds no product in {root}: no folder in it holds train/good."
            raise ValueError(msg)
    if names == [str(datamodule.category or "")]:
        return [datamodule]
    singles = [copy.deepcopy(datamodule) for _ in names]
    for single, name in zip(singles, names, strict=True):
        single.category = name
    return singles


def category_samples(datamodule: AnomalibDataModule) -> DataFrame:
    """All images of one source category, train and test splits alike, without defective ones that have no mask.

    Raises:
        ValueError: If the category has no good images.
    """
    name = category_name(datamodule)
    datamodule.val_split_mode = ValSplitMode.NONE  # nothing of a source category is held back here
    try:
        datamodule.prepare_data()
        datamodule.setup()
    except (FileNotFoundError, NotADirectoryError, RuntimeError, ValueError) as error:
        msg = (
            f"The source category {name} could not be read: {error}. Check its root and category; for a data set "
            "without masks use anomalib's Folder datamodule (normal_dir, abnormal_dir)."
        )
        raise type(error)(msg) from error
    samples = pd.concat([datamodule.train_data.samples, datamodule.test_data.samples], ignore_index=True)
    samples = samples.drop_duplicates("image_path").reset_index(drop=True)
    if "mask_path" not in samples:
        samples["mask_path"] = None
    has_mask = samples.mask_path.map(lambda path: isinstance(path, str) and Path(path).is_file())
    samples["mask_path"] = samples.mask_path.where(has_mask, "")  # some data sets say NaN, which anomalib cannot read
    if not isinstance(datamodule, ProductFolder):  # which did it
        samples = check_masks(samples, name)
    usable = (samples.label_index == LabelName.NORMAL) | (samples.mask_path != "")
    if not usable.all():
        logger.warning(
            "%s: %d of %d defective images have no mask and are left out of training: %s.",
            name,
            int((~usable).sum()),
            int((samples.label_index != LabelName.NORMAL).sum()),
            listed(samples.image_path[~usable].tolist()),
        )
    samples = samples[usable].reset_index(drop=True)
    if not (samples.label_index == LabelName.NORMAL).any():
        msg = f"The source category {name} has no good images; residuals need some as references."
        raise ValueError(msg)
    samples["category"] = name
    return samples[["image_path", "mask_path", "label_index", "split", "category"]]


class CrossCategory(AnomalibDataModule):
    """Source categories to train on, and a target category that is never trained on.

    The source gives all of its images: normals and real defects with masks, of the train and the test splits alike
    (ResAD, section 4.1: source classes are never tested). A small part of each source category is held out as
    validation data, from which the model learns its threshold. The target's train split gives the reference photos,
    its test split the test images.

    Args:
        source (AnomalibDataModule | list[AnomalibDataModule]): One or several of anomalib's datamodules. Several
            categories of one data set can share an entry, separated by commas: ``category: "candle, capsules"``.
        target (AnomalibDataModule | None): Datamodule of the target category. Without one, only ``anomalib fit`` works.
        val_ratio (float): Share of each source category that is held out for validation.
        train_batch_size (int): Images per training batch; 32 in the paper.
        eval_batch_size (int): Images per validation and test batch.
        num_workers (int): Processes that load images.
        seed (int): Seed of the held-out share.

    Raises:
        ValueError: If the target is among the sources, or a category cannot be used.

    Example:
        VisA's categories to train on, MVTecAD's bottle to test on::

            data:
              class_path: anomalib_resad.CrossCategory
              init_args:
                source:
                  class_path: Visa
                  init_args: {category: "candle, capsules, cashew, chewinggum, fryum"}
                target:
                  class_path: MVTecAD
                  init_args: {category: bottle}
    """

    def __init__(
        self,
        source: AnomalibDataModule | list[AnomalibDataModule],
        target: AnomalibDataModule | None = None,
        val_ratio: float = 0.1,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            test_split_mode=TestSplitMode.FROM_DIR,
            val_split_mode=ValSplitMode.FROM_DIR,
            seed=seed,
        )
        entries = list(source) if isinstance(source, Sequence) else [source]
        self.sources = [single for entry in entries for single in split_categories(entry)]
        self.target = target
        self.val_ratio = val_ratio
        if not self.sources:
            msg = "source is empty; name at least one datamodule to train on."
            raise ValueError(msg)
        if not 0 <= val_ratio < 1:
            msg = f"val_ratio={val_ratio} must be at least 0 and less than 1."
            raise ValueError(msg)
        if target is not None:
            self.category = target.category or target.name
            self._refuse_overlap([category_name(single) for single in self.sources], category_name(target))

    @staticmethod
    def _refuse_overlap(sources: list[str], target: str) -> None:
        repeated = [name for name, count in Counter(sources).items() if count > 1]
        if repeated:
            msg = f"The source names {repeated} more than once."
            raise ValueError(msg)
        if target in sources:
            msg = f"The target {target} is among the source categories {sources}; a target must never be trained on."
            raise ValueError(msg)

    @property
    def reference_data(self) -> AnomalibDataset | None:
        """The split that reference photos of the target are drawn from."""
        return self.target.train_data if self.target is not None else None

    def prepare_data(self) -> None:
        """Download what can be downloaded and is not there."""
        for datamodule in [*self.sources, *([self.target] if self.target else [])]:
            datamodule.prepare_data()

    def _setup(self, _stage: str | None = None) -> None:
        samples = pd.concat([category_samples(single) for single in self.sources], ignore_index=True)
        check_photos(samples.image_path, "source images")
        if self.target is not None:
            self.target.setup()
            self._refuse_shared_files(samples)
            check_photos(self.target.test_data.samples.image_path, "test images")
            self.test_data = self.target.test_data
        held_out = samples.image_path.isin(self._held_out(samples))
        # Always segmentation: normals get an empty mask, so that categories with and without masks can share a batch.
        self.train_data = SamplesDataset(samples[~held_out].reset_index(drop=True), "segmentation")
        self.val_data = SamplesDataset(samples[held_out].reset_index(drop=True), "segmentation")
        self._warn_of_missing(samples[held_out])
        counts = samples.label_index.value_counts()
        logger.info(
            "Source: %d categories, %d good and %d defective images, %d of them held out for the threshold.",
            samples.category.nunique(),
            counts.get(0, 0),
            counts.get(1, 0),
            int(held_out.sum()),
        )

    def _refuse_shared_files(self, samples: DataFrame) -> None:
        """Refuse a target that shares image files with the source, whatever the categories are called."""
        assert self.target is not None
        splits = [self.target.train_data.samples, self.target.test_data.samples]
        target = {str(Path(path).resolve()) for split in splits for path in split.image_path}
        shared = [path for path in samples.image_path if str(Path(path).resolve()) in target]
        if shared:
            msg = (
                f"{len(shared)} images are in the source and in the target {category_name(self.target)} "
                f"(first: {shared[0]}); a target must never be trained on."
            )
            raise ValueError(msg)

    def _held_out(self, samples: DataFrame) -> list[str]:
        """Validation images: the same share of the good and of the defective ones of each category.

        Of few images, of which the share is less than one, one is held out: without any, no threshold is learned.
        """
        held_out: list[str] = []
        for (category, label), group in samples.groupby(["category", "label_index"]):
            paths = group.image_path.tolist()
            least = 1 if self.val_ratio > 0 and len(paths) >= LEAST_GROUP else 0
            generator = seeded(self.seed or 0, str(category), str(label))
            held_out += draw(paths, max(least, int(self.val_ratio * len(paths))), generator)
        return held_out

    def _warn_of_missing(self, held_out: DataFrame) -> None:
        """Say so if no threshold can be learned, because no good or no defective image is held out."""
        missing = [name for name, label in (("good", 0), ("defective", 1)) if not (held_out.label_index == label).any()]
        if missing and self.val_ratio > 0:
            logger.warning(
                "No %s source image is held out, so no threshold can be learned (val_ratio=%g; of fewer than %d images "
                "of a label none is taken). Add such images, or give products a threshold by false_alarm_rate.",
                " and no ".join(missing),
                self.val_ratio,
                LEAST_GROUP,
            )

    def _create_test_split(self) -> None:
        """The composed datamodules made their splits."""

    def _create_val_split(self) -> None:
        """The validation data is the held-out share of the source."""

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Held-out source images, those of one category together; none where nothing is held out."""
        if not len(self.val_data):
            return []
        categories = self.val_data.samples.category.tolist()
        batches = CategoryBatches(SequentialSampler(categories), self.eval_batch_size, False, categories)
        collate = self.external_collate_fn or self.val_data.collate_fn
        return DataLoader(self.val_data, batch_sampler=batches, num_workers=self.num_workers, collate_fn=collate)

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """Test images of the target.

        Raises:
            ValueError: If there is no target.
        """
        if self.target is None:
            msg = "There is no target to test on: add `target` to the datamodule, or train only, with `anomalib fit`."
            raise ValueError(msg)
        own = isinstance(self.test_data, SamplesDataset)
        return in_order(self, self.test_data) if own else super().test_dataloader()
