# SPDX-License-Identifier: Apache-2.0

"""Keep the maps of a few test images of a cell, for the galleries."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch

from benchmarks.gallery import choose

PER_FOLDER = 2


def slug(text: str) -> str:
    """A name as part of a file name."""
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in text)


def save_maps(predictions: list[ImageBatch], method: str, category: str, folder: Path) -> Path:
    """Write the maps of evenly chosen test images as ``<method>--<category>.npz``.

    Args:
        predictions (list[ImageBatch]): Raw predictions of a whole test set.
        method (str): Name of the method.
        category (str): Target category.
        folder (Path): Folder to write to.

    Returns:
        Path: The file: ``method``, ``category``, ``paths``, ``labels``, ``scores``, ``maps``, ``masks`` (where there
            are any), and ``low`` and ``high``, the median and the highest value over the maps of all test images.
    """
    items = [item for batch in predictions for item in batch.items]
    chosen = [items[index] for index in choose(items, PER_FOLDER)]
    values = torch.cat([torch.as_tensor(item.anomaly_map).flatten()[::16] for item in items])
    arrays: dict[str, Any] = {
        "method": np.array(method),
        "category": np.array(category),
        "paths": np.array([str(item.image_path) for item in chosen]),
        "labels": np.array([int(torch.as_tensor(item.gt_label)) for item in chosen]),
        "scores": np.array([float(torch.as_tensor(item.pred_score)) for item in chosen], dtype=np.float32),
        "maps": np.stack([torch.as_tensor(item.anomaly_map).squeeze().numpy() for item in chosen]).astype(np.float16),
        "low": np.array(float(values.median())),
        "high": np.array(max(float(torch.as_tensor(item.anomaly_map).max()) for item in items)),
    }
    if all(item.gt_mask is not None for item in chosen):
        masks = [torch.as_tensor(item.gt_mask).squeeze().numpy() for item in chosen]
        arrays["masks"] = np.stack(masks).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug(method)}--{slug(category)}.npz"
    temporary = path.with_suffix(".part.npz")
    np.savez_compressed(temporary, **arrays)
    temporary.replace(path)
    return path
