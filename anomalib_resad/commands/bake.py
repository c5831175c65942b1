# SPDX-License-Identifier: Apache-2.0

"""`resad bake`: one model file for one product."""

from pathlib import Path

from rich.console import Console

from anomalib_resad.commands.console import say
from anomalib_resad.deploy.bake import Color, Pixels
from anomalib_resad.deploy.bake import bake as bake_model


def bake(
    bundle: Path,
    product: str,
    output: Path,
    banks: Path | None = None,
    pixels: Pixels = "uint8",
    color: Color = "rgb",
) -> None:
    """Write one OpenVINO model of an enrolled product, for model servers, C++ and anomalib's inferencer.

    Args:
        bundle: Folder made by `resad export`, or file made by `resad bundle pack`.
        product: Name of the product.
        output: Folder of the model, such as models/cable, where the next version is written (models/cable/1 is the
            first); or the folder of a version.
        banks: Folder of the products' banks, if not in the bundle.
        pixels: What the model takes: uint8 photos (batch, height, width, 3), or float32 (batch, 3, height, width) of 0
            to 1, as anomalib's OpenVINOInferencer gives them.
        color: Order of the channels; bgr for OpenCV, and for a model server that decodes JPEG itself.
    """
    with Console(stderr=True).status("Baking"):
        path = bake_model(bundle, product, output, banks, pixels, color)
    size = sum(each.stat().st_size for each in path.parent.iterdir())
    say(f"{path.parent}: {product}, {size / 1e6:.1f} MB.")
