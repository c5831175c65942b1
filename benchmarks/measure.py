# SPDX-License-Identifier: Apache-2.0

"""What a leaderboard measures: quality on raw scores, time against the plain backbone, memory."""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.metrics.pro import connected_components_cpu
from torch import Tensor, nn

QUALITY = ("image_AUROC", "image_AP", "image_F1", "pixel_AUROC", "pixel_AP", "pixel_F1", "AUPRO")
MEMORY = Path("/proc/self")


def _thresholds(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Order of the scores from the highest on, and the last place of each different value in it.

    Raises:
        ValueError: If a score is not finite.
    """
    finite = torch.isfinite(scores)
    if not finite.all():
        msg = f"{int((~finite).sum())} of {scores.numel()} scores are not finite."
        raise ValueError(msg)
    values, order = scores.flatten().sort(descending=True)
    changes = torch.ones_like(values, dtype=torch.bool)
    changes[:-1] = values[1:] != values[:-1]
    return order, changes.nonzero().squeeze(1)


def _curve(gains: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    """What has been gained at each threshold, from nothing on."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), gains.flatten()[order].double().cumsum(0)[ends]])


def _ranking(positive: Tensor, negative: Tensor) -> tuple[float, float, float]:
    """AUROC, average precision and the best F1 from counts of true and false positives at all thresholds."""
    auroc = torch.trapezoid(positive, negative) / (positive[-1] * negative[-1])
    precision = positive[1:] / (positive[1:] + negative[1:])
    average_precision = (positive.diff() * precision).sum() / positive[-1]
    f1 = (2 * positive / (positive + negative + positive[-1])).max()
    return float(auroc), float(average_precision), float(f1)


def ranking_quality(scores: Tensor, labels: Tensor) -> tuple[float, float, float] | tuple[None, None, None]:
    """AUROC, average precision and the best F1 over all thresholds; nothing where only one class is there.

    The figures of scikit-learn and torchmetrics (the tests compare them), from one sort instead of one for each: with
    five million pixels in a test set, sorting would be half of a leaderboard's time. Nothing but the ranking of the
    scores counts; torchmetrics itself would pass raw scores through a sigmoid, which makes large ones equal.

    Args:
        scores (Tensor): Raw scores, any shape.
        labels (Tensor): 1 for abnormal, of the same shape.

    Raises:
        ValueError: If a score is not finite.
    """
    order, ends = _thresholds(scores)
    if labels.min() == labels.max():
        return None, None, None
    return _ranking(_curve(labels == 1, order, ends), _curve(labels != 1, order, ends))


def region_weights(masks: Tensor) -> Tensor:
    """Weights of pixels that make every defect region count the same: over all of them they add up to 1.

    Args:
        masks (Tensor): 1 for defects, shape ``(B, H, W)``.
    """
    weights = torch.zeros(masks.shape, dtype=torch.float64)
    regions = 0
    for mask, weight in zip(masks, weights, strict=True):
        if mask.any():
            labels = connected_components_cpu(mask[None, None].float()).reshape(mask.shape).long()
            sizes = labels.flatten().bincount()
            weight.copy_((1 / sizes.double())[labels] * (labels > 0))
            regions += len(sizes) - 1
    return weights / max(regions, 1)


def _pro_area(overlap: Tensor, negative: Tensor, limit: float = 0.3) -> float:
    """Area under the per-region overlap curve up to a rate of false positives, as a share of the most possible."""
    rate = negative / negative[-1]
    inside = int((rate <= limit).sum())
    at_limit = np.interp(limit, rate.numpy(), overlap.numpy())
    rate = torch.cat([rate[:inside], torch.tensor([limit], dtype=torch.float64)])
    overlap = torch.cat([overlap[:inside], torch.tensor([at_limit], dtype=torch.float64)])
    return float(torch.trapezoid(overlap, rate)) / limit


def pixel_quality(maps: Tensor, masks: Tensor) -> tuple[float, ...] | tuple[None, ...]:
    """AUROC, average precision and the best F1 over all pixels, and AUPRO up to 30 % false positives.

    Args:
        maps (Tensor): Raw anomaly maps, shape ``(B, H, W)``.
        masks (Tensor): 1 for defects, of the same shape.

    Raises:
        ValueError: If a value is not finite.
    """
    order, ends = _thresholds(maps)
    if not masks.any() or masks.all():
        return (None,) * 4
    positive, negative = _curve(masks == 1, order, ends), _curve(masks != 1, order, ends)
    overlap = _curve(region_weights(masks), order, ends)
    return (*_ranking(positive, negative), _pro_area(overlap, negative))


def quality(predictions: list[ImageBatch]) -> dict[str, float | None]:
    """Image and pixel figures of raw predictions; pixel figures are ``None`` where defective images have no masks.

    Args:
        predictions (list[ImageBatch]): What the engine's ``predict`` returned for a whole test set.
    """
    scores = torch.cat([torch.as_tensor(batch.pred_score).flatten() for batch in predictions])
    labels = torch.cat([torch.as_tensor(batch.gt_label).flatten() for batch in predictions])
    figures: dict[str, float | None] = dict.fromkeys(QUALITY)
    figures |= dict(zip(QUALITY[:3], ranking_quality(scores, labels), strict=True))
    if any(batch.gt_mask is None or batch.anomaly_map is None for batch in predictions):
        return figures
    maps = torch.cat([torch.as_tensor(batch.anomaly_map).squeeze(1) for batch in predictions])
    masks = torch.cat([torch.as_tensor(batch.gt_mask).squeeze(1) for batch in predictions])
    return figures | dict(zip(QUALITY[3:], pixel_quality(maps, masks.int()), strict=True))


@torch.no_grad()
def latency(method: Callable[[Tensor], Any], backbone: nn.Module, photo: Tensor, repeats: int = 7) -> tuple[float, ...]:
    """Median milliseconds of a method and of the plain backbone on one photo, timed in turn.

    Taken in turn, both meet the same load of the machine; their ratio is the figure to compare.

    Args:
        method (Callable[[Tensor], Any]): The whole method, from the resized photo to score and map.
        backbone (nn.Module): The feature extractor alone.
        photo (Tensor): One photo, shape ``(1, 3, H, W)``.
        repeats (int): Timed runs of each, after one that is not counted.
    """
    times: tuple[list[float], list[float]] = ([], [])
    runs: tuple[Callable[[Tensor], Any], ...] = (method, backbone)
    for _ in range(repeats + 1):
        for run, kept in zip(runs, times, strict=True):
            start = time.perf_counter()
            run(photo)
            if photo.is_cuda:
                torch.cuda.synchronize()
            kept.append(1000 * (time.perf_counter() - start))
    return tuple(median(kept[1:]) for kept in times)


def _status(field: str) -> int:
    line = next(line for line in (MEMORY / "status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


class PeakMemory:
    """Most memory that was in use beyond that at the start, in bytes; ``None`` where Linux does not tell."""

    def __enter__(self) -> "PeakMemory":  # noqa: PYI034  # Self needs Python 3.11
        """Start anew: the process's peak is set back to what is in use now."""
        self.bytes: int | None = None
        gc.collect()
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that was freed, but kept, would hide what is needed now
            (MEMORY / "clear_refs").write_text("5")
            self._start: int | None = _status("VmRSS")
        except OSError:
            self._start = None
        return self

    def __exit__(self, *_: object) -> None:
        """Read the peak."""
        if self._start is not None:
            self.bytes = max(0, _status("VmHWM") - self._start)


def state_bytes(module: nn.Module) -> int:
    """Bytes of a module's tensors."""
    return sum(value.nbytes for value in module.state_dict().values() if isinstance(value, Tensor))
