# SPDX-License-Identifier: Apache-2.0

"""Quantize the convolutions of a backbone to 8 bits with NNCF, and nothing else of a model."""

import logging
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import openvino as ov
from openvino import Node

Input: TypeAlias = np.ndarray | list[np.ndarray]  # of a model, the latter of one with several


def quantize_encoder(model: ov.Model, photos: Iterable[Input]) -> ov.Model:
    """Quantize the convolutions of a backbone to 8 bits, but the first; everything else keeps its precision.

    The first convolution sees the photo itself. With it, the features of a ResNet-18 are twice as far from the exact
    ones, and it is a small part of the time.

    Args:
        model (ov.Model): Photo to features.
        photos (Iterable[Input]): Calibration photos, as the model takes them.

    Returns:
        ov.Model: The quantized model.

    Raises:
        ValueError: If there is no convolution to quantize.
    """
    return _quantize(model, photos, {node.get_friendly_name() for node in model.get_ops()})


def quantize_backbone(model: ov.Model, photos: Iterable[np.ndarray]) -> ov.Model:
    """The same for a whole model, photo to score and map: behind the matching, 8 bits destroy the maps."""
    return _quantize(model, photos, _before_matching(model))


def _is_convolution(node: Node) -> bool:
    return node.get_type_name() in ("Convolution", "GroupConvolution")


def _before_matching(model: ov.Model) -> set[str]:
    """Names of the operations that a search for the nearest row depends on."""
    waiting = [node for node in model.get_ops() if node.get_type_name() == "TopK"]
    found: set[str] = set()
    while waiting:
        node = waiting.pop()
        if node.get_friendly_name() not in found:
            found.add(node.get_friendly_name())
            waiting += [value.get_node() for value in node.input_values()]
    return found


def _quantize(model: ov.Model, photos: Iterable[Input], among: set[str]) -> ov.Model:
    import nncf  # noqa: PLC0415  # slow to import, and seldom needed

    names = [node.get_friendly_name() for node in model.get_ordered_ops() if _is_convolution(node)]
    chosen = [name for name in names if name in among][1:]
    if not chosen:
        msg = "This backbone has no convolutions to quantize (a vision transformer?). Export it with FP16."
        raise ValueError(msg)
    logging.getLogger("nncf").setLevel(logging.ERROR)
    kept = [node.get_friendly_name() for node in model.get_ops() if node.get_friendly_name() not in chosen]
    calibration = list(photos)
    ignored = nncf.IgnoredScope(names=kept, validate=False)
    return nncf.quantize(model, nncf.Dataset(calibration), subset_size=len(calibration), ignored_scope=ignored)
