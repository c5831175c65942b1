# SPDX-License-Identifier: Apache-2.0

"""Features and references of source images: what a training step and a validation on source images work on."""

from collections.abc import Sequence
from typing import Any

import torch
from anomalib.data import AnomalibDataset, ImageBatch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.data.utils import LabelName
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Resize
from torchvision.tv_tensors import Mask

from anomalib_resad.enrollment.checks import is_count
from anomalib_resad.enrollment.decoding import BitDepth
from anomalib_resad.enrollment.draws import draw, key_of, seeded
from anomalib_resad.enrollment.image_size import Size
from anomalib_resad.enrollment.photos import check_photos, read_header
from anomalib_resad.enrollment.references import read_references
from anomalib_resad.enrollment.rotations import Rotations
from anomalib_resad.method.features import Features, Rows, as_list, rows_from_list, rows_of
from anomalib_resad.pre_processor import with_size
from anomalib_resad.reference_rows import encode_photo, pre_process, read_photo, reference_rows
from anomalib_resad.torch_model import ResADModel
from anomalib_resad.training.feature_cache import FeatureCache, Picture
from anomalib_resad.training.reference_pools import ReferencePools, validates_on_source
from anomalib_resad.training.source_photos import SourceBatch, SourcePhoto, SourcePhotos, augments
from anomalib_resad.training.synthetic_defects import SHARE_WITHOUT_REAL, check_share, is_painted, paint_photo

# Good source photos that keys are learned from, the same number of each category: each is thousands of patches.
KEY_PHOTOS = 64
ENCODED = 8  # source photos that are encoded together, which is faster than one by one
DEFAULT_SHOTS = 4  # photos that are drawn where nobody says how many; the paper has 2 and 4


class SourceReferences:
    """Gives each training image its features, references of its own, and where it is defective.

    The references of an image are drawn from the good training images of its category, never the image itself, seeded
    by epoch and image. Each photo is read and decoded once, and its features are kept as far as there is room; some
    good photos are replaced by a version with a synthetic defect, others in each epoch.

    Args:
        k_shot (int | None): References of an image; 4 by default.
        seed (int): Seed of the draws, and of the synthetic defects.
        cache_gb (float): Most memory for features, in GB; 0 computes them anew in each epoch.
        synthetic (float | None): Share of the good images that get a defect, ``None`` for none; 0.5 at least where no
            image has a real one.
        bit_depth (BitDepth): Bits of a channel that files of more than 8 bits use; ``"auto"``: what they state.

    Raises:
        ValueError: If ``synthetic`` is no share, or ``k_shot`` no number of photos.
    """

    def __init__(
        self,
        k_shot: int | None = None,
        seed: int = 0,
        cache_gb: float = 4.0,
        synthetic: float | None = None,
        bit_depth: BitDepth = "auto",
    ) -> None:
        check_share(synthetic or 0.0)
        self.k_shot = DEFAULT_SHOTS if k_shot is None else k_shot
        if not is_count(self.k_shot):
            all_or = f"None for all of `references`, else {DEFAULT_SHOTS}"
            msg = f"k_shot={k_shot!r} must be a whole number of at least 1, or {all_or}."
            raise ValueError(msg)
        self.seed = seed
        self.synthetic = synthetic or 0.0
        self.bit_depth = bit_depth
        self.cache = FeatureCache(int(cache_gb * 1e9))
        self._pools: ReferencePools | None = None
        self._held_out: dict[str, Rows] = {}  # by source category
        self._sizes: dict[str, Size] = {}  # by source category, where each has its own

    # -- before the first step ----------------------------------------------------------------------------------------

    def take_over(self, datamodule: Any) -> None:  # noqa: ANN401
        """Let a datamodule's training photos come undecoded where their features are kept."""
        if isinstance(getattr(datamodule, "train_data", None), AnomalibDataset):
            datamodule.train_data = SourcePhotos(datamodule.train_data, self.bit_depth)

    @staticmethod
    def give_back(datamodule: Any) -> None:  # noqa: ANN401
        """Undo :meth:`take_over`."""
        if isinstance(getattr(datamodule, "train_data", None), SourcePhotos):
            datamodule.train_data = datamodule.train_data.dataset

    def start(self, trainer: Trainer, model: ResADModel, pre_processor: nn.Module | None) -> None:
        """Compute the features that are kept, and learn the keys of joined levels, in every process alike.

        Raises:
            ValueError: If a category has too few good images, or some images cannot be used.
        """
        datamodule: Any = getattr(trainer, "datamodule", None)
        given = datamodule.train_data if datamodule is not None else trainer.train_dataloader.dataset  # type: ignore[union-attr]
        self._photos = given if isinstance(given, SourcePhotos) else SourcePhotos(given, self.bit_depth)
        self._photos.kept = set()
        self._model, self._pre_processor = model, pre_processor
        held_out = [datamodule.val_data] if validates_on_source(datamodule) else []
        self._pools = ReferencePools(self._photos.dataset, *held_out)
        self._pools.check(self.k_shot)
        self.keep_shapes(datamodule, model)
        self._photos.sizes = self._sizes
        has_real = bool((self._photos.dataset.samples.label_index == LabelName.ABNORMAL).any())
        self._share = self.synthetic if has_real else max(self.synthetic, SHARE_WITHOUT_REAL)
        if not has_real:
            rank_zero_info("The training data holds no real defects: synthetic ones stand in.")
        hidden = not trainer.is_global_zero
        if self.cache.max_bytes and not augments(self._photos.dataset):
            self._fill(hidden, getattr(datamodule, "num_workers", 0))
        shown = [path for data in (self._photos, *held_out) for path in data.samples.image_path]
        unread = [path for path in shown if path not in self._photos.kept]
        paths = track(unread, "Checking source photos", console=Console(stderr=True), transient=True, disable=hidden)
        check_photos(paths, "source images", decode=True, bit_depth=self.bit_depth)
        self._learn_keys()

    def keep_shapes(self, datamodule: Any, model: ResADModel) -> None:  # noqa: ANN401
        """Give each source category the input size of its good photos, where the model keeps their shape."""
        self._sizes = (self._pools or ReferencePools(datamodule.train_data, datamodule.val_data)).sizes(model)
        if validates_on_source(datamodule):
            datamodule.val_data.sizes = self._sizes

    def _size_of(self, path: str) -> Size | None:
        assert self._pools is not None
        return self._sizes.get(self._pools.category_of[path])

    def _fill(self, hidden: bool, num_workers: int) -> None:
        """Read each photo once and keep its features, and those of its painted version, as far as there is room."""
        self.cache.clear()
        photos = DataLoader(self._photos, batch_size=ENCODED, num_workers=num_workers, collate_fn=list)
        for batch in track(
            photos, "Encoding source photos", console=Console(stderr=True), transient=True, disable=hidden
        ):
            if not self._keep(batch):
                break
        rank_zero_info(f"Features of {self.cache} are kept.")

    def _keep(self, photos: Sequence[SourcePhoto]) -> bool:
        """Keep the features of some photos and of their painted versions; whether there was room for all."""
        good = [photo for photo in photos if self._share and photo.label == LabelName.NORMAL]
        versions = [*((photo, False) for photo in photos), *((photo, True) for photo in good)]
        pictures = self._encode([self._prepared(*each) for each in versions])
        for (photo, painted), picture in zip(versions, pictures, strict=True):
            if not self.cache.put(photo.path, picture, painted):
                return False
        assert self._photos.kept is not None
        self._photos.kept.update(photo.path for photo in photos)
        return True

    def _learn_keys(self) -> None:
        """Learn the directions of the keys from good photos, unless that was done before."""
        join = self._model.encoder.join
        if join is None or join.learned:
            return
        assert self._pools is not None
        good = sorted(self._pools.good.items())
        most = max(1, KEY_PHOTOS // len(good))
        drawn = [draw(paths, min(most, len(paths)), seeded(self.seed, name, "keys")) for name, paths in good]
        paths = [path for category in drawn for path in category]
        rank_zero_info(f"Learning what to match by, from {len(paths)} good photos of {len(good)} source categories.")
        join.learn(self._features_of(path).values[0] for path in paths)
        with torch.no_grad():
            self.cache.replace_keys(join.keys_of)

    def stop(self) -> None:
        """Free the features of source images."""
        self.cache.clear()
        self._held_out.clear()
        self._pools = None

    # -- of a batch ---------------------------------------------------------------------------------------------------

    def prepare(self, batch: SourceBatch | ImageBatch, epoch: int) -> tuple[list[Features], list[Rows], list[Tensor]]:
        """What a training step needs.

        Args:
            batch (SourceBatch | ImageBatch): The batch; of anomalib's own, from a user's loader, only the paths count.
            epoch (int): The epoch, on which draws and synthetic defects depend.

        Returns:
            tuple[list[Features], list[Rows], list[Tensor]]: Of each image its features, a batch of one; its references;
                and its mask ``(H, W)``, 1 where it is defective.

        Raises:
            ValueError: If a defective image has no mask, or a category too few good images.
        """
        pictures = self._pictures(self._photos_of(batch), epoch)
        features = [picture.features for _, picture in pictures]
        masks = [picture.mask.to(picture.features.values[0]) for _, picture in pictures]
        assert self._pools is not None
        draws = [self._pools.draw(path, self.k_shot, self.seed, epoch, key_of(path)) for path, _ in pictures]
        references = [self._rows(drawn) for drawn in draws]
        return features, references, masks

    @staticmethod
    def _photos_of(batch: SourceBatch | ImageBatch) -> list[SourcePhoto]:
        if isinstance(batch, SourceBatch):
            return batch.photos
        assert batch.image_path is not None
        labels = [0] * len(batch.image_path) if batch.gt_label is None else batch.gt_label.tolist()
        return [SourcePhoto(path, int(label)) for path, label in zip(batch.image_path, labels, strict=True)]

    def _pictures(self, photos: Sequence[SourcePhoto], epoch: int) -> list[tuple[str, Picture]]:
        """Features and masks of photos, or of their painted versions; what is not kept is computed together."""
        painted = [
            photo.label == LabelName.NORMAL and is_painted(self.seed, epoch, photo.path, self._share)
            for photo in photos
        ]
        found = [self.cache.get(photo.path, paint) for photo, paint in zip(photos, painted, strict=True)]
        missing = [index for index, picture in enumerate(found) if picture is None]
        prepared = [self._prepared(photos[index], painted[index]) for index in missing]
        for index, picture in zip(missing, self._encode(prepared), strict=True):
            found[index] = picture
        return [(photo.path, picture) for photo, picture in zip(photos, found, strict=True) if picture is not None]

    def _prepared(self, photo: SourcePhoto, painted: bool) -> tuple[Tensor, Tensor]:
        """A photo, or its painted version, as the backbone takes it, ``(1, 3, H, W)``, and its mask ``(H, W)``."""
        if photo.image is None:
            photo = self._photos.read(photo.path)
        assert photo.image is not None
        size = self._size_of(photo.path)
        if painted:
            image = photo.image
            transform = with_size(getattr(self._pre_processor, "transform", None), size)
            for resize in extract_transforms_by_type(transform, Resize):
                image = resize(image)
            image, mask = paint_photo(image.cpu(), photo.path, self.seed)
            return pre_process(self._pre_processor, image[None], size), mask
        images = pre_process(self._pre_processor, photo.image[None], size)
        if photo.mask is None:
            return images, torch.zeros(images.shape[-2:], dtype=torch.bool)
        return images, pre_process(self._pre_processor, Mask(photo.mask[None]), size).squeeze(0) > 0

    @torch.no_grad()
    def _encode(self, prepared: Sequence[tuple[Tensor, Tensor]]) -> list[Picture]:
        """Features of prepared photos; those of one size are encoded together."""
        device = next(self._model.parameters()).device
        found: dict[int, Picture] = {}
        for shape in dict.fromkeys(image.shape for image, _ in prepared):
            alike = [index for index, (image, _) in enumerate(prepared) if image.shape == shape]
            features = self._model.encode(torch.cat([prepared[index][0] for index in alike]).to(device))
            found |= {index: Picture(features.photo(place), prepared[index][1]) for place, index in enumerate(alike)}
        return [found[index] for index in range(len(prepared))]

    def _features_of(self, path: str) -> Features:
        """Features of a reference photo."""
        kept = self.cache.get(path)
        if kept:
            return kept.features
        photo = read_photo(path, self.bit_depth)
        return encode_photo(self._model, self._pre_processor, photo, self._size_of(path))

    def _rows(self, paths: list[str]) -> Rows:
        """Bank rows of some photos."""
        photos = [as_list(rows_of(self._features_of(path))) for path in paths]
        return rows_from_list([torch.cat(level) for level in zip(*photos, strict=True)], self._model.bank.keyed)

    # -- of a validation ----------------------------------------------------------------------------------------------

    def held_out(
        self,
        batch: ImageBatch,
        datamodule: Any,  # noqa: ANN401
        model: ResADModel,
        pre_processor: nn.Module | None,
        rotations: Rotations,
    ) -> list[Rows]:
        """References of held-out source images: one draw per category, enrolled as a product's references are.

        Args:
            batch (ImageBatch): The images.
            datamodule (Any): Where they come from.
            model (ResADModel): The model.
            pre_processor (nn.Module | None): What comes before it.
            rotations (Rotations): Orientations of each reference.
        """
        assert batch.image_path is not None
        pools = self._pools or ReferencePools(datamodule.train_data, datamodule.val_data)
        for path in batch.image_path:
            category = pools.category_of[path]
            if category not in self._held_out:
                drawn = pools.draw(path, self.k_shot, self.seed, category)
                depth = self.bit_depth if read_header(drawn[0]).bits > 8 else "auto"
                photos = read_references(drawn, depth).values()
                rows, _ = reference_rows(model, pre_processor, photos, rotations, self._sizes.get(category))
                device = next(model.parameters()).device
                levels = [level.to(device) for level in as_list(model.bank.thin_out(rows, len(photos)))]
                self._held_out[category] = rows_from_list(levels, model.bank.keyed)
        return [self._held_out[pools.category_of[path]] for path in batch.image_path]
