# SPDX-License-Identifier: Apache-2.0

"""ResAD as an anomalib model.

Yao et al., "ResAD: A Simple Framework for Class Generalizable Anomaly Detection", NeurIPS 2024, arXiv 2410.20047, and
"ResAD++: Towards Class Agnostic Anomaly Detection via Residual Feature Learning", IJCV 2026, arXiv 2509.23741.

Two phases, one model. Without ``checkpoint`` it trains on the source categories of
:class:`~anomalib_resad.datamodule.CrossCategory`, or on one category with synthetic defects. With ``checkpoint`` there
is nothing to train: `fit` and `train` enroll a new category from a few good photos, in seconds.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType, TaskType
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.data.utils import LabelName
from anomalib.deploy import CompressionType
from anomalib.metrics import Evaluator
from anomalib.models import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torchmetrics import Metric
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_resad.callback import FewShotReferences
from anomalib_resad.checkpoint import ARCHITECTURE, architecture, read_trained
from anomalib_resad.constraintor import ConstraintorKind
from anomalib_resad.loss import OneClass, PushPull
from anomalib_resad.photos import read_photo
from anomalib_resad.post_processor import RankKeepingPostProcessor
from anomalib_resad.pre_processor import ExactPreProcessor
from anomalib_resad.reference_bank import Metric as MatchMetric
from anomalib_resad.synthetic import SyntheticDefects
from anomalib_resad.torch_model import Estimator, ResADModel, Residual
from anomalib_resad.variants import Variant, resolve

logger = logging.getLogger(__name__)


def level_masks(mask: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
    """Masks at the levels' resolutions: a patch is abnormal if any of its pixels is, ``(B, H, W)`` to ``(B, h, w)``."""
    return [F.adaptive_max_pool2d(mask[:, None].float(), level.shape[-2:]).squeeze(1) for level in features]


class ResAD(AnomalibModule):
    """Residual few-shot anomaly detection for categories that were never trained on.

    ``variant`` chooses a published method. The arguments from ``match`` to ``warmup`` change single settings of it:
    left at ``None``, they take the variant's value, given in their descriptions as ResAD / ResAD++.

    Args:
        backbone (str): timm model name of the frozen feature extractor.
        layers (Sequence[str]): Levels of the backbone, as timm names them.
        weights (Path | str | None): Local file with the backbone's weights (a timm state dict).
        pre_trained (bool): Use timm's pretrained weights if there is no ``weights``.
        k_shot (int): Reference photos of a category; 2 or 4 in the paper.
        references (Path | str | None): Folder of good photos to enroll; by default they are drawn from the train split.
        reference_seed (int): Seed of the draws of references.
        checkpoint (Path | str | None): A trained ResAD. Then there is nothing to train, only to enroll, and the
            backbone and the method's settings are the checkpoint's.
        variant (Variant): ``"resad"`` (conference paper) or ``"resad++"`` (its successor).
        match (MatchMetric | None): Nearest reference by ``"l2"`` / ``"cosine"``.
        residual (Residual | None): ``"difference"`` / ``"squared"``, or ``"none"`` for plain features.
        constraintor (ConstraintorKind | None): ``"conv_bn_relu"`` in both, or another of the papers' ablation;
            ``"mlp"`` for levels of vision transformers.
        occ (OneClass | None): The constraintor's loss, ``"abnormal_invariant"`` / ``"log_barrier_bidirectional"``; the
            others are these without their abnormal term and without their second side, and ``"none"``.
        coupling_layers (int | None): Coupling layers of each flow, 8 / 10.
        position_channels (int | None): Channels of the flow's position condition, 256 in both; 0 for none.
        codebook_size (int | None): Codes of normal residuals per level, 0 / 1536; 0 for no codebook.
        efdm (float | None): Share of the way from the residuals' distribution to that of their codes (exact feature
            distribution matching), 0 / 0.6; 0 for none.
        abnormal_gaussian (bool | None): Whether the flow also learns abnormal patches, as a second Gaussian whose
            probability is half of the anomaly map; no / yes.
        push_pull (PushPull | None): The flow's terms, ``"hinge"`` (maximum likelihood and BGAD's semi-push-pull) /
            ``"log_barrier"`` (the log-sigmoid forms of both).
        warmup (float | None): Share of the training in which the flows learn the likelihood of normal patches alone,
            0 / 0.1. A share, and counted in batches, so that short trainings warm up too; 10 of 100 epochs as
            published.
        estimator (Estimator): ``"flow"``, or ``"distance"`` for the plain nearest-neighbor distance, which needs no
            training.
        sigma (float): Gaussian smoothing of the anomaly map in pixels.
        push_pull_weight (float): Weight of the semi-push-pull terms (lambda of the paper).
        lr (float): Learning rate of Adam; x 0.1 after 70 % and 90 % of the epochs.
        weight_decay (float): Weight decay of Adam.
        flow_batch_size (int): Most patch vectors of a level in one flow step.
        flow_steps (int | None): Most flow steps per batch of images; ``None`` uses every patch, as the paper.
        image_size (tuple[int, int]): Height and width that photos are resized to.
        pre_processor (PreProcessor | bool): Pre-processor, or whether to use the default one.
        post_processor (PostProcessor | bool): Post-processor, or whether to use the default one.
        evaluator (Evaluator | bool): Evaluator, or whether to use the default one.
        visualizer (Visualizer | bool): Visualizer, or whether to use the default one.

    Raises:
        ValueError: If an argument, or the checkpoint, cannot be used.
        FileNotFoundError: If the checkpoint is missing.
    """

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        weights: Path | str | None = None,
        pre_trained: bool = True,
        k_shot: int = 4,
        references: Path | str | None = None,
        reference_seed: int = 0,
        checkpoint: Path | str | None = None,
        variant: Variant = "resad",
        match: MatchMetric | None = None,
        residual: Residual | None = None,
        constraintor: ConstraintorKind | None = None,
        occ: OneClass | None = None,
        coupling_layers: int | None = None,
        position_channels: int | None = None,
        codebook_size: int | None = None,
        efdm: float | None = None,
        abnormal_gaussian: bool | None = None,
        push_pull: PushPull | None = None,
        warmup: float | None = None,
        estimator: Estimator = "flow",
        sigma: float = 4.0,
        push_pull_weight: float = 1.0,
        lr: float = 1e-5,
        weight_decay: float = 5e-4,
        flow_batch_size: int = 8192,
        flow_steps: int | None = None,
        image_size: tuple[int, int] = (224, 224),
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        own_pre_processor = pre_processor is not True
        if pre_processor is True:
            pre_processor = self.configure_pre_processor((image_size[0], image_size[1]))
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        # Plain types only: a checkpoint is loaded with weights_only=True.
        self.hparams.update({"layers": list(layers), "image_size": list(image_size)})
        self.hparams.update(resolve(variant, self.hparams))
        if checkpoint is None:
            self.model: ResADModel = self._build()
        else:
            self._start_from(Path(checkpoint), own_pre_processor)
        self.is_trainable = checkpoint is None and estimator == "flow"
        self.automatic_optimization = not self.is_trainable
        if isinstance(self.post_processor, RankKeepingPostProcessor):
            self.post_processor.keep_statistics = not self.is_trainable
        # References of each image of the current batch, set by FewShotReferences; None where the bank is used.
        self.batch_references: list[list[Tensor]] | None = None
        self.keeps_bank = False

    def _build(self) -> ResADModel:
        """Make the torch model that the hyperparameters describe."""
        settings = {key: self.hparams[key] for key in ARCHITECTURE}
        return ResADModel(
            **settings,
            estimator=self.hparams["estimator"],
            pre_trained=self.hparams["pre_trained"],
            weights=self.hparams["weights"],
        )

    def _start_from(self, path: Path, own_pre_processor: bool) -> None:
        """Take architecture, weights, threshold, bank and, unless one was given, pre-processor from a trained ResAD.

        Raises:
            ValueError: If the checkpoint cannot be used.
            FileNotFoundError: If there is no such file.
        """
        trained = read_trained(path, self.hparams["estimator"])
        taken = {key: value for key, value in trained.settings.items() if value != self.hparams[key]}
        if taken:
            logger.info("Settings taken from %s: %s.", path, taken)
        self.hparams.update({"checkpoint": None})  # its content is saved with this model: the file is not needed again
        self._adopt(trained.settings)
        if trained.pre_processor and not own_pre_processor and isinstance(self.pre_processor, PreProcessor):
            self.pre_processor.load_checkpoint_config(trained.pre_processor)
        try:
            self.model.load_state_dict(trained.model)
            if isinstance(self.post_processor, RankKeepingPostProcessor):
                self.post_processor.load_state_dict(trained.post_processor, strict=False)
        except RuntimeError as error:
            msg = f"{path} does not fit this version of ResAD: {error}"
            raise ValueError(msg) from error

    def _adopt(self, settings: dict[str, Any]) -> None:
        """Build the torch model with a checkpoint's settings; the checkpoint brings the backbone's weights."""
        self.hparams.update(settings)
        self.model = self._build()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the folder of references out: the bank is saved, and the folder may be gone when it is restored."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], "references": None}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the model if the checkpoint was made with other settings than the constructor was given."""
        super().on_load_checkpoint(checkpoint)
        self.keeps_bank = len(checkpoint["state_dict"].get("model.bank.rows_0", ())) > 0
        settings = architecture(checkpoint.get("hyper_parameters", {}))
        other = {key: value for key, value in settings.items() if value != self.hparams.get(key)}
        if other:
            logger.warning("The checkpoint was made with %s; these settings are used.", other)
            self._adopt(settings)
            self.model.to(self.device)

    # -- components ---------------------------------------------------------------------------------------------------

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize with antialiasing (in exports too) and normalize with ImageNet statistics."""
        return ExactPreProcessor(
            Compose(
                [
                    Resize(image_size or (224, 224), antialias=True),
                    Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
                ]
            )
        )

    def configure_post_processor(self) -> PostProcessor:
        """Keep the ranking of the scores and, when a category is enrolled, the trained threshold."""
        return RankKeepingPostProcessor()

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Put the synthetic defects before the pre-processor and the references behind it."""
        components = super().configure_callbacks()
        assert isinstance(components, list)
        references = FewShotReferences(
            self.hparams["k_shot"], self.hparams["references"], self.hparams["reference_seed"]
        )
        return [SyntheticDefects(), *components[:1], references, *components[1:]]

    @property
    def learning_type(self) -> LearningType:
        """ONE_CLASS in both phases; FEW_SHOT would make anomalib's engine skip training."""
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """With nothing left to train, one step of one epoch, so that `fit` enrolls, validates and saves."""
        arguments: dict[str, Any] = {"num_sanity_val_steps": 0, "gradient_clip_val": 0}
        if not self.is_trainable:
            arguments.update({"max_epochs": 1, "limit_train_batches": 1})
        return arguments

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: TaskType | None = None,
        max_drop: float = 0.01,
        ov_kwargs: dict[str, Any] | None = None,
        onnx_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Export to OpenVINO as anomalib does, in a form that every device computes in float32.

        Where OpenVINO chooses bfloat16 by itself, a plain export finds other references and other maps. ``INT8_PTQ``
        quantizes the backbone's convolutions alone. See anomalib's method for the arguments.

        Raises:
            ValueError: If ``compression_type`` is ``INT8`` or ``INT8_ACQ``, or ``INT8_PTQ`` finds nothing to quantize.
        """
        if compression_type in (CompressionType.INT8, CompressionType.INT8_ACQ):
            msg = (
                f"{compression_type} is not offered: it would quantize the reference bank and the head too, which "
                "destroys the maps. Use INT8_PTQ, which quantizes the backbone alone, or FP16."
            )
            raise ValueError(msg)
        onnx = {"opset_version": 18} | (onnx_kwargs or {})  # anomalib's 14 fails and falls back to 18, with a traceback
        path = super().to_openvino(
            export_root, model_file_name, input_size, compression_type, datamodule, metric, task, max_drop,
            ov_kwargs, onnx,
        )  # fmt: skip
        from anomalib_resad.precision import rewrite_in_float32  # noqa: PLC0415  # OpenVINO is an extra

        rewrite_in_float32(path)
        return path

    @staticmethod
    def _post_training_quantization_ov(model: Any, datamodule: AnomalibDataModule | None = None) -> Any:  # noqa: ANN401
        """Quantize the backbone alone, on the datamodule's good training photos.

        Raises:
            ValueError: If there is no datamodule.
        """
        if datamodule is None:
            msg = "INT8_PTQ needs photos to calibrate with: pass `datamodule` (on the command line, --data)."
            raise ValueError(msg)
        datamodule.setup("fit")
        samples = datamodule.train_data.samples
        good = sorted(samples.image_path[samples.label_index == LabelName.NORMAL])[:300]
        from anomalib_resad.precision import quantize_backbone  # noqa: PLC0415  # OpenVINO is an extra

        return quantize_backbone(model, (read_photo(path)[None].numpy() for path in good))

    # -- steps --------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam over constraintor, flow and codebook; the learning rate falls after 70 % and 90 % of the epochs.

        One optimizer serves all, since their losses share no parameter.
        """
        if not self.is_trainable:
            return None
        codes = list(self.model.codebooks.parameters())
        networks = [*self.model.constraintors.parameters(), *self.model.flows.parameters()]
        if self.model.fusion is not None:
            networks += self.model.fusion.parameters()
        groups: list[dict[str, Any]] = [{"params": [each for each in networks if each.requires_grad]}]
        if codes:
            groups.append({"params": codes, "weight_decay": 0.0})  # decay would draw the codes away from the residuals
        optimizer = torch.optim.Adam(groups, lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"])
        epochs = self._epochs
        milestones = sorted({max(1, int(0.7 * epochs)), max(1, int(0.9 * epochs))})
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1),
        }

    @property
    def _epochs(self) -> int:
        """Epochs of the training; the paper's where the trainer knows no end."""
        epochs = self.trainer.max_epochs
        return epochs if epochs and epochs > 0 else 100

    def _is_warming_up(self) -> bool:
        """Whether the current batch belongs to the first part of the training, on normal patches alone."""
        done = self.trainer.fit_loop.batch_idx / self.trainer.num_training_batches
        return self.current_epoch + done < self.hparams["warmup"] * self._epochs

    def training_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:  # noqa: ANN401
        """One step of the constraintor, several of the flow over shuffled patches.

        Raises:
            ValueError: If a defective image has no mask.
        """
        del args, kwargs
        if not self.is_trainable:
            return torch.zeros((), device=self.device, requires_grad=True)
        assert self.batch_references is not None
        assert batch.image is not None
        features = self.model.encode(batch.image)
        matched = self.model.match_each(features, self.batch_references)
        masks = level_masks(self._mask_of(batch), features)
        optimizer = self.optimizers()
        occ, constrained = self.model.constrain_loss(features, matched, masks)
        optimizer.zero_grad()  # type: ignore[union-attr]
        if occ.requires_grad:  # else there is neither a constraintor that learns nor a codebook
            self.manual_backward(occ)
        flow_losses = self.model.flow_losses(
            constrained,
            masks,
            self.hparams["flow_batch_size"],
            self.hparams["flow_steps"],
            self.hparams["push_pull_weight"],
            warming_up=self._is_warming_up(),
        )
        flow_loss = occ.new_zeros(())
        for flow_loss in flow_losses:
            self.manual_backward(flow_loss)
            optimizer.step()  # type: ignore[union-attr]
            optimizer.zero_grad()  # type: ignore[union-attr]
        self.log_dict(
            {"train_occ": occ.detach(), "train_flow": flow_loss.detach()},
            prog_bar=True,
            on_step=False,
            on_epoch=True,
            batch_size=len(batch.image),
        )
        return None

    @staticmethod
    def _mask_of(batch: ImageBatch) -> Tensor:
        assert batch.image is not None
        if batch.gt_mask is not None:
            return batch.gt_mask
        if batch.gt_label is not None and bool(batch.gt_label.any()):
            msg = "A defective training image has no mask. Train with CrossCategory, which leaves such images out."
            raise ValueError(msg)
        return torch.zeros(len(batch.image), *batch.image.shape[-2:], device=batch.image.device)

    def on_train_epoch_end(self) -> None:
        """Step the learning rate, which Lightning leaves to models that optimize by hand."""
        scheduler = self.lr_schedulers()
        if self.is_trainable and scheduler is not None:
            scheduler.step()  # type: ignore[union-attr]

    def validation_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:  # noqa: ANN401
        """Score held-out source images against references of their category, other images against the bank."""
        del args, kwargs
        assert batch.image is not None
        if self.batch_references is None:
            predictions = self.model(batch.image)
        else:
            features = self.model.encode(batch.image)
            matched = self.model.match_each(features, self.batch_references)
            predictions = self.model.score(features, matched, batch.image.shape[-2:])
        return batch.update(**predictions._asdict())
