# SPDX-License-Identifier: Apache-2.0

"""Features of training images, computed once: the backbone is frozen."""

from torch import Tensor


class FeatureCache:
    """Features of photos by name, kept as long as there is room.

    What is kept stays: training reads all photos once per epoch, so that dropping the oldest would drop each just
    before it is read again.

    Args:
        max_bytes (int): Most bytes kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._kept: dict[str, list[Tensor]] = {}

    def __len__(self) -> int:
        """Number of photos kept."""
        return len(self._kept)

    def __str__(self) -> str:
        """How much is kept."""
        return f"{len(self)} training images ({self.bytes / 1e9:.2f} of at most {self.max_bytes / 1e9:g} GB)"

    def get(self, name: str) -> list[Tensor] | None:
        """What is kept under a name, if anything is."""
        return self._kept.get(name)

    def put(self, name: str, tensors: list[Tensor]) -> None:
        """Keep tensors, if there is room."""
        size = sum(tensor.nbytes for tensor in tensors)
        if name not in self._kept and self.bytes + size <= self.max_bytes:
            self._kept[name] = tensors
            self.bytes += size

    def clear(self) -> None:
        """Free the memory."""
        self._kept.clear()
        self.bytes = 0
