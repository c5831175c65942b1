# SPDX-License-Identifier: Apache-2.0

"""Defects of many kinds, sizes and contrasts, painted on a picture; the mask is what really changed."""

from collections.abc import Callable

import cv2
import numpy as np

from benchmarks.sources.surfaces import Array, Rng, noise

# A pixel belongs to the defect where a channel changed by more than this; less is not visible.
VISIBLE = 0.03
SMALLEST = 12  # pixels; a defect that turns out smaller is drawn anew
TRIES = 40

Place = tuple[int, int]  # column and row
Defect = Callable[[Rng, Array, Place], Array]


def _shape(rng: Rng, size: int, place: Place, reach: float) -> Array:
    """An uneven blob with a soft edge, 0..1."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    stretch, turn = rng.uniform(0.5, 1), rng.uniform(0, np.pi)
    x, y = x - place[0], y - place[1]
    along, across = x * np.cos(turn) + y * np.sin(turn), (y * np.cos(turn) - x * np.sin(turn)) / stretch
    edge = reach * (1 + 0.35 * noise(rng, size, max(2.0, reach / 2)))
    return np.clip((edge - np.hypot(along, across)) / rng.uniform(1, 4), 0, 1).astype(np.float32)


def _blob(rng: Rng, size: int, place: Place) -> Array:
    return _shape(rng, size, place, size * float(np.exp(rng.uniform(np.log(0.012), np.log(0.12)))))


def _line(rng: Rng, size: int, place: Place, wander: float) -> Array:
    """A thin line that keeps its direction more or less, 0..1."""
    steps = int(rng.integers(6, 26))
    angles = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, wander, steps))
    reach = size * rng.uniform(0.1, 0.5) / steps
    points = np.array(place) + np.cumsum(reach * np.stack([np.cos(angles), np.sin(angles)], 1), axis=0)
    drawn = np.zeros((size, size), np.float32)
    width = int(rng.integers(1, max(2, size // 60) + 1))
    cv2.polylines(drawn, [points.astype(np.int32)], isClosed=False, color=1.0, thickness=width, lineType=cv2.LINE_AA)
    return cv2.GaussianBlur(drawn, (0, 0), rng.uniform(0.4, 1.0)).astype(np.float32)


def _mix(image: Array, other: Array, mask: Array) -> Array:
    return image * (1 - mask[..., None]) + other * mask[..., None]


def _toned(rng: Rng, image: Array) -> Array:
    """The picture darker, lighter or tinted, a little or much."""
    strength = rng.uniform(0.15, 0.8)
    target = rng.choice([0.0, 1.0]) if rng.random() < 0.7 else rng.uniform(0, 1, 3)
    return (image * (1 - strength) + strength * target).astype(np.float32)


def scratch(rng: Rng, image: Array, place: Place) -> Array:
    """A nearly straight line, lighter or darker."""
    return _mix(image, _toned(rng, image), _line(rng, len(image), place, 0.06))


def crack(rng: Rng, image: Array, place: Place) -> Array:
    """A jagged dark line."""
    return _mix(image, image * rng.uniform(0.2, 0.75), _line(rng, len(image), place, 0.5))


def fiber(rng: Rng, image: Array, place: Place) -> Array:
    """A hair or thread that lies on the product."""
    return _mix(image, np.full_like(image, rng.uniform(0, 1)), _line(rng, len(image), place, 0.25))


def stain(rng: Rng, image: Array, place: Place) -> Array:
    """A patch of another tone through which the product is still seen."""
    return _mix(image, _toned(rng, image), _blob(rng, len(image), place) * rng.uniform(0.3, 1))


def chip(rng: Rng, image: Array, place: Place) -> Array:
    """A break or hole: what lies below has another texture."""
    size = len(image)
    below = (
        rng.uniform(0.05, 0.9, 3 if rng.random() < 0.3 else 1) + 0.08 * noise(rng, size, rng.uniform(0.8, 4))[..., None]
    )
    return _mix(image, np.broadcast_to(below, image.shape), _blob(rng, size, place))


def missing(rng: Rng, image: Array, place: Place) -> Array:
    """A piece that is not there: the surroundings go on over it."""
    size = len(image)
    mask = _blob(rng, size, place)
    pixels = (np.clip(image, 0, 1) * 255).astype(np.uint8)
    filled = cv2.inpaint(pixels, (mask > 0.05).astype(np.uint8), 3, cv2.INPAINT_TELEA)
    return _mix(image, filled.astype(np.float32) / 255 + 0.01 * noise(rng, size, 1.0)[..., None], mask)


def displaced(rng: Rng, image: Array, place: Place) -> Array:
    """A piece of the product at the wrong place, moved, mirrored or rotated."""
    size = len(image)
    mask = _shape(rng, size, place, size * rng.uniform(0.03, 0.12))
    turn: Array = cv2.getRotationMatrix2D(
        (float(place[0]), float(place[1])), float(rng.choice([0, 20, 45, 90, 180])), 1.0
    )
    turn[:, 2] += rng.choice([-1, 1], 2) * rng.uniform(0.02, 0.3, 2) * size
    moved = cv2.warpAffine(image, turn, (size, size), borderMode=cv2.BORDER_REFLECT)
    return _mix(image, moved, mask)


def dent(rng: Rng, image: Array, place: Place) -> Array:
    """A bump or dent: light on one side, dark on the other."""
    size = len(image)
    bump = cv2.GaussianBlur(_blob(rng, size, place), (0, 0), rng.uniform(2, 6))
    slope = cv2.Sobel(bump, cv2.CV_32F, *((1, 0) if rng.random() < 0.5 else (0, 1)))
    return image * (1 + rng.uniform(0.3, 1.0) * slope / max(float(np.abs(slope).max()), 1e-6))[..., None]


def smear(rng: Rng, image: Array, place: Place) -> Array:
    """Details rubbed away along a direction."""
    length = int(rng.integers(5, 25))
    kernel = np.zeros((length, length), np.float32)
    kernel[length // 2 if rng.random() < 0.5 else slice(None), slice(None) if rng.random() < 0.5 else length // 2] = 1
    rubbed = cv2.filter2D(image, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT)
    return _mix(image, rubbed, _blob(rng, len(image), place))


def dust(rng: Rng, image: Array, place: Place) -> Array:
    """A cluster of specks or drops."""
    size = len(image)
    specks = np.zeros((size, size), np.float32)
    for point in np.array(place) + rng.normal(0, size * rng.uniform(0.01, 0.06), (int(rng.integers(2, 14)), 2)):
        cv2.circle(specks, point.astype(int).tolist(), int(rng.integers(1, 4)), 1.0, -1, cv2.LINE_AA)
    return _mix(image, _toned(rng, image), specks * rng.uniform(0.5, 1))


def recolored(rng: Rng, image: Array, place: Place) -> Array:
    """Channels weighted anew: discoloring, burn, oxide."""
    return _mix(image, image * rng.uniform(0.6, 1.35, 3).astype(np.float32), _blob(rng, len(image), place))


DEFECTS: dict[str, Defect] = {
    function.__name__: function
    for function in (scratch, crack, fiber, stain, chip, missing, displaced, dent, smear, dust, recolored)
}


def damaged(rng: Rng, image: Array, region: Array, kind: str) -> tuple[Array, Array]:
    """A picture with one to three defects of a kind, and where it changed visibly.

    Args:
        rng (Rng): Random numbers.
        image (Array): Picture in 0..1, shape ``(size, size, 3)``.
        region (Array): Where the product is, shape ``(size, size)``.
        kind (str): One of :data:`DEFECTS`.

    Returns:
        tuple[Array, Array]: The picture, and the mask, 0 or 1, shape ``(size, size)``.

    Raises:
        RuntimeError: If nothing visible could be painted.
    """
    rows, columns = np.nonzero(region > 0.5)
    for _ in range(TRIES):
        painted = image
        for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
            place = rng.integers(len(rows))
            spread = DEFECTS[kind](rng, painted, (int(columns[place]), int(rows[place])))
            painted = np.where(region[..., None] > 0.2, np.clip(spread, 0, 1), painted).astype(np.float32)
        mask = (np.abs(painted - image).max(axis=2) > VISIBLE).astype(np.uint8)
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
        if SMALLEST <= mask.sum() < 0.25 * mask.size:
            return painted, mask.astype(np.float32)
    msg = f"No visible {kind} could be painted in {TRIES} tries on a region of {len(rows)} pixels."
    raise RuntimeError(msg)
