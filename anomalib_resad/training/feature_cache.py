# SPDX-License-Identifier: Apache-2.0

"""Features of training images, computed once: the backbone is frozen."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from anomalib_resad.method.features import Features, as_list


class Picture(NamedTuple):
    """A photo as training sees it, or its painted version.

    Attributes:
        features (Features): Its features, a batch of one.
        mask (Tensor): Where it is defective, bool, shape ``(H, W)``.
    """

    features: Features
    mask: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.mask.nbytes + sum(level.nbytes for level in as_list(self.features))


class FeatureCache:
    """Features of photos by path, and of their painted versions, kept as long as there is room.

    What is kept stays: training reads all photos once per epoch, so that dropping the oldest would drop each just
    before it is read again.

    Args:
        max_bytes (int): Most bytes kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._kept: dict[tuple[str, bool], Picture] = {}

    def __len__(self) -> int:
        """Number of pictures kept."""
        return len(self._kept)

    def __str__(self) -> str:
        """How much is kept."""
        return f"{len(self)} training pictures ({self.bytes / 1e9:.2f} of at most {self.max_bytes / 1e9:g} GB)"

    def get(self, path: str, painted: bool = False) -> Picture | None:
        """What is kept of a photo, or of its painted version."""
        return self._kept.get((path, painted))

    def put(self, path: str, picture: Picture, painted: bool = False) -> bool:
        """Keep a picture if there is room; whether it is kept."""
        if (path, painted) in self._kept:
            return True
        if self.bytes + picture.nbytes > self.max_bytes:
            return False
        self._kept[path, painted] = picture
        self.bytes += picture.nbytes
        return True

    def replace_keys(self, keys_of: Callable[[Tensor], Tensor]) -> None:
        """Compute all keys anew from the levels, after the directions of the keys were learned.

        Args:
            keys_of (Callable[[Tensor], Tensor]): Makes keys of joined levels, `JoinedLevels.keys_of`.
        """
        for name, picture in self._kept.items():
            values = picture.features.values
            self._kept[name] = picture._replace(features=Features(values, keys_of(values[0])))

    def clear(self) -> None:
        """Free the memory."""
        self._kept.clear()
        self.bytes = 0
