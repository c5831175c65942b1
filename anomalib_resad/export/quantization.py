# SPDX-License-Identifier: Apache-2.0

"""Which operations are the backbone, and its convolutions in 8 bits with NNCF, and nothing else of a model."""

import logging
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import openvino as ov
from openvino import Node

from anomalib_resad.deploy.plain_operations import is_constant

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


# Operations of one number each, which a backbone may end with.
ELEMENTWISE = {"Add", "Multiply", "Relu", "PRelu", "Clamp", "Sigmoid", "Swish", "HSwish", "HSigmoid", "Gelu", "Elu"}


def backbone_operations(model: ov.Model) -> set[str]:
    """Names of the operations of a convolutional backbone; of a transformer, only what leads to its patches.

    They are the convolutions before the matching, what lies between them, and what is behind the last ones until
    something else is done than one number made of one or two others: levels are pooled, enlarged or transposed first.
    What comes before the first one is the pre-processing, whose coordinates bfloat16 cannot hold.

    Args:
        model (ov.Model): Photo to score and map, or to features.
    """
    matched = _before_matching(model) or _ancestors(model.get_ops())
    convolutions = [node for node in model.get_ops() if _is_convolution(node) and node.get_friendly_name() in matched]
    before_one, first = _ancestors(convolutions), {node.get_friendly_name() for node in convolutions}
    found: set[str] = set()
    for node in model.get_ordered_ops():
        name, kind = node.get_friendly_name(), node.get_type_name()
        values = [value.get_node() for value in node.input_values() if not is_constant(value.get_node())]
        inputs = {each.get_friendly_name() for each in values}
        squared = len(inputs) < len(values)  # for a length, which the matching needs
        ends = bool(inputs) and inputs <= found and not squared and kind in ELEMENTWISE
        if name in first or (name in before_one and inputs & found) or ends:
            found.add(name)
    for node in reversed(model.get_ordered_ops()):
        ports = node.output(0).get_target_inputs() if is_constant(node) else ()
        if found & {port.get_node().get_friendly_name() for port in ports}:
            found.add(node.get_friendly_name())
    return found


def _is_convolution(node: Node) -> bool:
    return node.get_type_name() in ("Convolution", "GroupConvolution")


def _before_matching(model: ov.Model) -> set[str]:
    """Names of the operations that a search for the nearest row depends on."""
    return _ancestors(node for node in model.get_ops() if node.get_type_name() == "TopK")


def _ancestors(nodes: Iterable[Node]) -> set[str]:
    """Names of operations, and of all that they depend on."""
    waiting = list(nodes)
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
