# SPDX-License-Identifier: Apache-2.0

"""A picture of predictions: photo, ground truth, and each method's map with its score."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from anomalib.data import ImageBatch, ImageItem
from torch import Tensor
from torchvision.transforms.v2.functional import resize

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def _items(batches: list[ImageBatch]) -> list[ImageItem]:
    return [item for batch in batches for item in batch.items]


def choose(items: list[ImageItem], per_folder: int) -> list[int]:
    """The first images of each test folder (good and each defect type), evenly spaced."""
    folders: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        folders.setdefault(Path(str(item.image_path)).parent.name, []).append(index)
    return [indices[len(indices) * part // per_folder] for indices in folders.values() for part in range(per_folder)]


def _photo(image: Tensor) -> np.ndarray:
    return (image.cpu() * STD + MEAN).clamp(0, 1).permute(1, 2, 0).numpy()


def draw_gallery(predictions: dict[str, list[ImageBatch]], path: Path, per_folder: int = 2) -> Path:
    """Draw photos, ground truth and the maps of several methods side by side.

    All maps of a method share one color scale, from the median to the highest value over all of its test images, so
    that a quiet map looks quiet.

    Args:
        predictions (dict[str, list[ImageBatch]]): Raw predictions of each method, on the same images.
        path (Path): PNG to write.
        per_folder (int): Images of each test folder.

    Returns:
        Path: The picture.
    """
    items = {method: _items(batches) for method, batches in predictions.items()}
    first = next(iter(items.values()))
    chosen = choose(first, per_folder)
    columns = 2 + len(items)
    figure, axes = plt.subplots(len(chosen), columns, figsize=(2.2 * columns, 2.3 * len(chosen)), squeeze=False)
    scales = {}
    for method, rows in items.items():
        values = torch.cat([torch.as_tensor(item.anomaly_map).flatten()[::16] for item in rows])
        scales[method] = (float(values.median()), float(values.max()))
    for row, index in enumerate(chosen):
        item = first[index]
        folder = Path(str(item.image_path)).parent.name
        photo = _photo(torch.as_tensor(item.image))
        axes[row, 0].imshow(photo)
        axes[row, 0].set_title(f"{folder}/{Path(str(item.image_path)).stem}", fontsize=8)
        mask = item.gt_mask if item.gt_mask is not None else torch.zeros(photo.shape[:2])
        mask = resize(torch.as_tensor(mask).float().reshape(1, *mask.shape[-2:]), list(photo.shape[:2]))[0]
        axes[row, 1].imshow(mask.numpy() > 0.5, cmap="gray", vmin=0, vmax=1)
        axes[row, 1].set_title("ground truth" if item.gt_mask is not None else "no mask", fontsize=8)
        for column, (method, rows) in enumerate(items.items(), start=2):
            low, high = scales[method]
            anomaly_map = torch.as_tensor(rows[index].anomaly_map).squeeze().numpy()
            axes[row, column].imshow(photo.mean(axis=2), cmap="gray", vmin=0, vmax=1)
            axes[row, column].imshow(anomaly_map, cmap="inferno", vmin=low, vmax=high, alpha=0.75)
            axes[row, column].set_title(f"{method}: {torch.as_tensor(rows[index].pred_score).item():.3g}", fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path.with_suffix(".part.png"), dpi=90)
    plt.close(figure)
    path.with_suffix(".part.png").replace(path)
    return path
