# SPDX-License-Identifier: Apache-2.0

"""What the model makes of reference photos: their features, the rows that a bank keeps, and their own scores."""

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import torch
from anomalib.pre_processing import PreProcessor
from rich.console import Console
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_dtype

from anomalib_resad.enrollment.calibration import OwnScores, own_scores
from anomalib_resad.enrollment.decoding import BitDepth
from anomalib_resad.enrollment.image_size import Size, size_of_photos
from anomalib_resad.enrollment.photos import read_pixels
from anomalib_resad.enrollment.rotations import Rotations, enrolled_rows, kept_rows
from anomalib_resad.method.backbone import coarsest_stride
from anomalib_resad.method.features import Features, Rows, as_list, from_list, rows_from_list, to_rows
from anomalib_resad.pre_processor import with_size
from anomalib_resad.torch_model import ResADModel

LARGE_ENOUGH = (512, 512)  # of a blank photo, to see which size the pre-processor makes of it


def as_tensor(pixels: np.ndarray) -> Tensor:
    """A photo as anomalib's data sets give it: uint8 ``(H, W, 3)`` to float in 0..1, shape ``(3, H, W)``."""
    return to_dtype(torch.from_numpy(pixels.copy()).permute(2, 0, 1), torch.float32, scale=True)


def read_photo(path: str, bit_depth: BitDepth = "auto") -> Tensor:
    """Read a photo as RGB, float in 0..1, shape ``(3, H, W)``; arguments as of :func:`read_pixels`.

    Raises:
        PhotoError: If it cannot be used.
    """
    return as_tensor(read_pixels(path, bit_depth))


def product_size(model: ResADModel, sizes: Iterable[Size]) -> Size | None:
    """The input size that a product has of its own, by the sizes of its good photos; ``None`` if it has the model's."""
    backbone = model.encoder.backbone
    if backbone.area_side is None:
        return None
    return size_of_photos(sizes, backbone.area_side, coarsest_stride(backbone.name, backbone.layers))


def pre_process(pre_processor: nn.Module | None, photos: Tensor, size: Size | None = None) -> Tensor:
    """Resize and normalize photos ``(B, 3, H, W)`` as evaluation does; to ``size`` if it is not the pre-processor's."""
    if isinstance(pre_processor, PreProcessor):
        transform = with_size(pre_processor.transform, size)
        return photos if transform is None else transform(photos)
    return photos


@torch.no_grad()
def encode_photo(
    model: ResADModel, pre_processor: nn.Module | None, photo: Tensor, size: Size | None = None
) -> Features:
    """Features of one photo, RGB in 0..1, shape ``(3, H, W)``: a batch of one; ``size`` as of :func:`pre_process`."""
    images = pre_process(pre_processor, photo[None], size)
    return model.encode(images.to(next(model.parameters()).device))


def reference_rows(
    model: ResADModel,
    pre_processor: nn.Module | None,
    photos: Collection[np.ndarray],
    rotations: Rotations,
    size: Size | None = None,
) -> tuple[Rows, int]:
    """What a bank keeps of some photos.

    Args:
        model (ResADModel): The model.
        pre_processor (nn.Module | None): What comes before it.
        photos (Collection[np.ndarray]): The photos, uint8, shape ``(H, W, 3)`` each, one of them held at a time.
        rotations (Rotations): As of :func:`~anomalib_resad.enrollment.rotations.enrolled_rows`.
        size (Size | None): As of :func:`pre_process`.

    Returns:
        tuple[Rows, int]: Rows, photo after photo, and the number of orientations.
    """

    def encode(pixels: np.ndarray) -> list[np.ndarray]:
        features = encode_photo(model, pre_processor, as_tensor(pixels), size)
        return [to_rows(level).cpu().numpy() for level in as_list(features)]

    with Console(stderr=True).status(f"Enrolling {len(photos)} photos"):
        kept, orientations = enrolled_rows(photos, encode, model.bank.keyed, rotations)
    levels = [torch.from_numpy(np.concatenate(level)) for level in zip(*kept, strict=True)]
    return rows_from_list(levels, model.bank.keyed), orientations


@torch.no_grad()
def leave_one_out(model: ResADModel, pre_processor: nn.Module | None) -> OwnScores:
    """What each enrolled photo scores against the bank without it, from the bank's rows alone.

    Args:
        model (ResADModel): The model, with a filled bank. It is left in the mode that it was in.
        pre_processor (nn.Module | None): What comes before it.

    Returns:
        OwnScores: One score per photo; none of fewer than two photos.

    Raises:
        RuntimeError: If the bank is empty.
        ValueError: If the bank does not hold whole photos of the model's input size.
    """
    was_training = model.training
    model.eval()
    try:
        rows, record = as_list(model.bank.enrolled), model.bank.record
        blank = pre_process(pre_processor, torch.zeros(1, 3, *LARGE_ENOUGH)).to(rows[0])
        grids = [tuple(level.shape[-2:]) for level in as_list(model.encode(blank))]
        patches = [height * width for height, width in grids]
        photos = record.photos
        expected = [photos * kept_rows(count, record.rotations) for count in patches]
        if [len(level) for level in rows] != expected:
            msg = (
                f"The bank's levels hold {[len(level) for level in rows]} rows, which are not {photos} whole photos of "
                f"{grids} patches in {record.rotations} orientations: it was reduced, or made of photos of another "
                "size. Enroll the photos again."
            )
            raise ValueError(msg)
        split = [level.split(len(level) // photos) for level in rows]  # per level and photo
        indices = range(photos if photos > 1 else 0)
        return own_scores(_score_one(model, split, grids, index, blank.shape[-2:]) for index in indices)
    finally:
        model.train(was_training)


def _score_one(
    model: ResADModel,
    split: Sequence[Sequence[Tensor]],
    grids: Sequence[tuple[int, ...]],
    index: int,
    image_size: Sequence[int],
) -> tuple[float, np.ndarray]:
    """Score and map of one photo, whose own patches are the first of its rows, against the rows of the others."""
    own = [
        parts[index][: grid[0] * grid[1]].reshape(1, *grid, -1).permute(0, 3, 1, 2)
        for parts, grid in zip(split, grids, strict=True)
    ]
    others = [torch.cat([*parts[:index], *parts[index + 1 :]]) for parts in split]
    keyed = model.bank.keyed
    neighborhoods = model.bank.record.judges_neighborhoods
    searched = model.bank.thin_out(rows_from_list(others, keyed), len(split[0]) - 1, neighborhoods)
    found = model.detect(from_list(own, keyed), searched, image_size)
    assert found.pred_score is not None
    assert found.anomaly_map is not None
    return found.pred_score.item(), found.anomaly_map[0, 0].cpu().numpy()
