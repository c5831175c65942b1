# SPDX-License-Identifier: Apache-2.0

"""Features of training images, computed once: the backbone is frozen."""

from collections.abc import Callable

from torch import Tensor

from anomalib_resad.method.features import Features
from anomalib_resad.training.picture_files import Picture, PictureFiles


class FeatureCache:
    """Features of photos by path, and of their painted versions: in memory while there is room, and in files.

    What is kept stays: training reads all photos once per epoch, so that dropping the oldest would drop each just
    before it is read again.

    Args:
        max_bytes (int): Most bytes kept in memory.

    Attributes:
        files (PictureFiles | None): The files; without them what there is no room for is not kept.
        with_keys (Callable[[Tensor], Features] | None): Makes keys of joined levels, which files do not hold.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.files: PictureFiles | None = None
        self.with_keys: Callable[[Tensor], Features] | None = None
        self.bytes = 0
        self._kept: dict[tuple[str, bool], Picture] = {}
        self._names: dict[tuple[str, bool], str] = {}  # of what lies in files
        self._full = False

    def __len__(self) -> int:
        """Number of pictures kept in memory."""
        return len(self._kept)

    def __str__(self) -> str:
        """How much is kept."""
        memory = f"{len(self)} training pictures ({self.bytes / 1e9:.2f} of at most {self.max_bytes / 1e9:g} GB)"
        return memory if self.files is None else f"{memory} in memory, and of {len(self._names)} in {self.files.folder}"

    def get(self, path: str, painted: bool = False) -> Picture | None:
        """What is kept of a photo, or of its painted version."""
        found, name = self._kept.get((path, painted)), self._names.get((path, painted))
        if found is None and self.files is not None and name is not None:
            found = self.files.read(name)
            return found if found is None else self._with_keys(found)
        return found

    def put(self, path: str, picture: Picture, painted: bool = False, name: str | None = None) -> bool:
        """Keep a picture; whether it is kept.

        Args:
            path (str): The photo.
            picture (Picture): The picture.
            painted (bool): Whether it is the painted version.
            name (str | None): Its name among the files; without one it is kept in memory alone.
        """
        in_file = self.files is not None and name is not None and self.files.write(name, picture)
        if in_file and name is not None:
            self._names[path, painted] = name
        if (path, painted) in self._kept:
            return True
        if self.bytes + picture.nbytes > self.max_bytes:
            self._full = True
            return in_file
        self._kept[path, painted] = picture
        self.bytes += picture.nbytes
        return True

    def take(self, path: str, painted: bool, name: str) -> bool:
        """Take over what a file holds; whether it can be used. It is only read while there is room."""
        if self._full:
            self._names[path, painted] = name
            return True
        found = None if self.files is None else self.files.read(name)
        return found is not None and self.put(path, self._with_keys(found), painted, name)

    def replace_keys(self) -> None:
        """Compute all keys anew from the levels, after the directions of the keys were learned."""
        self._kept = {name: self._with_keys(picture) for name, picture in self._kept.items()}

    def clear(self) -> None:
        """Free the memory, and forget the files."""
        self.files, self.with_keys = None, None
        self._kept.clear()
        self._names.clear()
        self.bytes, self._full = 0, False

    def _with_keys(self, picture: Picture) -> Picture:
        if self.with_keys is None:
            return picture
        return picture._replace(features=self.with_keys(picture.features.values[0]))
