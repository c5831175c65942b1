# SPDX-License-Identifier: Apache-2.0

"""What anomalib's exports of an enrolled ResAD need: numbers and thresholds that stay true in one file per product."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import LabelName
from anomalib.deploy import CompressionType
from torch import nn

from anomalib_resad.post_processor import RankKeepingPostProcessor
from anomalib_resad.reference_rows import leave_one_out, read_photo
from anomalib_resad.torch_model import ResADModel

MOST_PHOTOS = 300  # that 8-bit ranges are calibrated with


def check_compression(kind: CompressionType | None) -> None:
    """Refuse kinds that quantize everything.

    Raises:
        ValueError: If ``kind`` is ``INT8`` or ``INT8_ACQ``.
    """
    if kind in (CompressionType.INT8, CompressionType.INT8_ACQ):
        msg = (
            f"{kind} is not offered: it would quantize the reference bank and the head too, which "
            "destroys the maps. Use INT8_PTQ, which quantizes the backbone alone, or FP16."
        )
        raise ValueError(msg)


def calibration_photos(datamodule: AnomalibDataModule | None) -> Iterator[np.ndarray]:
    """Good training photos of a datamodule, as an export with pre-processing takes them, ``(1, 3, H, W)`` in 0..1.

    Raises:
        ValueError: If there is no datamodule.
    """
    if datamodule is None:
        msg = "INT8_PTQ needs photos to calibrate with: pass `datamodule` (on the command line, --data)."
        raise ValueError(msg)
    datamodule.setup("fit")
    samples = datamodule.train_data.samples
    good = sorted(samples.image_path[samples.label_index == LabelName.NORMAL])[:MOST_PHOTOS]
    return (read_photo(path)[None].numpy() for path in good)


def quantize(model: Any, datamodule: AnomalibDataModule | None) -> Any:  # noqa: ANN401  # OpenVINO's, an extra
    """Quantize the backbone of an OpenVINO model alone, on the datamodule's good training photos.

    Raises:
        ValueError: If there is no datamodule, or nothing to quantize.
    """
    photos = calibration_photos(datamodule)
    from anomalib_resad.export.quantization import quantize_backbone  # noqa: PLC0415  # OpenVINO is an extra

    return quantize_backbone(model, photos)


def finish_openvino(
    path: Path, model: ResADModel, pre_processor: nn.Module | None, post_processor: nn.Module | None, compressed: bool
) -> None:
    """Rewrite an exported OpenVINO model so that every device computes in float32; see :func:`write_thresholds`.

    The precision of the backbone of a compressed model is left to the device.
    """
    from anomalib_resad.deploy.float32 import rewrite_in_float32  # noqa: PLC0415  # OpenVINO is an extra
    from anomalib_resad.export.quantization import backbone_operations  # noqa: PLC0415

    if compressed:
        rewrite_in_float32(path, backbone_operations)
    else:
        rewrite_in_float32(path)
    write_thresholds(path, model, pre_processor, post_processor)


def write_thresholds(
    path: Path, model: ResADModel, pre_processor: nn.Module | None, post_processor: nn.Module | None
) -> None:
    """Write what changes the threshold of an exported model: ``model.thresholds.json`` beside ``model.xml``.

    The references' own scores are computed from the bank as it is exported; a bank that holds no whole photos has none.
    """
    if isinstance(post_processor, RankKeepingPostProcessor):
        scores = leave_one_out(model, pre_processor).scores if model.bank.record.photos else ()
        thresholds = post_processor.thresholds(scores, model.bank.record.judges_neighborhoods)
        thresholds.write(path.with_suffix(".thresholds.json"))
