# SPDX-License-Identifier: Apache-2.0

"""A pre-processor that resizes in the export exactly as it does in training and evaluation.

anomalib switches antialiasing off in exported models, because ONNX exporters lack the operator: a photo larger than
the input is then sampled differently than in evaluation, and its patches differ from those in the bank. Antialiased
bilinear resizing is linear and separable, so it can be written as two matrix products, which every runtime has.
"""

from collections.abc import Sequence

import torch
from anomalib.pre_processing import PreProcessor
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize, Transform

from anomalib_resad.method.backbone import describe


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


class ExactPreProcessor(PreProcessor):
    """anomalib's pre-processor with an export that keeps antialiasing.

    Args:
        transform (Transform | None): Transform of the images.
    """

    def __init__(self, transform: Transform | None = None) -> None:
        super().__init__(transform)
        self.export_transform = _exact(self.transform, self.export_transform)

    def load_checkpoint_config(self, config: dict) -> None:
        """Restore the transform, and with it the export's."""
        super().load_checkpoint_config(config)
        self.export_transform = _exact(self.transform, self.export_transform)


def resize_and_normalize(image_size: tuple[int, int] | None = None, backbone: str | None = None) -> ExactPreProcessor:
    """Resize with antialiasing and normalize as the backbone's pretrained weights expect it.

    Args:
        image_size (tuple[int, int] | None): Height and width; 224 x 224 by default.
        backbone (str | None): timm model name; ImageNet statistics by default.
    """
    mean: Sequence[float] = describe(backbone).mean if backbone else IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = describe(backbone).std if backbone else IMAGENET_DEFAULT_STD
    resize = Resize(image_size or (224, 224), antialias=True)
    return ExactPreProcessor(Compose([resize, Normalize(mean=list(mean), std=list(std))]))
