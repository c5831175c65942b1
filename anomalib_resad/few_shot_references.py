# SPDX-License-Identifier: Apache-2.0

"""Enroll the target from a few good photos, once, for test, predict and export."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from anomalib.data.utils import LabelName
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from anomalib_resad.data.cross_category import category_name
from anomalib_resad.enrollment.calibration import USUAL_RATE
from anomalib_resad.enrollment.draws import draw_references
from anomalib_resad.enrollment.photos import list_photos
from anomalib_resad.enrollment.references import read_references
from anomalib_resad.enrollment.rotations import Rotations
from anomalib_resad.method.bank_record import BankRecord
from anomalib_resad.method.features import Rows
from anomalib_resad.post_processor import RankKeepingPostProcessor
from anomalib_resad.pre_processor import ExactPreProcessor
from anomalib_resad.reference_rows import leave_one_out, product_size, reference_rows
from anomalib_resad.torch_model import ResADModel
from anomalib_resad.training.reference_pools import validates_on_source
from anomalib_resad.training.source_references import DEFAULT_SHOTS


def store(
    model: ResADModel,
    pre_processor: nn.Module | None,
    post_processor: nn.Module | None,
    rows: Rows,
    record: BankRecord,
) -> None:
    """Replace the bank, resize photos as it needs, and forget the threshold of the product that it held."""
    model.bank.store(rows, record)
    if isinstance(pre_processor, ExactPreProcessor) and record.image_size is not None:
        pre_processor.take_size(record.image_size)
    if isinstance(post_processor, RankKeepingPostProcessor):
        post_processor.forget_product()


def target_category(datamodule: Any) -> str | None:  # noqa: ANN401
    """Name of the category that a datamodule tests on."""
    if datamodule is None:
        return None
    return category_name(getattr(datamodule, "target", None) or datamodule)


class FewShotReferences(Callback):
    """Enroll the target: from the folder ``references``, else from the train split of the target.

    Which files were taken is printed and stored with the bank.

    Args:
        k_shot (int | None): Reference photos; ``None`` for all of the folder, or 4 of the train split, drawn with the
            seed from the sorted paths.
        references (Path | str | None): Folder of good photos.
        seed (int): Seed of the draw.
        false_alarm_rate (float | None): Give the enrolled product a threshold of its own at this rate, from the
            references alone; ``None`` leaves the threshold as it is stored, or takes the usual rate if there is none.
    """

    def __init__(
        self,
        k_shot: int | None = None,
        references: Path | str | None = None,
        seed: int = 0,
        false_alarm_rate: float | None = None,
    ) -> None:
        self.k_shot = k_shot
        self.references = references
        self.seed = seed
        self.false_alarm_rate = false_alarm_rate
        self._training_begins = False

    # -- enrollment ---------------------------------------------------------------------------------------------------

    def enroll(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ANN401  # a ResAD, which imports this module
        """Fill the bank, unless it already holds these photos.

        A restored bank (``--ckpt_path``) is kept for its own category, however few or many photos it was made of. The
        folder ``references``, or another category, replaces it.

        Raises:
            ValueError: If there are too few photos, or unusable ones.
            FileNotFoundError: If the folder is missing.
        """
        model, datamodule = pl_module.model, getattr(trainer, "datamodule", None)
        category = target_category(datamodule)
        photos, where = self._good_photos(datamodule, category)
        if not photos or (
            self.references is None and pl_module.keeps_bank and model.bank.record.category in (None, category)
        ):
            # Without a target, training needs no bank; where one is used, an empty bank raises an error of its own.
            if not model.bank.is_empty:
                rank_zero_info(f"Using the references of the checkpoint: {model.bank.record.names}")
            return
        k_shot, chosen = self._choose(photos, where)
        read = read_references(chosen, pl_module.hparams["bit_depth"])
        rotations: Rotations = pl_module.hparams["rotations"]  # asked for now: a restored checkpoint brings its own
        record = BankRecord(
            category=category,
            origin="train split" if self.references is None else "folder",
            k_shot=k_shot,
            seed=self.seed,
            files=tuple((each.name, each.sha256) for each in read),
            photos=len(read),
            rotations_asked=rotations,
            bit_depth=read.bit_depth,
            image_size=product_size(model, read.sizes),
        )
        if _same(model.bank.record, record):
            return
        before = pl_module.pre_processor
        rows, orientations = reference_rows(model, before, read.values(), rotations, record.image_size)
        record = replace(record, rotations=orientations)
        store(model, before, pl_module.post_processor, rows, record)
        drawn = "" if k_shot is None else f" (seed {self.seed})"
        rank_zero_info(f"Enrolled {len(chosen)} of {len(photos)} good photos of {where}{drawn}: {record.names}")
        if record.image_size is not None:
            height, width = record.image_size
            rank_zero_info(f"Its photos are resized to {height} x {width} pixels (height x width), their usual shape.")
        if orientations > 1:
            why = "They are rotated to each other, so each" if rotations == "auto" else "Each"
            rank_zero_info(f"{why} was enrolled in {orientations} orientations (rotations={rotations!r}).")

    def _choose(self, photos: list[str], where: str) -> tuple[int | None, list[str]]:
        """How many photos were asked for, ``None`` for all of them, and which are taken."""
        k_shot = self.k_shot if self.k_shot is not None else None if self.references is not None else DEFAULT_SHOTS
        return k_shot, photos if k_shot is None else draw_references(photos, k_shot, self.seed, where)

    def _good_photos(self, datamodule: Any, category: str | None) -> tuple[list[str], str]:  # noqa: ANN401
        """The photos to choose from, none where there is no target, and where they are."""
        if self.references is not None:
            return [str(path) for path in list_photos(self.references)], str(self.references)
        data = getattr(datamodule, "reference_data", getattr(datamodule, "train_data", None))
        if data is None:
            return [], ""
        samples = data.samples
        return samples.image_path[samples.label_index == LabelName.NORMAL].tolist(), f"the train split of {category}"

    def calibrate(self, pl_module: Any, usual: float | None = None) -> None:  # noqa: ANN401  # a ResAD
        """Give the enrolled product a threshold of its own, if a rate was given.

        Args:
            pl_module (Any): The ResAD.
            usual (float | None): The rate where none was given.

        Raises:
            ValueError: If the bank does not hold whole photos.
        """
        model, post_processor = pl_module.model, pl_module.post_processor
        rate = usual if self.false_alarm_rate is None else self.false_alarm_rate
        if rate is None or model.bank.is_empty:
            return
        if not isinstance(post_processor, RankKeepingPostProcessor):
            return
        own = leave_one_out(model, pl_module.pre_processor)
        post_processor.calibrate(own, rate, model.bank.record.judges_neighborhoods)
        if not own.scores:  # of one photo, for which the post-processor says why there is no threshold
            return
        listed = ", ".join(f"{score:.3g}" for score in own.scores)
        rank_zero_info(
            f"Threshold {post_processor.image_threshold.item():.3g} at a target false-alarm rate of {rate:g}; the "
            f"references score {listed} against each other."
        )

    # -- when ---------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enroll the target, where that is all there is to do; else see that there are enough photos of it."""
        if not pl_module.is_trainable:
            self.enroll(trainer, pl_module)
            self.calibrate(pl_module)
            return
        datamodule = getattr(trainer, "datamodule", None)
        photos, where = self._good_photos(datamodule, target_category(datamodule))
        if photos and not pl_module.keeps_bank:
            self._choose(photos, where)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the model's own hook, which learns the keys."""
        del trainer
        self._training_begins = bool(pl_module.is_trainable)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enroll the target before the first step.

        Each checkpoint then holds the bank: the backbone is frozen, and the keys do not change any more.
        """
        if self._training_begins:
            self.enroll(trainer, pl_module)
        self._training_begins = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enroll the target where validation is not about source images."""
        datamodule = getattr(trainer, "datamodule", None)
        if not validates_on_source(datamodule):
            self.enroll(trainer, pl_module)
        elif trainer.state.fn != TrainerFn.FITTING:  # a training has done so
            cast("Any", pl_module).source.keep_shapes(datamodule, pl_module.model)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate anew after what was trained, before the checkpoint is saved."""
        if trainer.state.fn == TrainerFn.FITTING and pl_module.is_trainable:
            self.calibrate(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enroll the target. Where the source has no threshold that holds, it gets one of its own at the usual rate.

        That of a ready head does not: it was trained on drawn products, whose good photos differ less.
        """
        self.enroll(trainer, pl_module)
        module = cast("Any", pl_module)
        post_processor, photos = module.post_processor, module.model.bank.record.photos
        has_one = isinstance(post_processor, RankKeepingPostProcessor) and post_processor.has_statistics
        needs_one = photos > 1 and not module.keeps_bank and (module.model.has_ready_head or not has_one)
        self.calibrate(module, USUAL_RATE if needs_one else None)

    on_predict_start = on_test_start


def _same(held: BankRecord, wanted: BankRecord) -> bool:
    """Whether a bank already holds what is wanted; the number of orientations follows from the rest."""
    return vars(held) | {"rotations": 0} == vars(wanted) | {"rotations": 0}
