# SPDX-License-Identifier: Apache-2.0

"""What was found in a photo, and the scales that make it comparable."""

import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from anomalib_resad.deploy.bank import Bank
from anomalib_resad.deploy.bundle import Manifest
from anomalib_resad.deploy.pictures import boxed, overlay, resized
from anomalib_resad.deploy.regions import Region, bounded, find_regions
from anomalib_resad.enrollment.calibration import how_sure
from anomalib_resad.enrollment.thresholds import product_map_threshold


@dataclass(frozen=True)
class Prediction:
    """What was found in a photo.

    Attributes:
        score (float): 0 to 1, 0.5 at the threshold.
        label (bool | None): Whether it is anomalous; ``None`` where no threshold is known.
        map (np.ndarray): Anomaly of each pixel, float32, 0 to 1, shape ``(H, W)`` of the model's input. Of a product
            with a region of interest it is larger, and 0 outside of it.
        raw_score (float): The score before normalization, which thresholds of products refer to.
        photo_size (tuple[int, int] | None): Height and width of the photo in pixels; ``None`` for those of the map.
        min_area (int): Fewest pixels of a region, of the photo; the product's.
        moved (bool): Whether the region of interest shows something else than in the good photos, or in another place.
            Then there is no label.
    """

    score: float
    label: bool | None
    map: np.ndarray
    raw_score: float
    photo_size: tuple[int, int] | None = None
    min_area: int = 0
    moved: bool = False

    @property
    def status(self) -> str | None:
        """``"good"``, ``"anomalous"`` or ``"moved"``; ``None`` where no threshold is known."""
        if self.moved:
            return "moved"
        return None if self.label is None else ("anomalous" if self.label else "good")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the photo in pixels."""
        return self.photo_size or (self.map.shape[0], self.map.shape[1])

    @property
    def photo_map(self) -> np.ndarray:
        """The map at the photo's size, float32; of a photo of more than 16 million pixels at so many."""
        return resized(self.map, bounded(self.size))

    @cached_property
    def regions(self) -> tuple[Region, ...] | None:
        """Where an anomalous photo's map lies above its threshold, the highest peak first; ``None`` without a label.

        A photo that counts as good has none: nothing was found in it, whatever single pixels are. For other limits,
        and for good photos, see :func:`~anomalib_resad.deploy.regions.find_regions`.
        """
        if self.label is None:
            return None
        return find_regions(self.map, self.size, self.min_area) if self.label else ()

    def where(self) -> dict[str, Any]:
        """Size of the photo and its regions, for JSON."""
        regions = None if self.regions is None else [_rounded(asdict(each)) for each in self.regions]
        return {"size": {"width": self.size[1], "height": self.size[0]}, "regions": regions}

    def picture(self, pixels: np.ndarray, stretch: bool = False) -> Image.Image:
        """The map over its photo, and boxes around the regions.

        Args:
            pixels (np.ndarray): The photo at the size of the picture, uint8, shape ``(H, W, 3)``.
            stretch (bool): As of :func:`~anomalib_resad.deploy.pictures.overlay`.
        """
        high, wide = pixels.shape[0] / self.size[0], pixels.shape[1] / self.size[1]
        boxes = (
            (each.x * wide, each.y * high, (each.x + each.width) * wide, (each.y + each.height) * high)
            for each in self.regions or ()
        )
        return boxed(overlay(pixels, self.map, stretch), boxes)

    def png(self, pixels: np.ndarray, stretch: bool, gray: bool = False) -> bytes:
        """:meth:`picture` as a file, or the map alone in gray, 255 for 1; arguments as there."""
        drawn = self.picture(pixels, stretch)
        if gray:
            drawn = Image.fromarray(np.round(np.clip(self.map, 0, 1) * 255).astype(np.uint8))
        content = io.BytesIO()
        drawn.save(content, "PNG")
        return content.getvalue()


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}


def scales_of(manifest: Manifest, bank: Bank) -> tuple[tuple[np.float32, ...], tuple[np.float32, ...]]:
    """Threshold, low and high of a product's scores, and of its maps, in the precision of the model's outputs.

    The threshold of the maps follows that of the scores.

    Args:
        manifest (Manifest): The bundle's.
        bank (Bank): The product's.
    """
    threshold, *score_range = manifest.score.numbers
    map_threshold, *map_range = manifest.map.numbers
    own, offset = (math.nan if each is None else each for each in (bank.threshold, bank.map_offset))
    moved = product_map_threshold(map_threshold, threshold, own, offset)
    chosen = threshold if bank.threshold is None else own
    return _float32(chosen, *score_range), _float32(moved, *map_range)


def threshold_of(manifest: Manifest, bank: Bank) -> str:
    """What to tell of the raw score above which a product's photos are anomalous, and how sure it is."""
    rate = bank.false_alarm_rate
    if bank.threshold is None:
        known = manifest.score.threshold
        said = "no threshold" if known is None else f"the model's threshold {known:.4g}"
        return said if rate is None else f"{said}, until a second photo is there to be compared with"
    if rate is None:
        return f"its own threshold {bank.threshold:.4g}"
    sure = how_sure(len(bank.references), bank.spread(manifest), rate)
    return f"its own threshold {bank.threshold:.4g} for a false-alarm rate of {100 * rate:.3g} %; {sure}"


def _float32(*values: float) -> tuple[np.float32, ...]:
    return tuple(np.float32(value) for value in values)
