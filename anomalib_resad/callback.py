# SPDX-License-Identifier: Apache-2.0

"""Reference photos for the model: drawn anew for each training image, enrolled once for test, predict and export."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import AnomalibDataset, ImageBatch
from anomalib.data.utils import LabelName
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from anomalib_resad.datamodule import category_name
from anomalib_resad.photos import content_hash, draw, draw_references, list_photos, read_photo, seeded
from anomalib_resad.reference_bank import to_rows

if TYPE_CHECKING:
    from anomalib_resad.lightning_model import ResAD

WHOLE = "data"  # category of datamodules that have only one


class FeatureCache:
    """Features of photos by path, the least recently used dropped first.

    Args:
        max_bytes (int): Most bytes of features kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._kept: OrderedDict[str, list[Tensor]] = OrderedDict()

    def get(self, path: str, compute: Callable[[str], list[Tensor]]) -> list[Tensor]:
        """Return the features of a photo, computed if they are not kept."""
        if path in self._kept:
            self._kept.move_to_end(path)
            return self._kept[path]
        features = compute(path)
        self._kept[path] = features
        self.bytes += self._size(features)
        while self.bytes > self.max_bytes:
            _, dropped = self._kept.popitem(last=False)
            self.bytes -= self._size(dropped)
        return features

    @staticmethod
    def _size(features: list[Tensor]) -> int:
        return sum(level.nbytes for level in features)


class ReferencePools:
    """Good images of each category, and the category of each image.

    Args:
        *datasets (AnomalibDataset): Data sets; the first gives the good images.
    """

    def __init__(self, *datasets: AnomalibDataset) -> None:
        self.category_of: dict[str, str] = {}
        for dataset in datasets:
            samples = dataset.samples
            categories = samples.category if "category" in samples else [WHOLE] * len(samples)
            self.category_of.update(zip(samples.image_path, categories, strict=True))
        train = datasets[0].samples
        good = train.image_path[train.label_index == LabelName.NORMAL]
        self.good: dict[str, list[str]] = {}
        for path in good:
            self.good.setdefault(self.category_of[path], []).append(path)

    def draw(self, path: str, k_shot: int, *keys: int | str) -> list[str]:
        """Draw references for an image from its own category: never itself, without replacement.

        Args:
            path (str): The image.
            k_shot (int): How many.
            *keys (int | str): What the draw depends on.

        Raises:
            ValueError: If the category has too few other good images.
        """
        category = self.category_of[path]
        others = [other for other in self.good.get(category, []) if other != path]
        if len(others) < k_shot:
            msg = (
                f"k_shot={k_shot}, but {category} has {len(others)} good training images beside {path}. "
                "Add good images, leave the category out, or pass a smaller k_shot."
            )
            raise ValueError(msg)
        return draw(others, k_shot, seeded(*keys))


def _names(record: dict[str, Any]) -> str:
    return ", ".join(file["name"] for file in record.get("files", []))


class FewShotReferences(Callback):
    """Give the model its references.

    In training, each image gets references of its own: drawn from the good training images of its category, never the
    image itself, seeded by epoch and image. Held-out source images are scored against one draw per category. For
    test, predict and export, the bank is filled once: from the folder ``references``, else from the train split of
    the target (sorted paths, seeded). Which files were taken is printed and stored with the bank.

    Args:
        k_shot (int): Reference photos of a category.
        references (Path | str | None): Folder of good photos.
        seed (int): Seed of the draws.
        cache_gb (float): Most memory for features of source references during training, in GB.
    """

    def __init__(
        self,
        k_shot: int = 4,
        references: Path | str | None = None,
        seed: int = 0,
        cache_gb: float = 2.0,
    ) -> None:
        self.k_shot = k_shot
        self.references = references
        self.seed = seed
        self._cache = FeatureCache(int(cache_gb * 1e9))
        self._pools: ReferencePools | None = None

    def _features(self, pl_module: "ResAD", path: str) -> list[Tensor]:
        """Features of one photo, one map ``(1, C_l, H_l, W_l)`` per level."""
        photo = read_photo(path).unsqueeze(0)
        pre_processor = pl_module.pre_processor
        if isinstance(pre_processor, PreProcessor) and pre_processor.transform is not None:
            photo = pre_processor.transform(photo)
        return pl_module.model.encode(photo.to(pl_module.device))

    def _rows(self, pl_module: "ResAD", paths: list[str]) -> list[Tensor]:
        """Bank rows of some photos, ``(N_l, C_l)`` per level."""

        def compute(path: str) -> list[Tensor]:
            return [to_rows(level) for level in self._features(pl_module, path)]

        photos = [self._cache.get(path, compute) for path in paths]
        return [torch.cat(level) for level in zip(*photos, strict=True)]

    # -- enrollment --------------------------------------------------------------------------------------------------

    def enroll(self, trainer: Trainer, pl_module: "ResAD") -> None:
        """Fill the bank, unless it already holds these photos.

        A restored bank (``--ckpt_path``) is kept for its own category, however few or many photos it was made of. The
        folder ``references``, or another category, replaces it.

        Raises:
            ValueError: If there are too few photos, or unusable ones.
            FileNotFoundError: If the folder is missing.
        """
        bank = pl_module.model.bank
        datamodule = getattr(trainer, "datamodule", None)
        category = self._target_category(datamodule)
        data = getattr(datamodule, "reference_data", getattr(datamodule, "train_data", None))
        if self.references is not None:
            photos, where = list_photos(self.references), str(self.references)
        elif data is None or (pl_module.keeps_bank and bank.record.get("category") in (None, category)):
            # An empty bank says so when it is used: without a target, training does not need one.
            if not bank.is_empty:
                rank_zero_info(f"Using the references of the checkpoint: {_names(bank.record)}")
            return
        else:
            samples = data.samples
            photos = samples.image_path[samples.label_index == LabelName.NORMAL].tolist()
            where = f"the train split of {category}"
        chosen = draw_references(photos, self.k_shot, self.seed, where)
        record: dict[str, Any] = {
            "category": category,
            "origin": "train split" if self.references is None else "folder",
            "k_shot": self.k_shot,
            "seed": self.seed,
            "files": [{"name": Path(path).name, "sha256": content_hash(path)} for path in chosen],
        }
        if record != bank.record:
            features = [self._features(pl_module, path) for path in chosen]
            bank.fill([torch.cat(level) for level in zip(*features, strict=True)], record)
            count = f"{len(chosen)} of {len(photos)} good photos of {where}"
            rank_zero_info(f"Enrolled {count} (seed {self.seed}): {_names(record)}")

    @staticmethod
    def _target_category(datamodule: Any) -> str | None:  # noqa: ANN401
        if datamodule is None:
            return None
        return category_name(getattr(datamodule, "target", None) or datamodule)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enroll the target early: the backbone is frozen, and each checkpoint then holds the bank."""
        self.enroll(trainer, pl_module)  # type: ignore[arg-type]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enroll the target."""
        self.enroll(trainer, pl_module)  # type: ignore[arg-type]

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enroll the target."""
        self.enroll(trainer, pl_module)  # type: ignore[arg-type]

    # -- source images, each with references of its own ---------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up which good images each category has."""
        del pl_module
        datamodule = getattr(trainer, "datamodule", None)
        train = datamodule.train_data if datamodule is not None else trainer.train_dataloader.dataset  # type: ignore[union-attr]
        held_out = [datamodule.val_data] if datamodule is not None and self._validates_on_source(trainer) else []
        self._pools = ReferencePools(train, *held_out)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: ImageBatch, batch_idx: int
    ) -> None:
        """Draw references for each image of the batch."""
        del batch_idx
        model: ResAD = pl_module  # type: ignore[assignment]
        if not model.is_trainable:
            return
        assert self._pools is not None
        assert batch.image_path is not None
        keys = (self.seed, trainer.current_epoch)
        drawn = [self._pools.draw(path, self.k_shot, *keys, path) for path in batch.image_path]
        model.batch_references = [self._rows(model, paths) for paths in drawn]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enroll the target where validation is not about source images."""
        if not self._validates_on_source(trainer):
            self.enroll(trainer, pl_module)  # type: ignore[arg-type]

    @staticmethod
    def _validates_on_source(trainer: Trainer) -> bool:
        held_out = getattr(getattr(trainer, "datamodule", None), "val_data", None)
        return held_out is not None and "category" in held_out.samples

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Give held-out source images the references of their category."""
        del batch_idx, dataloader_idx
        model: ResAD = pl_module  # type: ignore[assignment]
        model.batch_references = None
        if not self._validates_on_source(trainer):
            return
        assert batch.image_path is not None
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        pools = self._pools or ReferencePools(datamodule.train_data, datamodule.val_data)
        banks: dict[str, list[Tensor]] = {}
        for path in batch.image_path:
            category = pools.category_of[path]
            if category not in banks:
                banks[category] = self._rows(model, pools.draw(path, self.k_shot, self.seed, category))
        model.batch_references = [banks[pools.category_of[path]] for path in batch.image_path]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:  # noqa: ANN401
        """Drop the references of the batch."""
        del trainer, args
        pl_module.batch_references = None  # type: ignore[assignment]

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:  # noqa: ANN401
        """Drop the references of the batch."""
        del trainer, args
        pl_module.batch_references = None  # type: ignore[assignment]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Free the features of source references."""
        del trainer, pl_module
        self._cache = FeatureCache(self._cache.max_bytes)
