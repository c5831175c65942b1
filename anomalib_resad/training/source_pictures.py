# SPDX-License-Identifier: Apache-2.0

"""Source photos on their way to features: prepared in the loader's processes, encoded together, and kept."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.data.utils import LabelName
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import Resize
from torchvision.tv_tensors import Mask

from anomalib_resad.enrollment.draws import key_of
from anomalib_resad.method.features import Features
from anomalib_resad.pre_processor import with_size
from anomalib_resad.reference_rows import encode_photo, pre_process, read_photo
from anomalib_resad.torch_model import ResADModel
from anomalib_resad.training.feature_cache import FeatureCache
from anomalib_resad.training.picture_files import Picture, PictureFiles
from anomalib_resad.training.source_photos import SourcePhoto, SourcePhotos
from anomalib_resad.training.synthetic_defects import paint_photo

ENCODED = 8  # source photos that are encoded together, which is faster than one by one


@dataclass
class Prepared:
    """A photo, or its painted version, as the backbone takes it.

    Attributes:
        path (str): The photo.
        painted (bool): Whether it is the painted version.
        name (str | None): Its name among the files of the cache; ``None`` if it is in none.
        image (Tensor | None): Normalized, shape ``(1, 3, H, W)``; ``None`` if a file has its features.
        mask (Tensor | None): Where it is defective, bool, shape ``(H, W)``; ``None`` if a file has it.
    """

    path: str
    painted: bool
    name: str | None = None
    image: Tensor | None = None
    mask: Tensor | None = None


class Preparation(Dataset):
    """Prepares photos; its items are all versions of a photo, those without an image that a file has.

    Args:
        photos (SourcePhotos): The photos.
        pre_processor (nn.Module | None): What comes before the model.
        paints (bool): Whether good photos have a painted version.
        seed (int): Seed of the synthetic defects.
        files (PictureFiles | None): Files of the cache.
    """

    def __init__(
        self, photos: SourcePhotos, pre_processor: nn.Module | None, paints: bool, seed: int, files: PictureFiles | None
    ) -> None:
        self.photos = photos
        self.pre_processor = pre_processor
        self.paints = paints
        self.seed = seed
        self.files = files

    def __len__(self) -> int:
        """Number of photos."""
        return len(self.photos)

    def __getitem__(self, index: int) -> list[Prepared]:
        """A photo, and if it is good its painted version."""
        sample = self.photos.dataset.samples.iloc[index]
        path, label = str(sample.image_path), int(sample.label_index)
        versions = [False, True] if self.paints and label == LabelName.NORMAL else [False]
        names = [self.name_of(path, label, painted) for painted in versions]
        if self.files is not None and all(name is not None and name in self.files for name in names):
            return [Prepared(path, painted, name) for painted, name in zip(versions, names, strict=True)]
        photo = self.photos.read(path)
        return [self.prepare(photo, painted, name) for painted, name in zip(versions, names, strict=True)]

    def name_of(self, path: str, label: int, painted: bool) -> str | None:
        """The name of a version among the files; none of a defective photo whose mask is no file."""
        mask = self.photos.mask_path(path) if label == LabelName.ABNORMAL else ""
        if self.files is None or (label == LabelName.ABNORMAL and not mask):
            return None
        drawn = (key_of(path), self.seed) if painted else None
        return self.files.name_of(path, mask, self.photos.size_of(path), drawn)

    def prepare(self, photo: SourcePhoto, painted: bool, name: str | None = None) -> Prepared:
        """A photo, or its painted version, as the backbone takes it."""
        if photo.image is None:
            photo = self.photos.read(photo.path)
        assert photo.image is not None
        size = self.photos.size_of(photo.path)
        if painted:
            image = photo.image
            transform = with_size(getattr(self.pre_processor, "transform", None), size)
            for resize in extract_transforms_by_type(transform, Resize):
                image = resize(image)
            image, mask = paint_photo(image.cpu(), photo.path, self.seed)
            return Prepared(photo.path, True, name, pre_process(self.pre_processor, image[None], size), mask)
        images = pre_process(self.pre_processor, photo.image[None], size)
        mask = torch.zeros(images.shape[-2:], dtype=torch.bool)
        if photo.mask is not None:
            mask = pre_process(self.pre_processor, Mask(photo.mask[None]), size).squeeze(0) > 0
        return Prepared(photo.path, False, name, images, mask)


def _give_way(_: int) -> None:
    """Let a loader's process leave the processor to the encoder: on two cores, each would wait for the other."""
    if hasattr(os, "nice"):
        os.nice(19)


class SourcePictures:
    """Features and masks of source photos, and of their painted versions.

    Args:
        preparation (Preparation): Prepares the photos.
        model (ResADModel): Encodes them.
        cache (FeatureCache): Where they are kept.
    """

    def __init__(self, preparation: Preparation, model: ResADModel, cache: FeatureCache) -> None:
        self.preparation = preparation
        self.model = model
        self.cache = cache

    def fill(self, hidden: bool, num_workers: int) -> set[str]:
        """Read each photo once and keep what is made of it, as far as there is room; paths of those that are kept."""
        kept: set[str] = set()
        photos = DataLoader(
            self.preparation, ENCODED, num_workers=num_workers, collate_fn=list, worker_init_fn=_give_way
        )
        for batch in track(
            photos, "Encoding source photos", console=Console(stderr=True), transient=True, disable=hidden
        ):
            if not self._keep([version for photo in batch for version in photo]):
                break
            kept.update(photo[0].path for photo in batch)
        rank_zero_info(f"Features of {self.cache} are kept.")
        return kept

    def _keep(self, versions: Sequence[Prepared]) -> bool:
        """Keep some pictures; whether there was room for all."""
        new = []
        for version in versions:
            if version.image is None:
                assert version.name is not None
                if self.cache.take(version.path, version.painted, version.name):
                    continue
                photo = self.preparation.photos.read(version.path)
                version = self.preparation.prepare(photo, version.painted, version.name)  # noqa: PLW2901
            new.append(version)
        pictures = zip(new, self._encode(new), strict=True)
        return all(self.cache.put(each.path, picture, each.painted, each.name) for each, picture in pictures)

    def of(self, photos: Sequence[SourcePhoto], painted: Sequence[bool]) -> list[Picture]:
        """Pictures of photos, or of their painted versions; what is not kept is computed together."""
        found = [self.cache.get(photo.path, paint) for photo, paint in zip(photos, painted, strict=True)]
        missing = [index for index, picture in enumerate(found) if picture is None]
        prepared = [self.preparation.prepare(photos[index], painted[index]) for index in missing]
        computed = dict(zip(missing, self._encode(prepared), strict=True))
        return [computed[index] if picture is None else picture for index, picture in enumerate(found)]

    def features_of(self, path: str) -> Features:
        """Features of a reference photo."""
        kept = self.cache.get(path)
        if kept:
            return kept.features
        photos = self.preparation.photos
        photo = read_photo(path, photos.bit_depth)
        return encode_photo(self.model, self.preparation.pre_processor, photo, photos.size_of(path))

    @torch.no_grad()
    def _encode(self, prepared: Sequence[Prepared]) -> list[Picture]:
        """Features of prepared photos; those of one size are encoded together."""
        device = next(self.model.parameters()).device
        images = [each.image for each in prepared if each.image is not None]
        masks = [each.mask for each in prepared if each.mask is not None]
        found: dict[int, Picture] = {}
        for shape in dict.fromkeys(image.shape for image in images):
            alike = [index for index, image in enumerate(images) if image.shape == shape]
            features = self.model.encode(torch.cat([images[index] for index in alike]).to(device))
            found |= {index: Picture(features.photo(place), masks[index]) for place, index in enumerate(alike)}
        return [found[index] for index in range(len(images))]
