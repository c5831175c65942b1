# SPDX-License-Identifier: Apache-2.0

"""Write a bundle: the two halves of a trained model, `encode` and `detect`, as OpenVINO files. Needs PyTorch."""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import openvino as ov
import torch
from anomalib.pre_processing import PreProcessor
from torch import Tensor

from anomalib_resad.checkpoint import load_checkpoint
from anomalib_resad.deploy.bundle import DETECTOR, ENCODER, Level, Manifest, Precision, Scale
from anomalib_resad.deploy.float32 import rewrite_in_float32
from anomalib_resad.deploy.runtime import canvas_of
from anomalib_resad.enrollment.files import content_hash
from anomalib_resad.enrollment.image_size import size_of_photos
from anomalib_resad.enrollment.photos import list_photos, read_pixels
from anomalib_resad.export.halves import encoder_inputs, follows_shape, size_of, stride_of, trace
from anomalib_resad.export.quantization import backbone_operations, quantize_encoder
from anomalib_resad.export.replacing import bundle_folder, check_output
from anomalib_resad.lightning_model import ResAD
from anomalib_resad.method.presets import ARCHITECTURE
from anomalib_resad.method.reference_bank import GROUP
from anomalib_resad.post_processor import RankKeepingPostProcessor
from anomalib_resad.pre_processor import with_size

logger = logging.getLogger(__name__)
PACKAGES = ("anomalib-resad", "anomalib", "torch", "timm", "openvino")


def load_model(checkpoint: Path | str) -> ResAD:
    """A trained ResAD, ready to be exported; one whose estimator is the plain distance needs no training.

    Raises:
        ValueError: If the checkpoint, or its pre- or post-processor, cannot be exported.
        FileNotFoundError: If there is no such file.
    """
    estimator = load_checkpoint(checkpoint)["hyper_parameters"]["estimator"]
    model = ResAD(checkpoint=checkpoint, estimator=estimator).eval()
    if model.pre_processor is None or model.post_processor is None:
        msg = f"{checkpoint} has no pre- or post-processor; a bundle holds both. Train it with the default ones."
        raise ValueError(msg)
    return model


def model_hash(model: ResAD) -> str:
    """SHA-256 of everything that makes a feature or a score but the bank and the threshold."""
    assert isinstance(model.pre_processor, PreProcessor)
    size, transform = size_of(model), model.pre_processor.transform
    if follows_shape(model):  # whatever the shape of the product that the checkpoint may hold
        transform = with_size(transform, size)
    digest = hashlib.sha256(repr((transform, list(size))).encode())
    if follows_shape(model):
        digest.update(b"in the shape of the photos")
    digest.update(repr({name: model.hparams[name] for name in ("backbone", "layers", *ARCHITECTURE)}).encode())
    for name, value in model.model.state_dict().items():
        if isinstance(value, Tensor) and not name.startswith("bank."):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    if float(model.model.bank.share) < 1:
        digest.update(f"searched {float(model.model.bank.share)}".encode())
    return digest.hexdigest()


def _scale(threshold: Tensor, low: Tensor, high: Tensor) -> Scale:
    return Scale(*map(_known, (threshold, low, high)))


def _known(value: Tensor) -> float | None:
    return None if torch.isnan(value) else float(value)


def _named(model: ov.Model, inputs: Sequence[str], outputs: Sequence[str]) -> ov.Model:
    for ports, names in ((model.inputs, inputs), (model.outputs, outputs)):
        for port, name in zip(ports, names, strict=True):
            port.get_tensor().set_names({name})
    return model


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library's progress out of the log."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def convert(model: ResAD) -> tuple[ov.Model, ov.Model, tuple[Level, ...]]:
    """Both halves as OpenVINO models in float32."""
    traced_encoder, traced_detector, levels = trace(model)
    inputs = encoder_inputs(model)
    features = [f"features_{number}" for number in range(len(levels))]
    rows = [f"rows_{number}" for number in range(len(levels))]
    with _quiet("torch.export"):
        encoder = _named(ov.convert_model(traced_encoder), inputs, features)
        detector = _named(ov.convert_model(traced_detector), [*features, *rows], ["score", "map"])
    return encoder, detector, levels


def calibration_photos(source: Path | str | Sequence[Path], most: int = 300) -> list[np.ndarray]:
    """Photos for calibration, evenly spaced, as the encoder takes them, ``(1, H, W, 3)`` each."""
    paths = list_photos(source)
    chosen = paths[:: max(1, -(-len(paths) // most))]
    if len(chosen) < 10:
        logger.warning("Only %d photos to calibrate with: INT8 ranges may be too narrow. Give 50 or more.", len(chosen))
    return [read_pixels(path)[None] for path in chosen]


def export_bundle(
    checkpoint: Path | str | ResAD,
    output: Path | str,
    precision: Precision = "fp32",
    calibration: Path | str | Sequence[Path] | None = None,
    replace: bool = False,
) -> Path:
    """Write a bundle.

    Args:
        checkpoint (Path | str | ResAD): A trained ResAD, or its file; a bank in it is not taken along.
        output (Path | str): New folder, or a bundle that is replaced.
        precision (Precision): ``"fp32"``; ``"fp16"`` stores weights in half the space; ``"bf16"`` also computes a
            convolutional backbone in bfloat16 on CPUs that have it, ``"int8"`` its convolutions in 8 bits. The matching
            and the head are computed in float32 always.
        calibration (Path | str | Sequence[Path] | None): Photos that ``"int8"`` is calibrated on, good ones of several
            products.
        replace (bool): Replace a bundle, see :mod:`anomalib_resad.export.replacing`.

    Returns:
        Path: The folder.

    Raises:
        ValueError: If the checkpoint cannot be exported, or there is nothing to calibrate with.
        FileExistsError: If the folder exists, and is not to be replaced, or is no bundle.
        OSError: If it cannot be written. Nothing is left behind then, and a bundle that was to be replaced is whole.
    """
    if (precision == "int8") != (calibration is not None):
        msg = f"precision='{precision}' with calibration={calibration}: int8, and only int8, needs photos to calibrate."
        raise ValueError(msg)
    if precision not in get_args(Precision):
        msg = f"precision='{precision}' is not known; use {', '.join(get_args(Precision))}."
        raise ValueError(msg)
    check_output(Path(output), replace)
    model = checkpoint if isinstance(checkpoint, ResAD) else load_model(checkpoint)
    return write_bundle(model, convert(model), output, precision, calibration, replace)


def write_bundle(
    model: ResAD,
    converted: tuple[ov.Model, ov.Model, tuple[Level, ...]],
    output: Path | str,
    precision: Precision,
    calibration: Path | str | Sequence[Path] | None = None,
    replace: bool = False,
) -> Path:
    """Write a bundle of what :func:`convert` made; arguments and errors as of :func:`export_bundle`."""
    encoder, detector, levels = converted
    half = precision != "fp32"
    with bundle_folder(Path(output), replace) as (folder, finish):
        if calibration is not None:
            photos = calibration_photos(calibration)
            encoder = quantize_encoder(encoder, [_as_inputs(model, each) for each in photos])
        _save(encoder, folder / ENCODER, half, Path(output))
        if precision == "bf16":
            rewrite_in_float32(folder / ENCODER, backbone_operations)
        _save(detector, folder / DETECTOR, half, Path(output))
        finish(_manifest(model, precision, levels, folder))
    return Path(output)


def _as_inputs(model: ResAD, photo: np.ndarray) -> list[np.ndarray]:
    """What an encoder takes, of a photo of a product whose photos all have its shape."""
    side = model.model.encoder.backbone.area_side
    if side is None:
        return [photo]
    return [photo, canvas_of(size_of_photos([(photo.shape[1], photo.shape[2])], side, stride_of(model)))]


def _save(model: ov.Model, path: Path, half: bool, output: Path) -> None:
    try:
        ov.save_model(model, path, compress_to_fp16=half)
        ov.Core().read_model(path)  # what could not be written at the end is not always said
        for part in (path, path.with_suffix(".bin")):  # on the disk, before a manifest names them
            with part.open("rb") as file:
                os.fsync(file.fileno())
    except (RuntimeError, OSError) as error:
        free = shutil.disk_usage(path.parent).free / 1e6
        why = getattr(error, "strerror", None) or "the disk is full, or fails"  # OpenVINO tells neither
        msg = (
            f"{output}: {path.name} cannot be written whole ({why}; {free:.1f} MB are free). Free some space, or "
            "choose another output folder. Nothing was left."
        )
        raise OSError(msg) from error


def _manifest(model: ResAD, precision: Precision, levels: tuple[Level, ...], folder: Path) -> Manifest:
    post: Any = model.post_processor
    if not isinstance(post, RankKeepingPostProcessor):
        msg = f"The post-processor is {type(post).__name__}; a bundle normalizes as RankKeepingPostProcessor does."
        raise ValueError(msg)  # noqa: TRY004  # the checkpoint is at fault, not the caller's types
    height, width = size_of(model)
    # Of the source, not of a product that the checkpoint may hold: a bundle is for all products.
    threshold, map_threshold = post.source_thresholds
    return Manifest(
        model=model_hash(model),
        precision=precision,
        backbone=model.hparams["backbone"],
        image_size=(height, width),
        levels=levels,
        keyed=model.model.bank.keyed,
        rotations=model.hparams["rotations"],
        row_multiple=GROUP,
        score=_scale(threshold, post.image_min, post.image_max),
        map=_scale(map_threshold, post.pixel_min, post.pixel_max),
        label_above=float(post.normalized_image_threshold),
        versions={name: version(name) for name in PACKAGES},
        files={path.name: content_hash(path) for path in sorted(folder.iterdir())},
        weights=model.model.encoder.backbone.origin,
        searched=float(model.model.bank.share),
        spread=_known(post.spread),
        patch_spread=_known(post.patch_spread),
        area_side=model.model.encoder.backbone.area_side,
        stride=stride_of(model) if follows_shape(model) else None,
    )
