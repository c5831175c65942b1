# SPDX-License-Identifier: Apache-2.0

"""Photos: which files are taken, which can be used, how they are read, and which are the same photo.

One rule for training, evaluation and the edge: 8 bits a channel, converted to RGB by Pillow (gray is repeated, alpha is
dropped), pixels as they are stored (an EXIF orientation is not applied, as in anomalib's data sets). Only the formats
of :data:`FORMATS` are decoded, whatever a file is called.
"""

import hashlib
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

# Smaller photos hold no patches to speak of: a 1-pixel file blown up to the input size is a flat color.
SMALLEST_SIDE = 8
# Decoded, such a photo takes 150 MB, and four times as much while it is resized.
MOST_PIXELS = 50_000_000
EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "LAB", "HSV"}
EXTENSIONS = {".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
HEAD = 512  # bytes of a file that tell how deep its pixels are
# Folders of operating systems and storage devices, beside those whose names begin with a dot.
SYSTEM_FOLDERS = {"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN"}
UNREADABLE = (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError)

logger = logging.getLogger(__name__)

Photo: TypeAlias = "str | Path | np.ndarray | Image.Image"


class PhotoError(ValueError):
    """A photo cannot be used; the message says why."""


@dataclass(frozen=True)
class Reference:
    """A good photo of which a bank holds features: its name, and the SHA-256 of its content."""

    name: str
    sha256: str


def content_hash(path: Path | str) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# -- which photos are there -------------------------------------------------------------------------------------------


def is_photo_file(path: Path) -> bool:
    """Whether a file is taken for a photo, by its extension."""
    return path.suffix.lower() in EXTENSIONS and path.is_file()


def is_hidden(path: Path) -> bool:
    """Whether a file, or a folder that it is in, is none of the user's photos; the path is relative to their folder."""
    return any(part.startswith(".") or part in SYSTEM_FOLDERS for part in path.parts)


def list_photos(source: str | Path | Iterable[str | Path]) -> list[Path]:
    """The photos of a folder and of the folders in it, sorted by name; a list of files is taken as it is.

    Hidden files and folders are left out, and files of other formats; one line of the log counts them.

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
    found, left_out = [], Counter[str]()
    for path in sorted(folder.rglob("*")):
        if is_hidden(path.relative_to(folder)):
            left_out["hidden"] += is_photo_file(path)
        elif is_photo_file(path):
            found.append(path)
        elif path.is_file():
            left_out[path.suffix.lower() or "without an extension"] += 1
    if left_out.total():
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()) if count)
        logger.warning("%s: files that are no photos were left out: %s.", folder, counts)
    if not found:
        msg = f"{folder} holds no photo. Put photos of one product there ({', '.join(sorted(EXTENSIONS))})."
        raise PhotoError(msg)
    return found


def by_content(references: Iterable[Reference]) -> tuple[Reference, ...]:
    """Order photos by content; of identical ones the first name is kept.

    What is made of photos then depends on the photos alone, not on how they are called or listed.
    """
    unique = {each.sha256: each for each in sorted(references, key=lambda each: each.name, reverse=True)}
    return tuple(unique[digest] for digest in sorted(unique))


# -- reading ----------------------------------------------------------------------------------------------------------


def photo_problem(path: Path | str, decode: bool = False) -> str | None:
    """Say what makes a photo unusable, or ``None``.

    Grayscale, palette and alpha images are fine: they are converted to RGB, as anomalib does. Deeper images are not:
    that conversion clips them to white, or takes their high bytes alone. Nor are several pages or frames in one file.

    Args:
        path (Path | str): The file.
        decode (bool): Also decode the pixels, which finds truncated files; the header alone is much cheaper.
    """
    try:
        with warnings.catch_warnings(), Path(path).open("rb") as file, Image.open(file, formats=FORMATS) as image:
            warnings.simplefilter("ignore")
            file.seek(0)
            problem = _header_problem(image, file.read(HEAD))
            if problem is None and decode:
                image.load()
            return problem
    except FileNotFoundError:
        return "no such file"
    except UNREADABLE as error:
        return f"unreadable ({error})"


def _header_problem(image: Image.Image, head: bytes = b"") -> str | None:
    bits = bits_per_channel(image, head)
    if image.mode not in EIGHT_BIT_MODES or bits > 8:
        depth = f"{bits} bits" if bits > 8 else f"{image.mode} pixels"
        same = "all photos of a product by the same factor"
        return f"more than 8 bits a channel ({depth}); convert it to 8 bits, {same}"
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a JPEG with a preview: the first picture is the photo
        return f"{frames} pages or frames; save the one to be used in a file of its own"
    if min(image.size) < SMALLEST_SIDE:
        return f"{image.width} x {image.height} pixels, the least is {SMALLEST_SIDE} x {SMALLEST_SIDE}"
    if image.width * image.height > MOST_PIXELS:
        return f"{image.width} x {image.height} pixels, the most is {MOST_PIXELS:,}; make it smaller"
    return None


def bits_per_channel(image: Image.Image, head: bytes) -> int:
    """Depth that a file states itself; Pillow decodes deep colors to their high bytes and calls the result RGB.

    Args:
        image (Image.Image): The opened file.
        head (bytes): Its first :data:`HEAD` bytes; none for images that are no files.
    """
    if image.format == "PNG" and len(head) > 24:
        return head[24]
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,)))  # type: ignore[attr-defined]  # BitsPerSample
    if image.format == "PPM" and head[:2] in (b"P2", b"P3", b"P5", b"P6"):
        _, _, _, largest = re.sub(rb"#[^\n]*", b"", head).split()[:4]
        return int(largest).bit_length()
    return 8


def read_pixels(photo: Photo) -> np.ndarray:
    """Read a photo as RGB, uint8, shape ``(H, W, 3)``.

    Args:
        photo (Photo): A file, a Pillow image, or an array of uint8 with shape ``(H, W)`` or ``(H, W, 3)``.

    Raises:
        PhotoError: If it cannot be used.
    """
    return identify(photo)[1] if isinstance(photo, str | Path) else _pixels_of(photo, "the image")


def identify(photo: Photo) -> tuple[Reference, np.ndarray]:
    """Read a photo, and name it by its content: by a file's bytes, from which it is decoded too, else by the pixels.

    Raises:
        PhotoError: If it cannot be used.
    """
    if isinstance(photo, str | Path):
        try:
            content = Path(photo).read_bytes()
        except FileNotFoundError:
            msg = f"{photo}: no such file."
            raise PhotoError(msg) from None
        except OSError as error:
            msg = f"{photo}: unreadable ({error})."
            raise PhotoError(msg) from error
        return Reference(Path(photo).name, hashlib.sha256(content).hexdigest()), _pixels_of(content, str(photo))
    pixels = _pixels_of(photo, "the image")
    digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    return Reference(f"pixels-{digest[:12]}", digest), pixels


def _pixels_of(photo: bytes | np.ndarray | Image.Image, name: str) -> np.ndarray:
    if isinstance(photo, np.ndarray):
        return _checked_array(photo)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(photo), formats=FORMATS) if isinstance(photo, bytes) else photo
            problem = _header_problem(image, photo[:HEAD] if isinstance(photo, bytes) else b"")
            if problem is None:
                return np.asarray(image.convert("RGB"))
    except UNREADABLE as error:
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


def read_references(photos: Iterable[Photo]) -> dict[Reference, np.ndarray]:
    """Read the photos that a bank is to be made of, all of them before anything is computed.

    Returns:
        dict[Reference, np.ndarray]: Pixels of each photo, ordered by content, identical ones once.

    Raises:
        PhotoError: If some cannot be used; the message names up to five of them.
    """
    read: dict[Reference, np.ndarray] = {}
    problems = []
    for photo in photos:
        try:
            reference, pixels = identify(photo)
            read[reference] = pixels
        except PhotoError as error:  # noqa: PERF203  # all of them are named
            problems.append(str(error).rstrip("."))
    _refuse(problems, "reference photos")
    return {reference: read[reference] for reference in by_content(read)}


def check_photos(paths: Iterable[Path | str], purpose: str, decode: bool = False) -> None:
    """Check photos before anything is computed from them.

    Args:
        paths (Iterable[Path | str]): The files.
        purpose (str): What they are for, for the message ("source images").
        decode (bool): Also decode the pixels.

    Raises:
        PhotoError: If some are unusable; the message names up to five of them.
    """
    problems = [(path, photo_problem(path, decode)) for path in paths]
    _refuse([f"{path}: {problem}" for path, problem in problems if problem is not None], purpose)


def _refuse(problems: Sequence[str], purpose: str) -> None:
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        msg = f"{len(problems)} of the {purpose} cannot be used. {'; '.join(problems[:5])}{more}. "
        raise PhotoError(msg + "Repair or remove these files.")
