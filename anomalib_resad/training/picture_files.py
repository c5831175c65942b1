# SPDX-License-Identifier: Apache-2.0

"""Features of training images in a folder that trainings share: each in a file that is named by all it depends on.

The name is a SHA-256 of the photo's content, of its mask's, and of what made the features of them: the backbone's
weights and levels, the input size, the versions of the libraries. So a changed photo or another model finds nothing,
and nothing has to be removed. Keys are not in the files: each training learns its own.
"""

import io
import logging
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anomalib_resad.checkpoint_io import checksum
from anomalib_resad.enrollment.files import content_hash, remove_stale, write_whole
from anomalib_resad.method.features import Features, as_list
from anomalib_resad.method.safe_load import parse_weights_only
from anomalib_resad.torch_model import ResADModel

logger = logging.getLogger(__name__)

# Libraries that decode, resize, paint or encode.
MADE_BY = ("anomalib-resad", "anomalib", "torch", "torchvision", "timm", "Pillow")
WHAT = "features of a photo"
NOTE = b"Features of training photos, made by anomalib-resad. They may be removed whenever no training runs.\n"


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


def made_by(model: ResADModel, pre_processor: nn.Module | None, *about: object) -> str:
    """A digest of what makes features of photos.

    Args:
        model (ResADModel): The model.
        pre_processor (nn.Module | None): What comes before it.
        *about (object): What else they depend on.
    """
    backbone, device = model.encoder.backbone, next(model.parameters()).device.type
    settings = backbone.name, list(backbone.layers), model.encoder.join is not None, device
    versions = [(name, version(name)) for name in MADE_BY]
    transform = getattr(pre_processor, "transform", None)
    return _digest(checksum(backbone.state_dict()), settings, versions, transform, *about)


def _digest(*parts: object) -> str:
    return sha256(repr(parts).encode()).hexdigest()


class PictureFiles:
    """Reads and writes the files of one model. A file that is damaged or another's is not used, but written anew.

    Args:
        folder (Path): The folder. It is made if it is missing.
        made_by (str): What :func:`made_by` gave.
        device (torch.device): Where features are needed.

    Raises:
        ValueError: If nothing can be written there.
    """

    def __init__(self, folder: Path, made_by: str, device: torch.device) -> None:
        self.folder = folder
        self.made_by = made_by
        self.device = device
        self._full = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_stale(folder)
            write_whole(folder / "README.txt", NOTE)
        except OSError as error:
            msg = f"cache_dir={str(folder)!r} cannot be written: {error}. Choose a folder of yours, or leave it out."
            raise ValueError(msg) from error

    def name_of(self, path: str, mask: str, *about: object) -> str:
        """The name of what is made of a photo.

        Args:
            path (str): The photo.
            mask (str): Its mask; empty for none.
            *about (object): What else it depends on.
        """
        masked = content_hash(mask) if mask else ""
        return _digest(self.made_by, content_hash(path), Path(path).suffix.lower(), masked, *about)

    def __contains__(self, name: str) -> bool:
        """Whether there is a file of that name, whatever is in it."""
        return self._path(name).is_file()

    def read(self, name: str) -> Picture | None:
        """A picture, without keys; ``None`` if there is none that can be used."""
        path = self._path(name)
        try:
            content: dict[str, Any] = parse_weights_only(path.read_bytes(), path, WHAT)
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            content = {}
        if content.get("name") != name:
            logger.warning("%s is damaged, or not what its name says: the photo is encoded again.", path)
            with suppress(OSError):
                path.unlink()  # so that it is written anew
            return None
        values = [level.to(self.device) for level in content["values"]]
        return Picture(Features(values), content["mask"])

    def write(self, name: str, picture: Picture) -> bool:
        """Write a picture if it is not there; whether it is. That the disk is full is told once."""
        if self._full or name in self:
            return name in self
        file = io.BytesIO()
        values = [_alone(level) for level in picture.features.values]
        torch.save({"name": name, "values": values, "mask": _alone(picture.mask)}, file)
        try:
            write_whole(self._path(name), file.getvalue(), synced=False)
        except OSError as error:
            self._full = True
            logger.warning("No more features are written to %s: %s. The training goes on.", self.folder, error)
        return not self._full

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.pt"


def _alone(tensor: Tensor) -> Tensor:
    """A tensor on the CPU that shares its memory with no others, which would be saved with it."""
    return tensor.cpu().clone()
