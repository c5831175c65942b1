# SPDX-License-Identifier: Apache-2.0

"""Source photos on their way into training: those whose features are kept are not read again.

The loader's worker processes decode the other photos; a batch then holds photos as they are, not yet resized to the
model's input, and paths alone where nothing needs to be decoded.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import AnomalibDataset, ImageItem
from anomalib.data.utils import LabelName
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import Compose, Resize
from torchvision.tv_tensors import Mask

from anomalib_resad.enrollment.decoding import BitDepth
from anomalib_resad.enrollment.image_size import Size
from anomalib_resad.enrollment.photos import is_read_alike
from anomalib_resad.reference_rows import read_photo

WHOLE = "data"  # category of datamodules that have only one


@dataclass
class SourcePhoto:
    """A photo, decoded, or only its path.

    Attributes:
        path (str): The file.
        label (int): 1 if it is defective.
        image (Tensor | None): RGB in 0..1, shape ``(3, H, W)``; ``None`` if it was not decoded.
        mask (Tensor | None): Where it is defective, shape ``(H, W)``; ``None`` for good photos, and where not decoded.
    """

    path: str
    label: int
    image: Tensor | None = None
    mask: Tensor | None = None


@dataclass
class SourceBatch:
    """A batch of source photos of any sizes.

    Attributes:
        photos (list[SourcePhoto]): The photos.
        image (None): anomalib's pre-processor looks for it, and finds nothing to do: photos are prepared one by one.
        gt_mask (None): The same.
    """

    photos: list[SourcePhoto] = field(default_factory=list)
    image: None = None
    gt_mask: None = None


def category_of(dataset: AnomalibDataset) -> dict[str, str]:
    """Category of each photo of a data set."""
    samples = dataset.samples
    categories = samples.category if "category" in samples else [WHOLE] * len(samples)
    return dict(zip(samples.image_path, categories, strict=True))


def augments(dataset: AnomalibDataset) -> bool:
    """Whether a data set changes its images at random; anomalib adds the model's own resizing, which does not."""
    transform = getattr(dataset, "augmentations", None)
    steps = transform.transforms if isinstance(transform, Compose) else [transform]
    return any(step is not None and not isinstance(step, Resize) for step in steps)


def without_resize(dataset: AnomalibDataset) -> AnomalibDataset:
    """The same data set, without the model's own resizing that anomalib added."""
    transform = getattr(dataset, "augmentations", None)
    steps = transform.transforms if isinstance(transform, Compose) else [transform]
    kept = [step for step in steps if step is not None and not isinstance(step, Resize)]
    plain = copy.copy(dataset)
    plain.augmentations = Compose(kept) if kept else None
    return plain


class SourcePhotos(Dataset):
    """A data set of anomalib whose items are :class:`SourcePhoto`, decoded only where that is needed.

    Everything else is the data set's own.

    Args:
        dataset (AnomalibDataset): The data set.
        bit_depth (BitDepth): Bits of a channel that files of more than 8 bits use.

    Attributes:
        kept (set[str] | None): Photos that need no decoding; ``None``, before training starts, for all of them.
        sizes (Mapping[str, Size]): By category, height and width that photos are resized to; of others the data set
            decides.
    """

    def __init__(self, dataset: AnomalibDataset, bit_depth: BitDepth = "auto") -> None:
        self.dataset = dataset
        self.sizes: Mapping[str, Size] = {}
        self.bit_depth = bit_depth
        self.kept: set[str] | None = None
        self._index = {path: index for index, path in enumerate(dataset.samples.image_path)}
        self._category = category_of(dataset)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """What the data set has."""
        if name.startswith("__") or name == "dataset":  # not there yet while a worker process unpickles it
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        """Number of photos."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> SourcePhoto:
        """One photo, decoded if it has to be."""
        sample = self.dataset.samples.iloc[index]
        path = str(sample.image_path)
        if self.kept is None or path in self.kept:
            return SourcePhoto(path, int(sample.label_index))
        return self.read(path)

    def size_of(self, path: str) -> Size | None:
        """Height and width that a photo is resized to; ``None`` where the data set decides."""
        return self.sizes.get(self._category[path])

    def mask_path(self, path: str) -> str:
        """The file of a photo's mask; empty if there is none."""
        mask = self.dataset.samples.iloc[self._index[path]].get("mask_path")
        return str(mask) if isinstance(mask, str | Path) and Path(mask).is_file() else ""

    def read(self, path: str) -> SourcePhoto:
        """One photo by its path, decoded by the data set itself.

        Raises:
            ValueError: If it is defective and has no mask.
        """
        size = self.size_of(path)
        item = cast("ImageItem", (self.dataset if size is None else without_resize(self.dataset))[self._index[path]])
        label = int(item.gt_label) if item.gt_label is not None else int(LabelName.NORMAL)
        if label == LabelName.ABNORMAL and item.gt_mask is None:
            msg = f"{path} is defective and has no mask. Train with CrossCategory, which leaves such images out."
            raise ValueError(msg)
        mask = item.gt_mask if label == LabelName.ABNORMAL else None
        plain = is_read_alike(path)  # else anomalib's own data sets read other pixels
        image = torch.as_tensor(item.image) if plain else read_photo(path, self.bit_depth)
        if size is not None:
            resize = Resize(size, antialias=True)
            image, mask = resize(image), None if mask is None else resize(Mask(mask))
        return SourcePhoto(path, label, image, mask)

    @staticmethod
    def collate_fn(photos: Sequence[SourcePhoto]) -> SourceBatch:
        """Photos of different sizes are no tensor."""
        return SourceBatch(list(photos))
