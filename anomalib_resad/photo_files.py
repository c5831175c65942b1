# SPDX-License-Identifier: Apache-2.0

"""Photo files: what can be used, how it is read, how it is named. Needs neither PyTorch nor anomalib.

One rule for training, evaluation and the edge: 8 bits a channel, converted to RGB by Pillow (gray is repeated, alpha is
dropped), pixels as they are stored (an EXIF orientation is not applied, as in anomalib's data sets).
"""

import hashlib
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

# Smaller photos hold no patches to speak of: a 1-pixel file blown up to the input size is a flat color.
SMALLEST_SIDE = 8
# Decoded, such a photo takes 150 MB, and four times as much while it is resized.
MOST_PIXELS = 50_000_000
EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "LAB", "HSV"}
EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}

Photo: TypeAlias = "str | Path | np.ndarray | Image.Image"


class PhotoError(ValueError):
    """A photo cannot be used; the message says why."""


def photo_problem(path: Path | str, decode: bool = False) -> str | None:
    """Say what makes a photo unusable, or ``None``.

    Grayscale, palette and alpha images are fine: they are converted to RGB, as anomalib does. 16-bit and float images
    are not: that conversion clips them to white.

    Args:
        path (Path | str): The file.
        decode (bool): Also decode the pixels, which finds truncated files; the header alone is much cheaper.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            problem = _header_problem(image)
            if problem is None and decode:
                image.load()
            return problem
    except FileNotFoundError:
        return "no such file"
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"unreadable ({error})"


def _header_problem(image: Image.Image) -> str | None:
    if image.mode not in EIGHT_BIT_MODES:
        return f"{image.mode} pixels (more than 8 bits a channel); convert it to 8 bits"
    if min(image.size) < SMALLEST_SIDE:
        return f"{image.width} x {image.height} pixels, the least is {SMALLEST_SIDE} x {SMALLEST_SIDE}"
    return None


def content_hash(path: Path | str) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_pixels(photo: Photo) -> np.ndarray:
    """Read a photo as RGB, uint8, shape ``(H, W, 3)``.

    Args:
        photo (Photo): A file, a Pillow image, or an array of uint8 with shape ``(H, W)`` or ``(H, W, 3)``.

    Raises:
        PhotoError: If it cannot be used.
    """
    if isinstance(photo, np.ndarray):
        return _checked_array(photo)
    name = "the image" if isinstance(photo, Image.Image) else str(photo)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = photo if isinstance(photo, Image.Image) else Image.open(photo)
            problem = _header_problem(image)
            if problem is None and image.width * image.height > MOST_PIXELS:
                problem = f"{image.width} x {image.height} pixels, the most is {MOST_PIXELS:,}; make it smaller"
            if problem is None:
                return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        problem = "no such file"
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        problem = f"unreadable ({error})"
    msg = f"{name}: {problem}."
    raise PhotoError(msg)


def _checked_array(array: np.ndarray) -> np.ndarray:
    color = array.ndim == 3 and array.shape[2] == 3
    if array.dtype != np.uint8 or not (color or array.ndim == 2) or min(array.shape[:2]) < SMALLEST_SIDE:
        msg = (
            f"An array of {array.dtype} with shape {array.shape} is no photo. Pass uint8, (H, W, 3) in the order red, "
            f"green, blue, or (H, W), of at least {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels."
        )
        raise PhotoError(msg)
    return np.ascontiguousarray(array if color else np.repeat(array[:, :, None], 3, axis=2))


def photo_identity(photo: Photo) -> tuple[str, str]:
    """Name and content hash of a photo: of a file's bytes, else of the pixels."""
    if isinstance(photo, str | Path):
        return Path(photo).name, content_hash(photo)
    pixels = read_pixels(photo)
    digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    return f"pixels-{digest[:12]}", digest


def photo_files(source: str | Path | Iterable[str | Path]) -> list[Path]:
    """The photos of a folder and of the folders in it, sorted by name; a list of files is taken as it is.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        PhotoError: If a folder holds no photo.
    """
    if not isinstance(source, str | Path):
        return [Path(each) for each in source]
    folder = Path(source)
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        msg = f"{folder} is neither a photo nor a folder of photos."
        raise FileNotFoundError(msg)
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    if not found:
        msg = f"{folder} holds no photo ({', '.join(sorted(EXTENSIONS))})."
        raise PhotoError(msg)
    return found
