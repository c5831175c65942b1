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

from anomalib import LearningType
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_resad.backbone import choose_layers, describe
from anomalib_resad.calibration import check_rate
from anomalib_resad.callback import FewShotReferences
from anomalib_resad.checkpoint import CheckpointMixin
from anomalib_resad.constraintor import ConstraintorKind
from anomalib_resad.enrollment import Rotations, check_rotations
from anomalib_resad.epoch_seeds import EpochSeeds
from anomalib_resad.exporting import ExportMixin
from anomalib_resad.loss import OneClass, PushPull
from anomalib_resad.post_processor import RankKeepingPostProcessor
from anomalib_resad.pre_processor import ExactPreProcessor
from anomalib_resad.reference_bank import Metric
from anomalib_resad.synthetic import SyntheticDefects
from anomalib_resad.torch_model import Estimator, Residual
from anomalib_resad.training_steps import TrainingMixin
from anomalib_resad.variants import Variant, resolve

logger = logging.getLogger(__name__)


class ResAD(TrainingMixin, CheckpointMixin, ExportMixin, AnomalibModule):
    """Residual few-shot anomaly detection for categories that were never trained on.

    ``variant`` chooses the method, this package's default or a published one. Arguments that are left at ``None`` take
    the variant's value; for the published ones it is given in the descriptions, as ResAD / ResAD++.

    Args:
        backbone (str): timm model name of the frozen feature extractor.
        layers (Sequence[str] | None): Levels of the backbone, as timm names them; by default the strides 4, 8 and 16 of
            a pyramid, and the blocks at the quarters of a vision transformer's depth.
        weights (Path | str | None): Local file with the backbone's weights (a timm state dict).
        pre_trained (bool): Use timm's pretrained weights if there is no ``weights``.
        k_shot (int): Reference photos of a category; 2 or 4 in the paper.
        references (Path | str | None): Folder of good photos to enroll; by default they are drawn from the train split.
        reference_seed (int): Seed of the draws of references.
        false_alarm_rate (float | None): Wished share of good photos above the threshold. The enrolled product then gets
            a threshold of its own, from its references alone: each is scored against the others. ``None`` uses the
            stored threshold as it is.
        checkpoint (Path | str | None): A trained ResAD. Then there is nothing to train, only to enroll, and the
            backbone and the method's settings are the checkpoint's.
        variant (Variant): ``"fused"``, fast and with little training; ``"resad"`` (conference paper) or ``"resad++"``
            (its successor).
        match (Metric | None): Nearest reference by ``"l2"`` / ``"cosine"``.
        residual (Residual | None): ``"difference"`` / ``"squared"``, or ``"none"`` for plain features.
        constraintor (ConstraintorKind | None): ``"conv_bn_relu"`` in both, but ``"mlp"`` where the backbone is a
            vision transformer; or another of the papers' ablation. The default has none.
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
        estimator (Estimator | None): ``"flow"`` in both, ``"fused"`` (a small head) in the default, or ``"distance"``
            for the plain nearest-neighbor distance, which needs no training.
        projection (int | None): Channels of the keys by which joined levels are matched, 64 in the default; 0 in
            both, which match each level by itself.
        synthetic (float | None): Share of good training images that get a painted defect, 0.5 in the default, 0 in
            both. Where there are no real defects, half of the images get one in any case.
        rotations (Rotations | None): Turns of each reference photo that the bank knows: 8 for every 45 degrees, 1 for
            none, as in both. ``"auto"``, the default's, turns them where they lie turned to each other, so that the
            orientation cannot be a defect; one photo alone is left as it is. A checkpoint's where one is given.
        sigma (float): Gaussian smoothing of the anomaly map in pixels.
        push_pull_weight (float): Weight of the semi-push-pull terms (lambda of the paper).
        lr (float | None): Learning rate of Adam, 3e-4 in the default, 1e-5 in both; x 0.1 after 70 % and 90 % of the
            epochs.
        weight_decay (float): Weight decay of Adam.
        flow_batch_size (int): Most patch vectors of a level in one flow step.
        flow_steps (int | None): Most flow steps per batch of images; ``None`` uses every patch, as the paper.
        cache_gb (float): Most memory for features of training images, in GB; 0 computes them anew in each epoch.
        image_size (tuple[int, int]): Height and width that photos are resized to; whole patches of a transformer.
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
        layers: Sequence[str] | None = None,
        weights: Path | str | None = None,
        pre_trained: bool = True,
        k_shot: int = 4,
        references: Path | str | None = None,
        reference_seed: int = 0,
        false_alarm_rate: float | None = None,
        checkpoint: Path | str | None = None,
        variant: Variant = "fused",
        match: Metric | None = None,
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
        estimator: Estimator | None = None,
        projection: int | None = None,
        synthetic: float | None = None,
        rotations: Rotations | None = None,
        sigma: float = 4.0,
        push_pull_weight: float = 1.0,
        lr: float | None = None,
        weight_decay: float = 5e-4,
        flow_batch_size: int = 8192,
        flow_steps: int | None = None,
        cache_gb: float = 4.0,
        image_size: tuple[int, int] = (224, 224),
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        if false_alarm_rate is not None:
            check_rate(false_alarm_rate)
        check_rotations(1 if rotations is None else rotations)
        self.given_rotations = rotations
        own_pre_processor = pre_processor is not True
        if pre_processor is True:
            pre_processor = self.configure_pre_processor((image_size[0], image_size[1]), backbone)
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        # Plain types only: a checkpoint is loaded with weights_only=True.
        self.hparams.update({"layers": choose_layers(backbone, layers), "image_size": list(image_size)})
        self.hparams.update(resolve(variant, self.hparams))
        if constraintor is None and self.hparams["constraintor"] != "none" and describe(backbone).is_transformer:
            self.hparams.update({"constraintor": "mlp"})  # its patches are no local pattern for a convolution
        if checkpoint is None:
            self.model = self._build()
        else:
            self._start_from(Path(checkpoint), estimator, own_pre_processor)
        self.is_trainable = checkpoint is None and self.hparams["estimator"] != "distance"
        self.automatic_optimization = not self.is_trainable
        if isinstance(self.post_processor, RankKeepingPostProcessor):
            self.post_processor.keep_statistics = not self.is_trainable
        # References of each image of the current batch, set by FewShotReferences; None where the bank is used.
        self.batch_references: list[list[Tensor]] | None = None
        # Features of the current training batch, from the same place.
        self.batch_features: list[Tensor] | None = None
        # Names of its images, other ones for those that SyntheticDefects painted on.
        self.batch_versions: list[str] | None = None
        self.keeps_bank = False

    # -- components ---------------------------------------------------------------------------------------------------

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None, backbone: str | None = None) -> PreProcessor:
        """Resize with antialiasing (in exports too) and normalize as the backbone's pretrained weights expect it.

        Args:
            image_size (tuple[int, int] | None): Height and width; 224 x 224 by default.
            backbone (str | None): timm model name; ImageNet statistics by default.
        """
        mean: Sequence[float] = describe(backbone).mean if backbone else IMAGENET_DEFAULT_MEAN
        std: Sequence[float] = describe(backbone).std if backbone else IMAGENET_DEFAULT_STD
        return ExactPreProcessor(
            Compose(
                [
                    Resize(image_size or (224, 224), antialias=True),
                    Normalize(mean=list(mean), std=list(std)),
                ]
            )
        )

    def configure_post_processor(self) -> PostProcessor:
        """Keep the ranking of the scores and, when a category is enrolled, the trained threshold."""
        return RankKeepingPostProcessor()

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Put the synthetic defects before the pre-processor, the references behind it, and what seeds both first."""
        components = super().configure_callbacks()
        assert isinstance(components, list)
        references = FewShotReferences(
            self.hparams["k_shot"],
            self.hparams["references"],
            self.hparams["reference_seed"],
            cache_gb=self.hparams["cache_gb"],
            false_alarm_rate=self.hparams["false_alarm_rate"],
        )
        defects = SyntheticDefects(self.hparams["synthetic"], self.hparams["reference_seed"], references.cache)
        return [EpochSeeds(), defects, *components[:1], references, *components[1:]]

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

    # -- steps --------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Prepare a distributed training: constraintor and flow have steps of their own, in which the other is idle."""
        super().setup(stage)
        if isinstance(self.trainer.strategy, DDPStrategy):
            self.trainer.strategy._ddp_kwargs["find_unused_parameters"] = True

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
