# SPDX-License-Identifier: Apache-2.0

"""Reference photos and their features: which may be drawn, what the model makes of one, what a bank keeps of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from anomalib.data import AnomalibDataset
from anomalib.data.utils import LabelName
from anomalib.pre_processing import PreProcessor
from rich.console import Console
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_dtype

from anomalib_resad.enrollment import Rotations, enrolled_rows
from anomalib_resad.photo_files import read_pixels
from anomalib_resad.photos import draw, seeded
from anomalib_resad.reference_bank import to_rows
from anomalib_resad.torch_model import ResADModel

WHOLE = "data"  # category of datamodules that have only one


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


@torch.no_grad()
def encode_photo(model: ResADModel, pre_processor: nn.Module | None, photo: Tensor) -> list[Tensor]:
    """Features of one photo, RGB in 0..1, shape ``(3, H, W)``: one map ``(1, C_l, H_l, W_l)`` per level."""
    photo = photo.unsqueeze(0)
    if isinstance(pre_processor, PreProcessor) and pre_processor.transform is not None:
        photo = pre_processor.transform(photo)
    return model.encode(photo.to(next(model.parameters()).device))


def reference_rows(
    model: ResADModel, pre_processor: nn.Module | None, paths: Sequence[Path | str], rotations: Rotations
) -> tuple[list[Tensor], int]:
    """What a bank keeps of some photos.

    Args:
        model (ResADModel): The model.
        pre_processor (nn.Module | None): What comes before it.
        paths (Sequence[Path | str]): The photos.
        rotations (Rotations): Turns of each, or ``"auto"`` (:func:`~anomalib_resad.enrollment.enrolled_rows`).

    Returns:
        tuple[list[Tensor], int]: Rows ``(N_l, C_l)`` per level, photo after photo, and the number of turns.
    """

    def encode(pixels: np.ndarray) -> list[np.ndarray]:
        photo = to_dtype(torch.from_numpy(pixels.copy()).permute(2, 0, 1), torch.float32, scale=True)
        return [to_rows(level).cpu().numpy() for level in encode_photo(model, pre_processor, photo)]

    with Console(stderr=True).status(f"Enrolling {len(paths)} photos"):
        photos, turns = enrolled_rows([read_pixels(path) for path in paths], encode, model.bank.keyed, rotations)
    return [torch.from_numpy(np.concatenate(level)) for level in zip(*photos, strict=True)], turns
