# SPDX-License-Identifier: Apache-2.0

"""Features and references of source images: what a training step and a validation on source images work on."""

from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataset, ImageBatch, InferenceBatch
from anomalib.data.utils import LabelName
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from anomalib_resad.enrollment.checks import is_count
from anomalib_resad.enrollment.decoding import BitDepth
from anomalib_resad.enrollment.draws import draw, key_of, seeded
from anomalib_resad.enrollment.image_size import Size
from anomalib_resad.enrollment.neighborhoods import judges_neighborhoods
from anomalib_resad.enrollment.photos import check_photos, read_header
from anomalib_resad.enrollment.references import read_references
from anomalib_resad.enrollment.rotations import Rotations
from anomalib_resad.method.features import Features, Rows, as_list, rows_from_list, rows_of, without_neighborhoods
from anomalib_resad.reference_rows import reference_rows
from anomalib_resad.torch_model import ResADModel
from anomalib_resad.training.feature_cache import FeatureCache
from anomalib_resad.training.picture_files import PictureFiles, made_by
from anomalib_resad.training.reference_pools import ReferencePools, validates_on_source
from anomalib_resad.training.source_photos import SourceBatch, SourcePhoto, SourcePhotos, augments
from anomalib_resad.training.source_pictures import Preparation, SourcePictures
from anomalib_resad.training.synthetic_defects import SHARE_WITHOUT_REAL, check_share, is_painted

# Good source photos that keys are learned from, the same number of each category: each is thousands of patches.
KEY_PHOTOS = 64
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
        cache_dir (Path | str | None): Folder of features that trainings share; ``None`` for memory alone.

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
        cache_dir: Path | str | None = None,
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
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else None
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
            ValueError: If a category has too few good images, some images cannot be used, or the folder of features
                cannot be written.
        """
        datamodule: Any = getattr(trainer, "datamodule", None)
        given = datamodule.train_data if datamodule is not None else trainer.train_dataloader.dataset  # type: ignore[union-attr]
        self._photos = given if isinstance(given, SourcePhotos) else SourcePhotos(given, self.bit_depth)
        self._photos.kept = set()
        self._model = model
        held_out = [datamodule.val_data] if validates_on_source(datamodule) else []
        self._pools = ReferencePools(self._photos.dataset, *held_out)
        self._pools.check(self.k_shot)
        self.keep_shapes(datamodule, model)
        self._photos.sizes = self._sizes
        has_real = bool((self._photos.dataset.samples.label_index == LabelName.ABNORMAL).any())
        self._share = self.synthetic if has_real else max(self.synthetic, SHARE_WITHOUT_REAL)
        if not has_real:
            rank_zero_info("The training data holds no real defects: synthetic ones stand in.")
        hidden, join = not trainer.is_global_zero, model.encoder.join
        kept_at_all = not augments(self._photos.dataset) and (self.cache.max_bytes or self.cache_dir is not None)
        self.cache.clear()
        self.cache.with_keys = None if join is None else join.with_keys
        if kept_at_all and self.cache_dir is not None:
            self.cache.files = self._files(self.cache_dir, model, pre_processor, trainer.precision)
        preparation = Preparation(self._photos, pre_processor, self._share > 0, self.seed, self.cache.files)
        self._pictures = SourcePictures(preparation, model, self.cache)
        if kept_at_all:
            self._photos.kept |= self._pictures.fill(hidden, getattr(datamodule, "num_workers", 0))
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

    def _files(self, folder: Path, model: ResADModel, pre_processor: nn.Module | None, precision: str) -> PictureFiles:
        augmentations = getattr(self._photos.dataset, "augmentations", None)  # the model's own resizing
        how = made_by(model, pre_processor, augmentations, self.bit_depth, precision)
        return PictureFiles(folder, how, next(model.parameters()).device)

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
        join.learn(self._pictures.features_of(path).values[0] for path in paths)
        with torch.no_grad():
            self.cache.replace_keys()

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
        photos = self._photos_of(batch)
        painted = [
            photo.label == LabelName.NORMAL and is_painted(self.seed, epoch, photo.path, self._share)
            for photo in photos
        ]
        pictures = self._pictures.of(photos, painted)
        features = [picture.features for picture in pictures]
        masks = [picture.mask.to(picture.features.values[0]) for picture in pictures]
        assert self._pools is not None
        paths = [photo.path for photo in photos]
        draws = [self._pools.draw(path, self.k_shot, self.seed, epoch, key_of(path)) for path in paths]
        references = [self._rows(drawn) for drawn in draws]
        return features, references, masks

    @staticmethod
    def _photos_of(batch: SourceBatch | ImageBatch) -> list[SourcePhoto]:
        if isinstance(batch, SourceBatch):
            return batch.photos
        assert batch.image_path is not None
        labels = [0] * len(batch.image_path) if batch.gt_label is None else batch.gt_label.tolist()
        return [SourcePhoto(path, int(label)) for path, label in zip(batch.image_path, labels, strict=True)]

    def _rows(self, paths: list[str]) -> Rows:
        """Bank rows of some photos."""
        photos = [as_list(rows_of(self._pictures.features_of(path))) for path in paths]
        return rows_from_list([torch.cat(level) for level in zip(*photos, strict=True)], self._model.bank.keyed)

    # -- of a validation ----------------------------------------------------------------------------------------------

    def score_held_out(
        self,
        batch: ImageBatch,
        datamodule: Any,  # noqa: ANN401
        model: ResADModel,
        pre_processor: nn.Module | None,
        rotations: Rotations,
    ) -> tuple[InferenceBatch, dict[str, float]]:
        """Score held-out source images against references of their categories, one draw for each.

        Args:
            batch (ImageBatch): The images.
            datamodule (Any): Where they come from.
            model (ResADModel): The model.
            pre_processor (nn.Module | None): What comes before it.
            rotations (Rotations): Orientations of each reference.

        Returns:
            tuple[InferenceBatch, dict[str, float]]: What a product's images would get; and of a model that judges
                neighborhoods, the scores of single patches alone, by path.
        """
        assert batch.image_path is not None
        pools = self._pools or ReferencePools(datamodule.train_data, datamodule.val_data)
        for path in batch.image_path:
            category = pools.category_of[path]
            if category not in self._held_out:
                drawn = pools.draw(path, self.k_shot, self.seed, category)
                size = self._sizes.get(category)
                self._held_out[category] = self._enrolled(drawn, model, pre_processor, rotations, size)
        rows = [self._held_out[pools.category_of[path]] for path in batch.image_path]
        images = torch.as_tensor(batch.image)
        features, image_size = model.encode(images), images.shape[-2:]
        found = model.detect_each(features, rows, image_size)
        if features.neighborhoods is None:
            return found, {}
        alone = model.detect_each(features, [without_neighborhoods(each) for each in rows], image_size)
        return found, dict(zip(batch.image_path, torch.as_tensor(alone.pred_score).tolist(), strict=True))

    def _enrolled(
        self,
        drawn: list[str],
        model: ResADModel,
        pre_processor: nn.Module | None,
        rotations: Rotations,
        size: Size | None,
    ) -> Rows:
        """The rows of some photos that are searched, as of a product's references."""
        depth = self.bit_depth if read_header(drawn[0]).bits > 8 else "auto"
        photos = read_references(drawn, depth).values()
        rows, orientations = reference_rows(model, pre_processor, photos, rotations, size)
        judged = judges_neighborhoods(len(photos), orientations)
        device = next(model.parameters()).device
        levels = [level.to(device) for level in as_list(model.bank.thin_out(rows, len(photos), judged))]
        return rows_from_list(levels, model.bank.keyed)
