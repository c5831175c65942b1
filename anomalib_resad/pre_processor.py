# SPDX-License-Identifier: Apache-2.0

"""A pre-processor that resizes in the export exactly as it does in training and evaluation.

anomalib switches antialiasing off in exported models, because ONNX exporters lack the operator: a photo larger than
the input is then sampled differently than in evaluation, and its patches differ from those in the bank. Antialiased
bilinear resizing is linear and separable, so it can be written as two matrix products, which every runtime has.
"""

from collections.abc import Sequence
from typing import Any

import torch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.pre_processing import PreProcessor
from anomalib.pre_processing.utils.transform import get_exportable_transform
from lightning.pytorch import LightningModule, Trainer
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize, Transform

from anomalib_resad.enrollment.image_size import SIDE, ImageSize, auto_side, read_image_size, size_of_photos
from anomalib_resad.method.backbone import coarsest_stride, describe


def resize_weights(inputs: int, outputs: int, like: Tensor) -> Tensor:
    """Weights of antialiased linear resampling along one axis, shape ``(outputs, inputs)``.

    A triangle filter around each output's center, as wide as the output's footprint when shrinking; this is what
    ``torch.nn.functional.interpolate(mode="bilinear", antialias=True)`` computes.
    """
    centers = (torch.arange(outputs, device=like.device, dtype=like.dtype) + 0.5) * inputs / outputs
    positions = torch.arange(inputs, device=like.device, dtype=like.dtype) + 0.5
    # max(inputs / outputs, 1) as a tensor, because `inputs` is symbolic in a dynamic export
    width = (torch.ones_like(centers[:1]) * inputs / outputs).clamp(min=1.0)
    weights = (1 - (positions[None] - centers[:, None]).abs() / width).clamp(min=0.0)
    return weights / weights.sum(dim=1, keepdim=True)


class AntialiasedResize(nn.Module):
    """Antialiased bilinear resize to a fixed size, out of matrix products.

    Args:
        size (tuple[int, int]): Height and width of the result.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        """Resize images, shape ``(..., H, W)`` to ``(..., *size)``."""
        sides = image.shape[-2:]
        if all(isinstance(side, int) for side in sides) and sides == self.size:
            return image  # what the products would give, too; sides that an export leaves open are no numbers yet
        rows = resize_weights(image.shape[-2], self.size[0], image)
        columns = resize_weights(image.shape[-1], self.size[1], image)
        # As many axes as the image has: the CPU plugin would add them, and drop the mark that keeps float32.
        axes = (None,) * (image.ndim - 2)
        return rows[axes] @ image @ columns.T[axes]


def _exact(transform: Transform | None, exportable: nn.Module | None) -> nn.Module | None:
    """Put exact resizes where anomalib's exportable transform has plain ones."""
    if isinstance(transform, Compose) and isinstance(exportable, Compose):
        pairs = zip(transform.transforms, exportable.transforms, strict=True)
        return Compose([_exact(original, exported) for original, exported in pairs])
    if (
        isinstance(transform, Resize)
        and transform.antialias
        and transform.interpolation in (InterpolationMode.BILINEAR, "bilinear")  # torchvision's default is the text
        and transform.size is not None
        and len(transform.size) == 2
    ):
        return AntialiasedResize((transform.size[0], transform.size[1]))
    return exportable


def with_size(transform: Transform | None, size: Sequence[int] | None) -> Transform | None:
    """A transform that resizes to another size; the same one where no size is given."""
    if size is None or transform is None:
        return transform
    if isinstance(transform, Compose):
        return Compose([with_size(each, size) for each in transform.transforms])
    return _resize_to(size) if isinstance(transform, Resize) else transform


def _resize_to(size: Sequence[int]) -> Resize:
    return Resize(tuple(size), antialias=True)


class ExactPreProcessor(PreProcessor):
    """anomalib's pre-processor with an export that keeps antialiasing, and with a size that can follow a product.

    Args:
        transform (Transform | None): Transform of the images.
    """

    def __init__(self, transform: Transform | None = None) -> None:
        super().__init__(transform)
        self.export_transform = _exact(self.transform, self.export_transform)

    def take_size(self, size: Sequence[int]) -> None:
        """Resize to another size from now on, also where a data set holds the resizing; an export does so too."""
        for resize in extract_transforms_by_type(self.transform, Resize):
            resize.size = list(size)
        self.export_transform = _exact(self.transform, get_exportable_transform(self.transform))

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401  # Lightning's type; anomalib passes a Batch
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Leave the size of photos alone whose data set gave each category its own."""
        del pl_module, batch_idx, dataloader_idx
        own = getattr(getattr(getattr(trainer, "datamodule", None), "val_data", None), "sizes", None)
        transform = with_size(self.transform, batch.image.shape[-2:] if own else None)
        if transform:
            batch.image, batch.gt_mask = transform(batch.image, batch.gt_mask)

    def load_checkpoint_config(self, config: dict) -> None:
        """Restore the transform, and with it the export's."""
        super().load_checkpoint_config(config)
        self.export_transform = _exact(self.transform, self.export_transform)


def resize_and_normalize(image_size: ImageSize | None = None, backbone: str | None = None) -> ExactPreProcessor:
    """Resize with antialiasing and normalize as the backbone's pretrained weights expect it.

    Args:
        image_size (ImageSize | None): See :mod:`anomalib_resad.enrollment.image_size`; the default's square where it is
            not given, and of ``"auto"`` the square until a product is enrolled.
        backbone (str | None): timm model name; ImageNet statistics by default.
    """
    size: Any = read_image_size((SIDE, SIDE) if image_size is None else image_size)
    side = auto_side(size)
    if side is not None:
        size = size_of_photos([(side, side)], side, coarsest_stride(backbone) if backbone else 1)
    mean: Sequence[float] = describe(backbone).mean if backbone else IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = describe(backbone).std if backbone else IMAGENET_DEFAULT_STD
    return ExactPreProcessor(Compose([_resize_to(size), Normalize(mean=list(mean), std=list(std))]))


def choose_pre_processor(given: PreProcessor | bool, image_size: ImageSize, backbone: str) -> PreProcessor | bool:
    """The pre-processor of a model that was given one, or ``True`` for :func:`resize_and_normalize`.

    Raises:
        ValueError: If photos are to keep their shape, and the one that was given cannot follow it.
    """
    if given is True:
        return resize_and_normalize(image_size, backbone)
    if auto_side(image_size) is not None and not isinstance(given, ExactPreProcessor):
        msg = f"image_size={image_size!r} needs the model's own pre-processor: leave pre_processor out, or give a size."
        raise ValueError(msg)
    return given
