# SPDX-License-Identifier: Apache-2.0

"""The two halves of a trained model, `encode` and `detect`, traced for photos, banks and batches of any size."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import timm.layers.padding
import torch
from anomalib.pre_processing import PreProcessor
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from anomalib_resad.deploy.bundle import Level
from anomalib_resad.deploy.runtime import canvas_of
from anomalib_resad.enrollment.image_size import Size, size_of_photos
from anomalib_resad.enrollment.neighborhoods import NEIGHBORHOODS, STEP, has_neighborhoods
from anomalib_resad.lightning_model import ResAD
from anomalib_resad.method.backbone import coarsest_stride, describe
from anomalib_resad.method.features import as_list, from_list, rows_from_list, to_rows
from anomalib_resad.method.reference_bank import GROUP
from anomalib_resad.pre_processor import AntialiasedResize

MOST_SIDE = 1 << 16  # of a photo, in pixels
MOST_STRIDES = 1 << 10  # of a side that photos are resized to


class Encoder(nn.Module):
    """Photos as they come from a file to features: uint8 ``(B, H, W, 3)`` to one ``(B, C_l, H_l, W_l)`` per level."""

    def __init__(self, model: ResAD) -> None:
        super().__init__()
        self.resize_and_normalize = _export_transform(model)
        self.model = model.model

    def forward(self, photos: Tensor, canvas: Tensor | None = None) -> tuple[Tensor, ...]:
        """Encode photos.

        Args:
            photos (Tensor): Photos.
            canvas (Tensor | None): Something of the height and width that they are resized to, where each product has
                a size of its own. Its values do not count: sides of inputs are what an export can leave open.
        """
        images = photos.permute(0, 3, 1, 2).float() / 255
        if canvas is None:
            images = self.resize_and_normalize(images)
        else:
            height, width = canvas.shape
            for step in getattr(self.resize_and_normalize, "transforms", [self.resize_and_normalize]):
                here = AntialiasedResize((height, width)) if isinstance(step, AntialiasedResize) else step
                images = here(images)
        return tuple(as_list(self.model.encode(images)))


class Detector(nn.Module):
    """Features and the rows of a bank, level by level, to raw scores ``(B,)`` and maps ``(B, 1, H, W)``.

    Args:
        model (ResAD): The model.
        image_size (Sequence[int] | None): Height and width of the maps; ``None`` for those of the features.
        stride (int): Pixels per patch of the first level.
    """

    def __init__(self, model: ResAD, image_size: Sequence[int] | None, stride: int) -> None:
        super().__init__()
        self.model = model.model
        self.image_size = image_size
        self.stride = stride

    def forward(self, features: list[Tensor], rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Score features."""
        keyed = self.model.bank.keyed
        size = self.image_size or [self.stride * side for side in features[0].shape[-2:]]
        result = self.model.detect(from_list(features, keyed), rows_from_list(rows, keyed), size)
        assert result.pred_score is not None
        assert result.anomaly_map is not None
        return result.pred_score, result.anomaly_map


def _export_transform(model: ResAD) -> nn.Module:
    """Resizing and normalization, in operations that every runtime has."""
    assert isinstance(model.pre_processor, PreProcessor)
    assert isinstance(model.pre_processor.export_transform, nn.Module)
    return model.pre_processor.export_transform


def follows_shape(model: ResAD) -> bool:
    """Whether each product has an input size of its own."""
    return model.model.encoder.backbone.area_side is not None


def encoder_inputs(model: ResAD) -> list[str]:
    """Names of the encoder's inputs."""
    return ["photos", "canvas"] if follows_shape(model) else ["photos"]


def stride_of(model: ResAD) -> int:
    """Pixels per patch of the coarsest level."""
    backbone = model.model.encoder.backbone
    return coarsest_stride(backbone.name, backbone.layers)


def size_of(model: ResAD) -> Size:
    """Height and width that photos are resized to; of a model that follows their shape, if they are square."""
    if follows_shape(model):
        side = model.model.encoder.backbone.area_side or 0
        return size_of_photos([(side, side)], side, stride_of(model))
    height, width = _export_transform(model)(torch.zeros(1, 3, 64, 64)).shape[-2:]
    return height, width


@contextmanager
def _whole_strides() -> Iterator[None]:
    """Let layers that pad as TensorFlow does trust that their input is of whole strides, as all open sides are.

    They compute their padding from the size of the input. Of whole strides it is always the same, which a tracer that
    leaves the size open does not find out.
    """
    module: Any = timm.layers.padding
    general = module.get_same_padding
    module.get_same_padding = lambda _, kernel, stride, dilation: max((kernel - 1) * dilation + 1 - stride, 0)
    try:
        yield
    finally:
        module.get_same_padding = general


@contextmanager
def _out_of_place(model: nn.Module) -> Iterator[None]:
    """Let activations write a new tensor: the converted model is the same, and is made in less time.

    PyTorch breaks down an activation in place (ReLU6) into steps whose shapes it works out with symbols each time.
    """
    inside: list[Any] = [each for each in model.modules() if getattr(each, "inplace", False) is True]
    for each in inside:
        each.inplace = False
    try:
        yield
    finally:
        for each in inside:
            each.inplace = True


def trace(model: ResAD) -> tuple[ExportedProgram, ExportedProgram, tuple[Level, ...]]:
    """Trace both halves with batch, photo size and bank of any size, and read the levels off the tensors.

    Where each product has a size of its own, the encoder takes a second input, and both halves features of any size.

    Raises:
        ValueError: If each product has a size of its own, and the backbone cannot be exported for all sizes.
    """
    if not follows_shape(model):
        return _trace(model)
    name = model.hparams["backbone"]
    if not describe(name).takes_size:
        with _whole_strides():
            return _trace(model)
    msg = (
        f"Backbone '{name}' keeps positions of one input size, so a bundle of it cannot keep the shape of photos "
        "(image_size='auto'). Train with a height and a width."
    )
    raise ValueError(msg)


def _trace(model: ResAD) -> tuple[ExportedProgram, ExportedProgram, tuple[Level, ...]]:
    size, stride, is_open = size_of(model), stride_of(model), follows_shape(model)
    batch = Dim("batch", min=1, max=4096)
    sides = Dim("height", min=1, max=MOST_SIDE), Dim("width", min=1, max=MOST_SIDE)
    strides = [Dim(name, min=2, max=MOST_STRIDES) for name in ("strides_down", "strides_across")]
    inputs: list[Tensor] = [torch.zeros(2, 96, 80, 3, dtype=torch.uint8)]
    shapes: list[dict[int, Any]] = [{0: batch, 1: sides[0], 2: sides[1]}]
    if is_open:
        inputs.append(torch.from_numpy(canvas_of(size)))
        shapes.append({axis: stride * count for axis, count in enumerate(strides)})
    encoder = Encoder(model)
    with torch.no_grad(), _out_of_place(encoder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced_encoder = torch.export.export(encoder, tuple(inputs), dynamic_shapes=tuple(shapes))
        features = list(encoder(*inputs))
        rows = [to_rows(level)[: 2 * GROUP] for level in features]
        rows = [torch.cat([level, level[:1].expand(2 * GROUP - len(level), -1)]) for level in rows]
        counts = [{0: GROUP * Dim(f"groups_{level}", min=1, max=1 << 24)} for level in range(len(rows))]
        grids = [{0: batch} for _ in features]
        detector = Detector(model, None if is_open else size, size[0] // features[0].shape[2])
        if is_open:
            around = NEIGHBORHOODS if detector.model.bank.keyed and has_neighborhoods(features) else None
            grids = [
                {0: batch, **(_open_neighborhoods() if number == around else _open_grid(level, size, stride, strides))}
                for number, level in enumerate(features)
            ]
        traced_detector = torch.export.export(detector, (features, rows), dynamic_shapes=(grids, counts))
    return traced_encoder, traced_detector, tuple(Level(*level.shape[1:]) for level in features)


def _open_grid(level: Tensor, size: Size, stride: int, strides: Sequence[Any]) -> dict[int, Any]:
    """Height and width of a level's features, by axis, as multiples of the strides of its photos."""
    patches = (side * stride // whole for side, whole in zip(level.shape[2:], size, strict=True))
    return {axis: each * count for axis, (each, count) in enumerate(zip(patches, strides, strict=True), 2)}


def _open_neighborhoods() -> dict[int, Any]:
    """Height and width of neighborhoods, by axis, which are no multiples of anything."""
    names = ("neighborhoods_down", "neighborhoods_across")
    return {axis: Dim(name, min=1, max=STEP * MOST_STRIDES) for axis, name in enumerate(names, 2)}
