# SPDX-License-Identifier: Apache-2.0

"""Masks: which pixels of a defective photo are the defect, and which files are no mask of that photo.

The rules, for every source of masks:

- A mask has the size of its photo, as that is stored, and one page of one of the photos' formats.
- What is not black is the defect; in lossy files (JPEG, WebP) what is brighter than half, because these blur edges.
- Transparent pixels are no defect. Where all colors are the same, the opaque pixels are the defect.
- Index colors count as the colors that they stand for; where these are all black or all not, index 0 is no defect.
- A mask belongs to one photo.
- A mask without a defect is taken for a missing one.
- A mask that is white for the most part, its edge too, is inverted, and refused.
"""

import io
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from anomalib.data.utils import LabelName
from anomalib.data.utils import read_mask as read_by_anomalib
from pandas import DataFrame
from PIL import Image
from rich.console import Console
from rich.progress import track

from anomalib_resad.enrollment.decoding import AS_STORED, FORMATS, HEAD, Header, PhotoError, header_of, unreadable
from anomalib_resad.enrollment.photos import mask_may_be_turned, read_header, refuse

logger = logging.getLogger(__name__)

FEW = 200  # masks that are checked in less than two seconds
SHOWN = 5  # files that a message names
TURNED = (
    "it has an orientation (EXIF or TIFF), and its mask may be of the picture as it is stored or as it is shown; save "
    "it turned"
)


def read_mask(path: Path | str, photo: Header) -> np.ndarray:
    """Where a photo is defective.

    Args:
        path (Path | str): The mask.
        photo (Header): That of the photo.

    Returns:
        np.ndarray: Bool, shape ``(H, W)`` of the photo's pixels; nowhere true if the mask is empty.

    Raises:
        PhotoError: If the file is no mask of this photo.
    """
    try:
        content = Path(path).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            header = header_of(image, content[:HEAD])
            lossy = image.format in ("JPEG", "MPO") or content[12:16] in (b"VP8 ", b"VP8X")
            stored = AS_STORED.get(header.turned, np.asarray)(_defect(image, header, lossy))
    except PhotoError:
        raise
    except FileNotFoundError:
        msg = "no such file"
        raise PhotoError(msg) from None
    except Exception as error:  # whatever a decoder raises
        raise unreadable(error) from error
    _check_shape(stored, photo)
    edge = np.concatenate([stored[0], stored[-1], stored[:, 0], stored[:, -1]])
    if stored.mean() > 0.5 and edge.mean() > 0.5:
        msg = (
            f"{stored.mean():.0%} of it is white, and so is its edge, while the defect alone should be: invert it, or "
            "remove it if the defect is that large"
        )
        raise PhotoError(msg)
    return _reduced(stored, photo.reduction)


def _defect(image: Image.Image, header: Header, lossy: bool) -> np.ndarray:
    """Where a decoded file shows a defect, shape as Pillow gives it."""
    if header.bits > 8 and not image.mode.startswith("I;16"):
        msg = "more than 8 bits a channel in color; save it as gray of 8 bits, black and white"
        raise PhotoError(msg)
    image.load()
    least = 127 if lossy else 0
    if image.mode.startswith("I;16") or (image.mode in ("1", "L") and "transparency" not in image.info):
        return np.greater(np.asarray(image), least)
    values = np.asarray(image.convert("RGBA"))
    colors = values[..., :3]
    opaque: np.ndarray = values[..., 3] > 0
    shown = np.logical_or.reduce(colors > least, axis=2)
    if not opaque.all() and (colors == colors[0, 0]).all():
        return opaque
    if not opaque.all() and opaque.any():
        return shown & opaque
    if image.mode == "P" and (shown.all() or not shown.any()):
        indices = np.asarray(image)
        return shown if (indices == indices[0, 0]).all() else np.greater(indices, 0)
    return shown


def _check_shape(stored: np.ndarray, photo: Header) -> None:
    height, width = photo.stored
    if stored.shape != (height, width):
        msg = (
            f"{stored.shape[1]} x {stored.shape[0]} pixels, while its photo has {width} x {height}; draw it on the "
            "photo as it is stored, not turned and not resized"
        )
        raise PhotoError(msg)


def _reduced(mask: np.ndarray, reduction: int) -> np.ndarray:
    """A mask for a photo of which squares of pixels were averaged: a square with a defect is defective."""
    if reduction <= 1:
        return mask
    rows = np.logical_or.reduceat(mask, np.arange(0, len(mask), reduction), axis=0)
    return np.logical_or.reduceat(rows, np.arange(0, rows.shape[1], reduction), axis=1)


def check_masks(samples: DataFrame, name: str, as_anomalib: bool = False) -> DataFrame:
    """Check the masks of defective photos before anything is computed.

    Args:
        samples (DataFrame): anomalib's columns; ``mask_path`` is empty, or no text, where there is no mask.
        name (str): What the photos show, for the messages.
        as_anomalib (bool): Also refuse masks of which anomalib's own data sets read other pixels.

    Returns:
        DataFrame: The samples, where empty masks are no masks.

    Raises:
        PhotoError: If some cannot be used; the message names up to five of them.
    """
    if "mask_path" not in samples:
        return samples
    has_mask = samples.mask_path.map(lambda path: isinstance(path, str) and path != "")
    rows = samples[has_mask & (samples.label_index == LabelName.ABNORMAL)]
    problems, empty = [], []
    pairs = list(zip(rows.image_path, rows.mask_path, strict=True))
    console = Console(stderr=True)
    for photo, mask in track(pairs, "Checking masks", console=console, transient=True, disable=len(pairs) < FEW):
        if mask_may_be_turned(photo, mask):
            problems.append(f"{photo}: {TURNED}")
            continue
        try:
            pixels = read_mask(mask, read_header(photo))
            if as_anomalib and pixels.any() and not _read_alike(mask, pixels):
                problems.append(f"{mask}: anomalib's own data sets read other pixels of it; save it as gray PNG")
            elif not pixels.any():
                empty.append(mask)
        except PhotoError as error:  # all of them are named
            problems.append(f"{mask}: {error}")
    shared = rows[rows.duplicated("mask_path", keep=False)].groupby("mask_path").image_path
    problems += [f"{mask}: it is of several photos ({', '.join(photos)}); rename these" for mask, photos in shared]
    refuse(problems, f"masks of {name}")
    if empty:
        logger.warning("%s: %d masks show no defect, and count as missing: %s.", name, len(empty), listed(empty))
    return samples.assign(mask_path=samples.mask_path.where(~samples.mask_path.isin(empty), ""))


def _read_alike(path: str, pixels: np.ndarray) -> bool:
    read = np.asarray(read_by_anomalib(path, as_tensor=True))
    return read.shape == pixels.shape and bool(((read > 0) == pixels).all())


def listed(paths: Sequence[str]) -> str:
    """The first few of some files."""
    more = f", and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(paths[:SHOWN]) + more
