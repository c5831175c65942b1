# SPDX-License-Identifier: Apache-2.0

"""Checkpoint files: written with a checksum of their content, and read whole or not at all, on any device.

Every way to a checkpoint goes through :func:`read_checkpoint`: ``--model.checkpoint``, `resad export` and
``load_from_checkpoint`` by :mod:`anomalib_resad.checkpoint`, and ``--ckpt_path`` by Lightning's trainer, whose reader
:class:`CheckedCheckpoints` replaces. That of anomalib puts tensors where they were when they were saved, so that a
checkpoint from a GPU does not load without one.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from anomalib.engine.plugins import AnomalibCheckpointIO
from anomalib.utils.serialization import anomalib_safe_globals
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from anomalib_resad.enrollment.thresholds import is_threshold
from anomalib_resad.method.safe_load import parse_weights_only, read_file

WHAT = "trained ResAD"
CHECKSUM = "resad_sha256"  # its place in a checkpoint; checkpoints of 0.1.0 have none
# Constructor arguments without a default value that every method has had in every version.
REQUIRED = ("backbone", "layers", "match", "sigma", "image_size")
# In the post-processor: threshold, least and largest value of scores and of maps; what belongs to a product, spreads.
IMAGE_SCALE = ("_image_threshold", "image_min", "image_max")
PIXEL_SCALE = ("_pixel_threshold", "pixel_min", "pixel_max")
OF_GOOD = ("product_threshold", "map_offset", "spread", "patch_spread")


def checksum(checkpoint: Mapping[str, Any]) -> str:
    """SHA-256 of all tensors and plain values of a checkpoint, and of the names that they have."""
    digest = hashlib.sha256()
    _add({name: value for name, value in checkpoint.items() if name != CHECKSUM}, digest)
    return digest.hexdigest()


def _add(value: Any, digest: Any) -> None:  # noqa: ANN401  # what a checkpoint holds; hashlib has no public type
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        digest.update(f"mapping{len(value)}".encode())
        for name, each in value.items():
            digest.update(repr(name).encode())
            _add(each, digest)
    elif isinstance(value, list | tuple):
        digest.update(f"sequence{len(value)}".encode())
        for each in value:
            _add(each, digest)
    else:  # of other objects than these, what is printed may hold an address
        plain = value is None or isinstance(value, bool | int | float | str | bytes)
        digest.update((repr(value) if plain else type(value).__name__).encode())


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read a checkpoint as it was written, without running code from it; tensors come to the CPU.

    Raises:
        ValueError: If the file is damaged, unsafe, or no ResAD.
        FileNotFoundError: If there is no such file.
    """
    return parse_checkpoint(read_file(path, WHAT), path)


def parse_checkpoint(file: bytes, path: Path | str) -> dict[str, Any]:
    """As :func:`read_checkpoint`, of a file that was read.

    Raises:
        ValueError: If the file is damaged, unsafe, or no ResAD.
    """
    with anomalib_safe_globals():
        content = parse_weights_only(file, path, WHAT)
    state, hyper_parameters = content.get("state_dict"), content.get("hyper_parameters")
    missing = [name for name in REQUIRED if name not in (hyper_parameters or {})]
    if not isinstance(state, dict) or not isinstance(hyper_parameters, dict) or missing:
        msg = f"{path} is no ResAD checkpoint: it lacks {missing or 'state_dict'}. Train one with `anomalib train`."
        raise ValueError(msg)
    if CHECKSUM in content and content[CHECKSUM] != checksum(content):
        msg = (
            f"{path} does not match the checksum in it: it was damaged or altered after it was saved. Copy the file "
            "again, or train it again with `anomalib train`."
        )
        raise ValueError(msg)
    _check_thresholds(state, path)
    return content


def _check_thresholds(state: Mapping[str, Any], path: Path | str) -> None:
    """Refuse thresholds and ranges that no scores can be compared with; NaN stands for what was not learned.

    Raises:
        ValueError: If there are some.
    """
    known = {name: state.get(f"post_processor.{name}") for name in (*IMAGE_SCALE, *PIXEL_SCALE, *OF_GOOD)}
    numbers = {name: float(value) for name, value in known.items() if isinstance(value, Tensor) and value.numel() == 1}
    numbers = {name: value for name, value in numbers.items() if not math.isnan(value)}
    problems = [f"{name}={value:g}" for name, value in numbers.items() if not is_threshold(value)]
    for _, low, high in (IMAGE_SCALE, PIXEL_SCALE):
        if (low in numbers) != (high in numbers) or numbers.get(low, 0) > numbers.get(high, 0):
            problems.append(f"from {low}={numbers.get(low, math.nan):g} to {high}={numbers.get(high, math.nan):g}")
    if PIXEL_SCALE[0] in numbers and IMAGE_SCALE[0] not in numbers:  # both are learned together
        problems.append(f"{IMAGE_SCALE[0]}=nan")
    if problems:
        msg = (
            f"{path} holds thresholds or ranges that cannot be: {', '.join(problems)}. Train it again with `anomalib "
            "train`."
        )
        raise ValueError(msg)


class CheckedCheckpointIO(AnomalibCheckpointIO):
    """How Lightning's trainer writes and reads checkpoints: with a checksum, and by :func:`read_checkpoint`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:  # noqa: ANN401
        """Write a checkpoint with its checksum, whole or not at all."""
        super().save_checkpoint(checkpoint | {CHECKSUM: checksum(checkpoint)}, path, storage_options)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:  # noqa: ANN401
        """See :func:`read_checkpoint`; Lightning then moves what it restores to its own device."""
        del map_location, weights_only
        return read_checkpoint(path)


class CheckedCheckpoints(Callback):
    """Gives the trainer :class:`CheckedCheckpointIO`, before it reads a checkpoint; one of the user's own stays.

    Before a training, it sees whether checkpoints can be written.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the reader of anomalib or Lightning."""
        del pl_module, stage
        if type(trainer.strategy.checkpoint_io) in (AnomalibCheckpointIO, TorchCheckpointIO):
            trainer.strategy.checkpoint_io = CheckedCheckpointIO()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try the folders that checkpoints will be written to.

        Raises:
            OSError: If nothing can be written there.
        """
        del pl_module
        folders = [each.dirpath for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
        try:
            for folder in [Path(each) for each in folders if each and trainer.is_global_zero]:
                folder.mkdir(parents=True, exist_ok=True)
                with TemporaryFile(dir=folder):
                    pass
        except OSError as error:
            msg = f"No checkpoint can be written: {error}. Choose another folder with --default_root_dir."
            raise OSError(msg) from error
