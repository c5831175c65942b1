# SPDX-License-Identifier: Apache-2.0

"""The good photos that a bank is made of: checked all together, then decoded one at a time."""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from PIL import Image

from anomalib_resad.enrollment.decoding import FORMATS, HEAD, BitDepth, check_same_depth, header_of
from anomalib_resad.enrollment.image_size import Size
from anomalib_resad.enrollment.photos import Photo, PhotoError, Reference, by_content, identify, read_header, refuse


class References(Mapping[Reference, np.ndarray]):
    """Photos that were checked; each is decoded when it is used, so that one is in memory at a time.

    Attributes:
        bit_depth (int): Bits of a channel of all of them.
        sizes (list[Size]): Height and width of each.
    """

    def __init__(
        self, readers: Mapping[Reference, Callable[[], np.ndarray]], bit_depth: int, sizes: Sequence[Size]
    ) -> None:
        self._readers = readers
        self.bit_depth = bit_depth
        self.sizes = list(sizes)

    def seen(self, look: Callable[[np.ndarray], np.ndarray], sizes: Sequence[Size]) -> "References":
        """The same photos with other pixels, such as the box of a region, and the sizes of these."""
        readers = {each: partial(_seen, reader, look) for each, reader in self._readers.items()}
        return References(readers, self.bit_depth, sizes)

    def __getitem__(self, reference: Reference) -> np.ndarray:
        """Pixels of a photo, uint8, shape ``(H, W, 3)``.

        Raises:
            PhotoError: If the file changed since it was checked.
        """
        return self._readers[reference]()

    def __iter__(self) -> Iterator[Reference]:
        """The photos, ordered by content."""
        return iter(self._readers)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._readers)


def _read_again(photo: Photo, checked: Reference, bit_depth: int) -> np.ndarray:
    reference, pixels, _ = identify(photo, bit_depth)
    if reference.sha256 != checked.sha256:
        msg = f"{checked.name}: changed while it was enrolled. Enroll again."
        raise PhotoError(msg)
    return pixels


def _seen(reader: Callable[[], np.ndarray], look: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return look(reader())


def read_references(photos: Iterable[Photo], bit_depth: BitDepth = "auto") -> References:
    """Read the photos that a bank is to be made of, all of them before anything is computed.

    Args:
        photos (Iterable[Photo]): The photos.
        bit_depth (BitDepth): As of :func:`read_pixels`.

    Returns:
        References: The photos, ordered by content, identical ones once.

    Raises:
        PhotoError: If some cannot be used, the message names up to five of them; or if they differ in depth.
    """
    read: dict[Reference, Photo] = {}
    sizes: dict[Reference, Size] = {}
    depths: dict[int, Reference] = {}
    problems = []
    for photo in photos:
        try:
            reference, pixels, depth = identify(photo, bit_depth)
            read[reference] = photo
            sizes[reference] = (pixels.shape[0], pixels.shape[1])
            depths.setdefault(depth, reference)
        except PhotoError as error:  # noqa: PERF203  # all of them are named
            problems.append(str(error).rstrip("."))
    refuse(problems, "reference photos")
    if len(depths) > 1:
        examples = ", ".join(f"{each.name} has {depth} bits" for depth, each in sorted(depths.items()))
        msg = (
            f"The reference photos differ in their bits of a channel ({examples}). Take all photos of a product alike."
        )
        raise PhotoError(msg)
    depth = next(iter(depths), 8)
    if bit_depth != "auto" and depths:
        check_same_depth(depth, bit_depth)
    readers = {each: partial(_read_again, read[each], each, depth) for each in by_content(read)}
    return References(readers, depth, [sizes[each] for each in readers])


def size_of(photo: Photo) -> Size:
    """Height and width of a photo as it is stored; its pixels are fewer where it was made smaller to be read.

    Raises:
        PhotoError: If it cannot be a photo.
    """
    if isinstance(photo, np.ndarray):
        return photo.shape[0], photo.shape[1]
    if isinstance(photo, bytes):
        with Image.open(io.BytesIO(photo), formats=FORMATS) as image:
            return header_of(image, photo[:HEAD]).stored
    return (header_of(photo, b"") if isinstance(photo, Image.Image) else read_header(photo)).stored
