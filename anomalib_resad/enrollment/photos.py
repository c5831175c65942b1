# SPDX-License-Identifier: Apache-2.0

"""Photos: which files are taken, which can be used, and which are the same photo.

How one is decoded is told in :mod:`anomalib_resad.enrollment.decoding`.
"""

import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from anomalib_resad.enrollment.decoding import (
    AS_STORED,
    FORMATS,
    HEAD,
    SMALLEST_SIDE,
    BitDepth,
    Header,
    PhotoError,
    check_same_depth,
    decode_photo,
    depth_of,
    header_of,
    scaled,
    unreadable,
)
from anomalib_resad.enrollment.files import earlier_maps, files_below

EXTENSIONS = {".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
# Folders of operating systems and storage devices, in lower case, beside those whose names begin with a dot.
SYSTEM_FOLDERS = {"@eadir", "#recycle", "#snapshot", "@recycle", "lost+found", "__macosx", "$recycle.bin"}
SYSTEM_FOLDERS |= {"system volume information"}

logger = logging.getLogger(__name__)

Photo: TypeAlias = "str | Path | bytes | np.ndarray | Image.Image"


@dataclass(frozen=True)
class Reference:
    """A good photo of which a bank holds features: its name, and the SHA-256 of its content."""

    name: str
    sha256: str


# -- which photos are there -------------------------------------------------------------------------------------------


def is_photo_file(path: Path) -> bool:
    """Whether a file is taken for a photo, by its extension."""
    return path.suffix.lower() in EXTENSIONS and path.is_file()


def is_hidden(path: Path) -> bool:
    """Whether a file, or a folder that it is in, is none of the user's photos; the path is relative to their folder."""
    return any(part.startswith(".") or part.lower() in SYSTEM_FOLDERS for part in path.parts)


def list_photos(source: str | Path | Iterable[str | Path]) -> list[Path]:
    """The photos of a folder and of the folders in it, linked ones too, sorted by name; a list is taken as it is.

    Hidden files and folders are left out, files of other formats, and maps that `resad predict` wrote; one line of the
    log counts them.

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
    found, left_out, maps = [], Counter[str](), earlier_maps(folder)
    for path in files_below(folder):
        hidden = is_hidden(path.relative_to(folder))
        if hidden or maps.intersection(path.parents):
            left_out["hidden" if hidden else "maps of earlier results"] += is_photo_file(path)
        elif is_photo_file(path):
            found.append(path)
        else:
            left_out[(path.suffix.lower() or "without an extension") if path.is_file() else "links to nothing"] += 1
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


def read_header(path: Path | str) -> Header:
    """What a file says of its picture, without decoding it.

    Raises:
        PhotoError: If it cannot be a photo, whatever is wrong with it.
    """
    try:
        with warnings.catch_warnings(), Path(path).open("rb") as file, Image.open(file, formats=FORMATS) as image:
            warnings.simplefilter("ignore")
            file.seek(0)
            return header_of(image, file.read(HEAD))
    except PhotoError:
        raise
    except FileNotFoundError:
        msg = "no such file"
        raise PhotoError(msg) from None
    except Exception as error:
        raise unreadable(error) from error


def is_read_alike(path: Path | str) -> bool:
    """Whether anomalib's own reading gives the same pixels; what is no file is not read here.

    Raises:
        PhotoError: If it cannot be a photo.
    """
    return not Path(path).is_file() or read_header(path).is_plain


def mask_may_be_turned(path: Path | str, mask: Path | str) -> bool:
    """Whether a photo is to be shown turned (EXIF, TIFF), and the size of its mask does not tell which way that is.

    Photos are read as they are stored. Some tools that draw masks show them turned, and save the mask so.
    """
    try:
        with Image.open(path, formats=FORMATS) as image, Image.open(mask) as drawn:
            known = image.format == "TIFF" or "exif" in image.info  # else Pillow looks behind the pixels of a PNG
            orientation = image.getexif().get(274, 1) if known else 1
            stored = image.size if image.format != "TIFF" or orientation < 5 else image.size[::-1]
            sides_swapped = orientation >= 5 and stored[0] != stored[1]
            return orientation in AS_STORED and not (sides_swapped and drawn.size == stored)
    except Exception:  # noqa: BLE001  # Pillow raises whatever a damaged file leads to; other checks say so
        return False


def photo_problem(
    path: Path | str, decode: bool = False, bit_depth: BitDepth | None = "auto", exact: bool = False
) -> str | None:
    """Say what makes a photo unusable, or ``None``.

    Args:
        path (Path | str): The file.
        decode (bool): Also decode the pixels, which finds truncated files; the header alone is much cheaper.
        bit_depth (BitDepth | None): As of :func:`read_pixels`; ``None`` leaves it open.
        exact (bool): Refuse other depths than ``bit_depth``.
    """
    try:
        header = read_header(path)
        if bit_depth is not None:
            depth = depth_of(header, bit_depth)
            check_same_depth(depth, bit_depth if exact and bit_depth != "auto" else depth)
        if decode:
            decode_photo(_content_of(path), "auto" if bit_depth is None else bit_depth)
    except PhotoError as error:
        return str(error)
    return None


def read_pixels(photo: Photo, bit_depth: BitDepth = "auto") -> np.ndarray:
    """Read a photo as RGB, uint8, shape ``(H, W, 3)``.

    Args:
        photo (Photo): A file, the content of one, a Pillow image, or an array of shape ``(H, W)`` or ``(H, W, 3)``,
            uint8, or uint16 of a given depth.
        bit_depth (BitDepth): Bits of a channel that files of more than 8 bits use, or ``"auto"``: what each one states.

    Raises:
        PhotoError: If it cannot be used.
    """
    return identify(photo, bit_depth)[1]


def read_like(photo: Photo, bit_depth: int) -> np.ndarray:
    """Read a photo of a product whose photos have that depth; the rest as of :func:`read_pixels`.

    Raises:
        PhotoError: If it cannot be used, or has another depth.
    """
    _, pixels, depth = identify(photo, bit_depth)
    try:
        check_same_depth(depth, bit_depth)
    except PhotoError as error:
        msg = f"{name_of(photo)}: {error}."
        raise PhotoError(msg) from error
    return pixels


def identify(photo: Photo, bit_depth: BitDepth = "auto") -> tuple[Reference, np.ndarray, int]:
    """Read a photo, and name it by its content: by a file's bytes, from which it is decoded too, else by the pixels.

    Returns:
        tuple[Reference, np.ndarray, int]: Name, pixels as of :func:`read_pixels`, and their bit depth.

    Raises:
        PhotoError: If it cannot be used.
    """
    try:
        if isinstance(photo, str | Path | bytes):
            content = photo if isinstance(photo, bytes) else _content_of(photo)
            digest = hashlib.sha256(content).hexdigest()
            name = f"photo-{digest[:12]}" if isinstance(photo, bytes) else Path(photo).name
            return (Reference(name, digest), *decode_photo(content, bit_depth))
        pixels, depth = (
            _checked_array(photo, bit_depth) if isinstance(photo, np.ndarray) else decode_photo(photo, bit_depth)
        )
    except PhotoError as error:
        msg = f"{name_of(photo)}: {error}."
        raise PhotoError(msg) from error
    digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    return Reference(f"pixels-{digest[:12]}", digest), pixels, depth


def name_of(photo: Photo) -> str:
    """What to call a photo in a message."""
    return str(photo) if isinstance(photo, str | Path) else "the image"


def _content_of(path: Path | str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        msg = "no such file"
        raise PhotoError(msg) from None
    except OSError as error:
        msg = f"unreadable ({error})"
        raise PhotoError(msg) from error


def _checked_array(array: np.ndarray, bit_depth: BitDepth) -> tuple[np.ndarray, int]:
    color = array.ndim == 3 and array.shape[2] == 3
    deep = array.dtype == np.uint16 and bit_depth not in ("auto", 8)
    if not (deep or array.dtype == np.uint8) or not (color or array.ndim == 2) or min(array.shape[:2]) < SMALLEST_SIDE:
        msg = (
            f"an array of {array.dtype} with shape {array.shape} is no photo. Pass uint8, or uint16 of a bit_depth, "
            f"(H, W, 3) in the order red, green, blue, or (H, W), of at least {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels"
        )
        raise PhotoError(msg)
    depth = int(bit_depth) if deep else 8
    values = scaled(array, depth) if deep else np.ascontiguousarray(array)
    return decode_photo(Image.fromarray(values), 8)[0], depth  # a large one is reduced as a file is


def check_photos(
    paths: Iterable[Path | str],
    purpose: str,
    decode: bool = False,
    bit_depth: BitDepth | None = None,
    exact: bool = False,
) -> None:
    """Check photos before anything is computed from them.

    Args:
        paths (Iterable[Path | str]): The files.
        purpose (str): What they are for, for the message ("source images").
        decode (bool): Also decode the pixels.
        bit_depth (BitDepth | None): As of :func:`photo_problem`.
        exact (bool): The same.

    Raises:
        PhotoError: If some are unusable; the message names up to five of them.
    """
    problems = [(path, photo_problem(path, decode, bit_depth, exact)) for path in paths]
    refuse([f"{path}: {problem}" for path, problem in problems if problem is not None], purpose)


def refuse(problems: Sequence[str], purpose: str) -> None:
    """Name up to five of the files that cannot be used.

    Raises:
        PhotoError: If there are any.
    """
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        msg = f"{len(problems)} of the {purpose} cannot be used. {'; '.join(problems[:5])}{more}. "
        raise PhotoError(msg + "Repair or remove these files.")
