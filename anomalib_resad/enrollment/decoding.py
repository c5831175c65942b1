# SPDX-License-Identifier: Apache-2.0

"""One picture file to pixels: which formats, how deep, how large, and which way up.

One rule for training, evaluation and the edge: converted to RGB by Pillow (gray is repeated, alpha is dropped), pixels
as they are stored: an orientation (EXIF, TIFF) is not applied. Only the formats of :data:`FORMATS` are decoded,
whatever a file is called. Values of more than 8 bits are scaled so that the largest one of the photos' bit depth
becomes 255. What is refused is refused before it is decoded, where the header tells.
"""

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

BitDepth: TypeAlias = int | Literal["auto"]

FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "LAB", "HSV"}
HEAD = 4096  # bytes of a file that tell how deep its pixels are
# Smaller photos hold no patches to speak of: a 1-pixel file blown up to the input size is a flat color.
SMALLEST_SIDE = 8
MOST_PIXELS = 50_000_000  # 150 MB once it is decoded
# Of larger photos the mean of 2 x 2 pixels is taken, or of 3 x 3: models see far fewer, and memory stays below 1 GB.
MOST_KEPT = 16_000_000
# Of a longer photo, what is as long as the photo is wide becomes less than one patch of the usual input sizes.
LONGEST = 50  # times as long as wide
# How Pillow and OpenCV turn a TIFF of each orientation is undone.
AS_STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda turned: turned[:, ::-1],
    3: lambda turned: turned[::-1, ::-1],
    4: lambda turned: turned[::-1],
    5: lambda turned: turned.swapaxes(0, 1),
    6: np.rot90,
    7: lambda turned: turned[::-1, ::-1].swapaxes(0, 1),
    8: lambda turned: np.rot90(turned, -1),
}


class PhotoError(ValueError):
    """A photo cannot be used; the message says why."""


def unreadable(error: Exception) -> PhotoError:
    """What to say of a file that no decoder takes, whatever it raised."""
    unknown = isinstance(error, UnidentifiedImageError)  # which names an object of Python's
    why = f"none of the formats {', '.join(FORMATS)}" if unknown else str(error) or type(error).__name__
    return PhotoError(f"unreadable ({why})")


@dataclass(frozen=True)
class Header:
    """What a file says of its picture, without decoding it.

    Attributes:
        width (int): Pixels, as anomalib and Pillow show it.
        height (int): The same.
        bits (int): Bits of a channel; 16 for any file that keeps a channel in 16 bits without saying how many it uses.
        turned (int): Orientation of a TIFF, by which Pillow turns it by itself; 1 for others.
        white (int | None): Largest value that a PPM states; ``None`` if it is that of all its bits, and for others.
    """

    width: int
    height: int
    bits: int
    turned: int
    white: int | None = None

    @property
    def reduction(self) -> int:
        """Width of the squares of pixels of which the mean is taken."""
        return int(np.ceil(np.sqrt(self.width * self.height / MOST_KEPT)))

    @property
    def is_shown_alike(self) -> bool:
        """Whether ``Image.open(...).convert("RGB")``, as anomalib reads photos, shows the same picture."""
        return self.bits <= 8 and self.turned not in AS_STORED

    @property
    def stored(self) -> tuple[int, int]:
        """Height and width of the pixels as they are stored."""
        return (self.width, self.height) if self.turned in (5, 6, 7, 8) else (self.height, self.width)

    @property
    def is_plain(self) -> bool:
        """Whether it gives the same pixels."""
        return self.is_shown_alike and self.reduction <= 1


def check_bit_depth(bit_depth: object) -> None:
    """Refuse what is no depth.

    Raises:
        ValueError: If it is neither ``"auto"`` nor 8 to 16.
    """
    if bit_depth != "auto" and not (type(bit_depth) is int and 8 <= bit_depth <= 16):
        msg = f"bit_depth={bit_depth!r} must be 'auto', or the bits of a channel that the camera gives: 8, 10, 12, 16."
        raise ValueError(msg)


def header_of(image: Image.Image, head: bytes) -> Header:
    """Read a header, and refuse what cannot be a photo.

    Args:
        image (Image.Image): The opened file, not yet decoded.
        head (bytes): Its first :data:`HEAD` bytes; none for images that are no files.

    Raises:
        PhotoError: If it is too small, too large, too long, of several pages, or its pixels are no integers.
    """
    width, height = image.size
    largest = _largest_value(head) if image.format == "PPM" else None
    bits = _bits_per_channel(image, head) if largest is None else largest.bit_length()
    white = None if largest is None or largest == (1 << bits) - 1 else largest
    frames = getattr(image, "n_frames", 1)
    if bits > 16 or (bits <= 8 and image.mode not in EIGHT_BIT_MODES):
        msg = f"{image.mode} pixels of {bits} bits have no largest value to be scaled by; convert it to 8 or 16 bits"
    elif frames > 1 and image.format != "MPO":  # a JPEG with a preview: the first picture is the photo
        msg = f"{frames} pages or frames; save the one to be used in a file of its own"
    elif min(width, height) < SMALLEST_SIDE:
        msg = f"{width} x {height} pixels, the least is {SMALLEST_SIDE} x {SMALLEST_SIDE}"
    elif max(width, height) > LONGEST * min(width, height):
        msg = f"{width} x {height} pixels, more than {LONGEST} times as long as wide; cut it into shorter pieces"
    elif width * height > MOST_PIXELS:
        msg = f"{width} x {height} pixels, the most is {MOST_PIXELS:,}; make it smaller"
    else:
        turned = image.tag_v2.get(274, 1) if image.format == "TIFF" else 1  # type: ignore[attr-defined]
        return Header(width, height, bits, turned, white)
    raise PhotoError(msg)


def _bits_per_channel(image: Image.Image, head: bytes) -> int:
    """Depth that a file states itself; Pillow decodes deep colors to their high bytes and calls the result RGB."""
    if image.format == "PNG" and len(head) > 24:
        return head[24]
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits = max(tags.get(258, (1,)))  # BitsPerSample
        kind, light = max(tags.get(339, (1,))), tags.get(262, 1)  # SampleFormat, PhotometricInterpretation
        if bits > 8 and (kind != 1 or light not in (1, 2)):
            msg = f"a TIFF of {bits} bits that is not plain gray or RGB; save it so"
            raise PhotoError(msg)
        return bits
    if image.mode.startswith("I;16"):
        return 16
    return 8 if image.mode in EIGHT_BIT_MODES else 32


def _largest_value(head: bytes) -> int | None:
    """Largest value of a PPM or PGM, which is white; ``None`` for a PBM, whose pixels are black or white."""
    if head[:2] not in (b"P2", b"P3", b"P5", b"P6"):
        return None
    found = re.match(rb"P.\s+\d+\s+\d+\s+(\d+)\s", re.sub(rb"#[^\r\n]*", b"", head))
    if found is None:
        msg = (
            f"a PPM whose largest value does not stand in its first {HEAD} bytes; remove its comments, or save it anew"
        )
        raise PhotoError(msg)
    return int(found[1])


def depth_of(header: Header, bit_depth: BitDepth) -> int:
    """How many bits of a channel a photo uses: 8 of any file that has no more.

    Args:
        header (Header): The photo's.
        bit_depth (BitDepth): What files of more than 8 bits use, or ``"auto"``: what they state.

    Raises:
        PhotoError: If a file states another depth, or none where none is given.
    """
    if header.bits <= 8:
        return 8
    same = "convert it to 8 bits, all photos of a product by the same factor"
    unsaid = header.bits == 16 and header.white is None
    if bit_depth == "auto":
        if unsaid:
            msg = (
                "more than 8 bits a channel, and a file of 16 bits does not say how many it uses; give the camera's "
                f"depth (bit_depth 12, or 16), or {same}"
            )
            raise PhotoError(msg)
        return header.bits
    if bit_depth == 8 or (header.bits != bit_depth and not unsaid):
        other = "or enroll the product from such photos"
        msg = f"more than 8 bits a channel ({header.bits} in the file), where {bit_depth} are expected; {same}, {other}"
        raise PhotoError(msg)
    return bit_depth


def check_same_depth(depth: int, expected: int) -> None:
    """Refuse a photo that was not taken as a product's other photos.

    Raises:
        PhotoError: If its depth is another.
    """
    if depth != expected:
        msg = (
            f"{depth} bits a channel, where {expected} are expected; take all photos of a product alike, or enroll it "
            "again from such photos"
        )
        raise PhotoError(msg)


def scaled(values: np.ndarray, depth: int, white: int | None = None) -> np.ndarray:
    """Values of more than 8 bits as uint8: 0 stays 0, and the largest one of that depth becomes 255.

    Args:
        values (np.ndarray): uint16, any shape.
        depth (int): Bits that are used.
        white (int | None): Largest value, where it is less than that of all these bits.

    Raises:
        PhotoError: If a value is larger, needs more bits, or none needs the four highest ones: then the depth is wrong.
    """
    white = (1 << depth) - 1 if white is None else white
    largest = int(values.max())
    if largest > white or largest < 1 << (depth - 4):
        fits = "are larger" if largest > white else "leave it nearly black"
        msg = f"values up to {largest} {fits} at {depth} bits a channel; give the depth that the camera has (bit_depth)"
        raise PhotoError(msg)
    return np.round(np.arange(white + 1) * (255 / white)).astype(np.uint8)[values]


def decode_photo(photo: bytes | Image.Image, bit_depth: BitDepth) -> tuple[np.ndarray, int]:
    """Decode a photo.

    Args:
        photo (bytes | Image.Image): Content of a file, or a Pillow image.
        bit_depth (BitDepth): As of :func:`depth_of`.

    Returns:
        tuple[np.ndarray, int]: Pixels, uint8, shape ``(H, W, 3)``, and the depth that they were scaled from.

    Raises:
        PhotoError: If it cannot be used, whatever is wrong with it.
    """
    content = photo if isinstance(photo, bytes) else b""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(photo), formats=FORMATS) if isinstance(photo, bytes) else photo
            header = header_of(image, content[:HEAD])
            depth = depth_of(header, bit_depth)
            if depth > 8:
                picture = Image.fromarray(scaled(_deep_values(image, content), depth, header.white))
            else:
                picture = image if image.mode in ("L", "RGB") else image.convert("RGB")
            if header.reduction > 1:
                picture = picture.reduce(header.reduction)
            pixels = np.asarray(picture.convert("RGB"))
    except PhotoError:
        raise
    except Exception as error:
        raise unreadable(error) from error
    return np.ascontiguousarray(AS_STORED.get(header.turned, np.asarray)(pixels)), depth


def _deep_values(image: Image.Image, content: bytes) -> np.ndarray:
    """Values of a deep photo, uint16, gray ``(H, W)`` or color ``(H, W, 3)``; a TIFF is turned by its orientation."""
    image.load()  # Pillow finds what is truncated; for colors it gives the high bytes alone
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    try:
        import cv2  # noqa: PLC0415  # comes with anomalib; devices need it for such photos alone
    except ModuleNotFoundError as error:
        msg = "more than 8 bits a channel in color, which needs OpenCV: pip install opencv-python-headless"
        raise PhotoError(msg) from error
    # OpenCV takes no number for whole that the file ends with, as those of a PPM in text may.
    content += b"\n" if content[:2] in (b"P2", b"P3") else b""
    values = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED) if content else None
    if values is None or values.dtype != np.uint16 or values.shape[:2] != image.size[::-1]:
        msg = "more than 8 bits a channel, and cannot be decoded at its full depth; save it as PNG of 16 bits"
        raise PhotoError(msg)
    return values[..., 2::-1] if values.ndim == 3 else values
