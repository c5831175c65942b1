# SPDX-License-Identifier: Apache-2.0

"""Keep an OpenVINO model in float32 wherever it is run, whatever precision the device would choose by itself.

On CPUs with bfloat16 units (AMX, AVX512-BF16) OpenVINO computes in bfloat16 unless it is told otherwise. Then the
nearest reference of a patch is often another one, and the flow's exponent turns the difference into another map.
A model file cannot carry the inference precision, but each of its operations can carry the mark ``precise``, which the
CPU plugin honors. It drops the mark where it replaces an operation by another one, so those replacements
(:mod:`anomalib_resad.deploy.plain_operations`) are made before the marks. `tests/test_export.py` looks into the graph
that OpenVINO runs.
"""

import xml.etree.ElementTree as ET
from collections.abc import Callable, Collection
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import openvino as ov
from openvino import Node, Output
from openvino import opset13 as op

from anomalib_resad.deploy.plain_operations import REPLACEMENTS, is_constant, is_float


def _before_expansion(value: Output) -> tuple[Output, bool]:
    """What was expanded to ``value`` for a product, and whether its first axes were merged then."""
    node = value.get_node()
    merged = node.get_type_name() == "Reshape"
    expanded = node.input_value(0).get_node() if merged else node
    return (expanded.input_value(0), merged) if expanded.get_type_name() == "Broadcast" else (value, False)


def _expand_in_products(model: ov.Model) -> None:
    """Leave it to a product of matrices to expand the axes before them, as it does by itself.

    PyTorch's exporter expands both factors to the shape of the result, and the plugin writes expansions anew.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and is_float(node):
            (left, left_merged), (right, right_merged) = (_before_expansion(each) for each in node.input_values())
            if left_merged == right_merged:
                node.input(0).replace_source_output(left)
                node.input(1).replace_source_output(right)
    model.validate_nodes_and_infer_types()


def _replace_operations(model: ov.Model) -> None:
    """Replace what the CPU plugin would replace."""
    for node in model.get_ordered_ops():
        replace = REPLACEMENTS.get(node.get_type_name())
        replacement = replace(node) if replace and is_float(node) else None
        if replacement is not None:
            replacement.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(replacement.output(0))


def _split_slices(model: ov.Model) -> None:
    """Replace slices that divide one axis of a tensor among them by one split."""
    groups: dict[tuple[str, int, int], list[tuple[int, int, Node]]] = {}
    for node in model.get_ordered_ops():
        parameters = [node.input_value(each).get_node() for each in range(1, len(node.inputs()))]
        if node.get_type_name() != "Slice" or not is_float(node) or len(parameters) != 4:
            continue
        if not all(each.get_type_name() == "Constant" and each.data.size == 1 for each in parameters):
            continue
        start, stop, step, axis = (int(each.data.item()) for each in parameters)
        side = node.get_input_partial_shape(0)[axis]
        if step == 1 and side.is_static and start >= 0:
            source = node.input_value(0)
            stop = min(stop, side.get_length())
            group = groups.setdefault((source.get_node().get_name(), source.get_index(), axis), [])
            group.append((start, stop, node))
    for (_, _, axis), group in groups.items():
        group.sort(key=lambda each: each[0])
        source = group[0][2].input_value(0)
        edges = [0, *(stop for _, stop, _ in group)]
        if [start for start, _, _ in group] != edges[:-1] or edges[-1] != source.get_partial_shape()[axis].get_length():
            continue
        lengths = [stop - start for start, stop, _ in group]
        split = op.variadic_split(source, op.constant(axis), op.constant(lengths))
        for output, (_, _, node) in zip(split.outputs(), group, strict=True):
            node.output(0).replace(output)


def _hide_constants(model: ov.Model) -> None:
    """Keep the plugin from fusing an operation with its constant, by one that it cannot know to be constant.

    The constant is gathered at an index that is always zero: the first value of the input, clamped. Otherwise the
    plugin would make one operation of a product and its bias or factor, and another one of an operation with a single
    number, both without the mark. An addition of zero would do too, but the plugin makes one operation of all of them,
    which takes 5 ms.
    """
    first = model.input(0)
    axes = len(first.get_partial_shape())
    corner = op.slice(first.get_node(), op.constant([0] * axes), op.constant([1] * axes), op.constant([1] * axes))
    zero = op.clamp(op.reshape(op.convert(corner, "f32"), op.constant([], np.int64), special_zero=False), 0.0, 0.0)
    index = op.convert(zero, "i32")
    for node in model.get_ordered_ops():
        if node.get_type_name() not in ("Add", "Multiply", "Power") or not is_float(node):
            continue
        for each, other in ((1, 0), (0, 1)):  # of two constants an exponent, or the plugin would divide again
            value = node.input_value(each)
            beside_product = node.input_value(other).get_node().get_type_name() == "MatMul"
            single = all(side == 1 for side in value.get_partial_shape())
            if is_constant(value.get_node()) and (single or beside_product):
                gathered = op.gather(op.unsqueeze(value, op.constant(0)), index, op.constant(0))
                node.input(each).replace_source_output(gathered.output(0))
                break


def _mark(path: Path, free: Collection[str]) -> None:
    """Mark every operation of a saved model as one to be kept in its precision, but those of these names."""
    tree = ET.parse(path)  # noqa: S314  # written a moment ago
    for layer in tree.getroot().iter("layer"):
        if layer.get("name") in free:
            continue
        info = layer.find("rt_info")
        info = ET.SubElement(layer, "rt_info") if info is None else info
        if not any(attribute.get("name") == "precise" for attribute in info):
            ET.SubElement(info, "attribute", {"name": "precise", "version": "0"})
    tree.write(path, encoding="utf-8", xml_declaration=True)


def save_in_float32(model: ov.Model, path: Path, free: Collection[str] = ()) -> None:
    """Save a model so that it computes in float32 on every device that honors the mark.

    Args:
        model (ov.Model): The model, which is changed. Its first input is one that everything is computed from.
        path (Path): The ``.xml`` file; the ``.bin`` lies beside it. Weights in half precision stay so.
        free (Collection[str]): Names of operations whose precision is left to the device.
    """
    _expand_in_products(model)
    _replace_operations(model)
    _split_slices(model)
    _hide_constants(model)
    model.validate_nodes_and_infer_types()
    ov.save_model(model, path, compress_to_fp16=False)
    _mark(path, free)


def rewrite_in_float32(path: Path, find_free: Callable[[ov.Model], Collection[str]] = lambda _: ()) -> None:
    """Do so with a model that was saved already.

    Args:
        path (Path): As of :func:`save_in_float32`.
        find_free (Callable[[ov.Model], Collection[str]]): Gives ``free`` of :func:`save_in_float32`.
    """
    model = ov.Core().read_model(path)
    free = find_free(model)
    with TemporaryDirectory(dir=path.parent) as folder:
        new = Path(folder) / path.name
        save_in_float32(model, new, free)
        del model  # it reads the old weights from the disk
        for suffix in (".bin", ".xml"):
            new.with_suffix(suffix).replace(path.with_suffix(suffix))
