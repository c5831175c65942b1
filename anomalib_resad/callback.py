# SPDX-License-Identifier: Apache-2.0

"""Reference photos for the model: drawn anew for each training image, enrolled once for test, predict and export."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import AnomalibDataset, ImageBatch
from anomalib.data.utils import LabelName
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torchvision.transforms.v2 import Compose, Resize

from anomalib_resad.datamodule import category_name
from anomalib_resad.feature_cache import FeatureCache
from anomalib_resad.leave_one_out import reference_scores
from anomalib_resad.photos import content_hash, draw, draw_references, list_photos, read_photo, seeded
from anomalib_resad.post_processor import RankKeepingPostProcessor
from anomalib_resad.reference_bank import to_rows
from anomalib_resad.references import ReferencePools, encode_photo, reference_rows

if TYPE_CHECKING:
    from anomalib_resad.lightning_model import ResAD

# Good source photos that keys are learned from, the same number of each category: each is thousands of patches.
KEY_PHOTOS = 64


def augments(dataset: AnomalibDataset) -> bool:
    """Whether a data set changes its images at random; anomalib adds the model's own resizing, which does not."""
    transform = getattr(dataset, "augmentations", None)
    steps = transform.transforms if isinstance(transform, Compose) else [transform]
    return any(step is not None and not isinstance(step, Resize) for step in steps)


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
        cache_gb (float): Most memory for features of source images during training, in GB.
        false_alarm_rate (float | None): Give the enrolled product a threshold of its own at this rate, from the
            references alone; ``None`` leaves the threshold as it is stored.
    """

    def __init__(
        self,
        k_shot: int = 4,
        references: Path | str | None = None,
        seed: int = 0,
        cache_gb: float = 2.0,
        false_alarm_rate: float | None = None,
    ) -> None:
        self.false_alarm_rate = false_alarm_rate
        self.k_shot = k_shot
        self.references = references
        self.seed = seed
        self.cache = FeatureCache(int(cache_gb * 1e9))
        self._pools: ReferencePools | None = None
        self._held_out: dict[str, list[Tensor]] = {}  # rows by source category
        self._augments = False

    def _photo(self, pl_module: "ResAD", path: str) -> list[Tensor]:
        """Features of a source photo, ``(C_l, H_l, W_l)`` per level, kept if there is room."""
        features = self.cache.get(path)
        if features is None:
            features = [level[0] for level in encode_photo(pl_module.model, pl_module.pre_processor, read_photo(path))]
            self.cache.put(path, features)
        return features

    def _rows(self, pl_module: "ResAD", paths: list[str]) -> list[Tensor]:
        """Bank rows of some photos, ``(N_l, C_l)`` per level."""
        photos = [[to_rows(level[None]) for level in self._photo(pl_module, path)] for path in paths]
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
        rotations = pl_module.hparams["rotations"]  # asked for now: a restored checkpoint brings its own
        if rotations != "auto":
            record["rotations"] = rotations
        if not record.items() <= bank.record.items():
            rows, turns = reference_rows(pl_module.model, pl_module.pre_processor, chosen, rotations)
            bank.store(rows, record | {"rotations": turns})
            count = f"{len(chosen)} of {len(photos)} good photos of {where}"
            rank_zero_info(f"Enrolled {count} (seed {self.seed}): {_names(record)}")
            if turns > 1:
                why = "They lie turned, so each" if rotations == "auto" else "Each"
                rank_zero_info(f"{why} was enrolled {turns} ways round (rotations={rotations!r}).")
            if isinstance(pl_module.post_processor, RankKeepingPostProcessor):
                pl_module.post_processor.forget_product()

    def calibrate(self, pl_module: "ResAD") -> None:
        """Give the enrolled product a threshold of its own, if one was wished; its scores are kept with the bank.

        Raises:
            ValueError: If the bank does not hold whole photos.
        """
        bank, post_processor = pl_module.model.bank, pl_module.post_processor
        if self.false_alarm_rate is None or bank.is_empty or not isinstance(post_processor, RankKeepingPostProcessor):
            return
        scores = reference_scores(pl_module.model, pl_module.pre_processor)
        post_processor.calibrate(scores, self.false_alarm_rate)
        listed = ", ".join(f"{score:.3g}" for score in scores)
        rank_zero_info(
            f"Threshold {post_processor.image_threshold.item():.3g} at a wished false-alarm rate of "
            f"{self.false_alarm_rate:g}; the references score {listed} against each other."
        )

    @staticmethod
    def _target_category(datamodule: Any) -> str | None:  # noqa: ANN401
        if datamodule is None:
            return None
        return category_name(getattr(datamodule, "target", None) or datamodule)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enroll the target, where that is all there is to do."""
        if not pl_module.is_trainable:
            self.enroll(trainer, pl_module)  # type: ignore[arg-type]
            self.calibrate(pl_module)  # type: ignore[arg-type]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate anew after what was trained, before the checkpoint is saved."""
        if trainer.state.fn == TrainerFn.FITTING and pl_module.is_trainable:
            self.calibrate(pl_module)  # type: ignore[arg-type]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enroll the target."""
        self.enroll(trainer, pl_module)  # type: ignore[arg-type]
        self.calibrate(pl_module)  # type: ignore[arg-type]

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enroll the target."""
        self.enroll(trainer, pl_module)  # type: ignore[arg-type]
        self.calibrate(pl_module)  # type: ignore[arg-type]

    # -- source images, each with references of its own ---------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up which good images each category has, learn the keys from some of them, and enroll the target.

        Each checkpoint then holds the bank: the backbone is frozen, and the keys do not change any more.
        """
        datamodule = getattr(trainer, "datamodule", None)
        train = datamodule.train_data if datamodule is not None else trainer.train_dataloader.dataset  # type: ignore[union-attr]
        held_out = [datamodule.val_data] if datamodule is not None and self._validates_on_source(trainer) else []
        self._pools = ReferencePools(train, *held_out)
        self._augments = augments(train)
        self._learn_keys(pl_module)  # type: ignore[arg-type]
        if pl_module.is_trainable:
            self.enroll(trainer, pl_module)  # type: ignore[arg-type]

    def _learn_keys(self, pl_module: "ResAD") -> None:
        """Once, before the first step, and in every process alike."""
        join = pl_module.model.join
        if not pl_module.is_trainable or join is None or join.learned:
            return
        assert self._pools is not None
        good = sorted(self._pools.good.items())
        most = max(1, KEY_PHOTOS // len(good))
        drawn = [draw(paths, min(most, len(paths)), seeded(self.seed, name, "keys")) for name, paths in good]
        paths = [path for category in drawn for path in category]
        rank_zero_info(f"Learning what to match by, from {len(paths)} good photos of {len(good)} source categories.")
        with torch.no_grad():
            pl_module.model.bank.record = {}  # what was enrolled has other keys
            join.learn(encode_photo(pl_module.model, pl_module.pre_processor, read_photo(path))[0] for path in paths)

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
        model.batch_features = self._batch_features(model, batch)

    @torch.no_grad()
    def _batch_features(self, model: "ResAD", batch: ImageBatch) -> list[Tensor]:
        """Features of a training batch: the backbone is frozen, so each picture needs it once in a training.

        Kept by path, a painted version of a photo by a name of its own, with its mask behind the features. A
        picture is computed by itself, so that what is kept does not depend on the batch that it was first met in.
        """
        assert batch.image is not None
        assert batch.image_path is not None
        if self._augments or not self.cache.max_bytes:
            return model.model.encode(batch.image)
        names = model.batch_versions or batch.image_path
        features = []
        for index, (name, path) in enumerate(zip(names, batch.image_path, strict=True)):
            kept = self._photo(model, path) if name == path else self.cache.get(name)
            if kept is None:
                assert batch.gt_mask is not None
                kept = [level[0] for level in model.model.encode(batch.image[index : index + 1])]
                self.cache.put(name, [*kept, batch.gt_mask[index]])
            features.append(kept[: len(model.model.bank.levels)])
        return [torch.stack(level) for level in zip(*features, strict=True)]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say once how much memory the features take."""
        del pl_module
        if trainer.current_epoch == 0 and len(self.cache):
            rank_zero_info(f"Features of {self.cache} are kept.")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enroll the target where validation is not about source images."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._held_out.clear()
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
        for path in batch.image_path:
            category = pools.category_of[path]
            if category not in self._held_out:
                drawn = sorted(pools.draw(path, self.k_shot, self.seed, category))
                rows, _ = reference_rows(model.model, model.pre_processor, drawn, model.hparams["rotations"])
                self._held_out[category] = [level.to(model.device) for level in rows]
        model.batch_references = [self._held_out[pools.category_of[path]] for path in batch.image_path]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:  # noqa: ANN401
        """Drop the references of the batch."""
        del trainer, args
        pl_module.batch_references = pl_module.batch_features = None  # type: ignore[assignment]

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:  # noqa: ANN401
        """Drop the references of the batch."""
        del trainer, args
        pl_module.batch_references = None  # type: ignore[assignment]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Free the features of source images."""
        del trainer, pl_module
        self.cache.clear()
        self._held_out.clear()
