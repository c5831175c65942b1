# SPDX-License-Identifier: Apache-2.0

"""Keep an OpenVINO model in float32 wherever it is run, whatever precision the device would choose by itself.

On CPUs with bfloat16 units (AMX, AVX512-BF16) OpenVINO computes in bfloat16 unless it is told otherwise. Then the
nearest reference of a patch is often another one, and the flow's exponent turns the difference into another map.
A model file cannot carry the inference precision, but each of its operations can carry the mark ``precise``, which the
CPU plugin honors. It drops the mark where it replaces an operation by another one, so those replacements are made
here, before the marks. `tests/test_export.py` looks into the graph that OpenVINO runs.
"""

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import openvino as ov
from openvino import Dimension, Node, Output
from openvino import opset1 as old
from openvino import opset13 as op
from openvino.utils.node_factory import NodeFactory


def _scalar(value: float, like: Node) -> Node:
    return op.constant(np.array(value), like.get_element_type())


def _is_float(node: Node) -> bool:
    return node.get_output_element_type(0).is_real()


def _is_constant(node: Node) -> bool:
    kind = node.get_type_name()
    return kind == "Constant" or (kind == "Convert" and _is_constant(node.input_value(0).get_node()))


def _add_negative(node: Node) -> Node | None:
    left, right = node.input_values()
    return op.add(left, op.multiply(right, _scalar(-1, right)))


def _multiply_by_inverse(node: Node) -> Node | None:
    left, right = node.input_values()
    return op.multiply(left, op.power(right, _scalar(-1, right)))


def _multiply_by_itself(node: Node) -> Node | None:
    base, exponent = node.input_values()
    constant = exponent.get_node()
    if constant.get_type_name() != "Constant" or not np.all(constant.data == 2):
        return None
    return op.multiply(base, base)


def _plain_max_pool(node: Node) -> Node | None:
    """The first operation set's, which has no indices as a second output."""
    now = node.get_attributes()
    if node.output(1).get_target_inputs() or set(now["dilations"]) != {1}:
        return None
    return old.max_pool(
        node.input_value(0),
        now["strides"],
        now["pads_begin"],
        now["pads_end"],
        now["kernel"],
        now["rounding_type"],
        now["auto_pad"],
    )


def _earlier_interpolate(node: Node) -> Node | None:
    now = node.get_attributes()
    if node.get_type_info().version_id == "opset4" or now["shape_calculation_mode"] != "sizes":
        return None
    image, size = node.input_value(0), node.input_value(1)
    count = size.get_shape()[0]
    axes = node.input_value(2) if len(node.inputs()) == 3 else op.constant(np.arange(count)).output(0)
    unused = op.constant(np.ones(count, np.float32)).output(0)
    return NodeFactory("opset4").create("Interpolate", [image, size, unused, axes], now)


def _earlier_pad(node: Node) -> Node | None:
    if node.get_type_info().version_id == "opset1":
        return None
    image, begin, end = (node.input_value(each) for each in range(3))
    return old.pad(image, begin, end, node.get_attributes()["pad_mode"])


def _to_shape(value: Output, shape: list[Dimension]) -> Node | None:
    """A reshape, where one pattern describes the result."""
    before = list(value.get_partial_shape())
    pattern = []
    for axis, side in enumerate(shape):
        unmoved = str(before[: axis + 1]) == str(shape[: axis + 1])  # dynamic sides are equal as text alone
        pattern.append(side.get_length() if side.is_static else 0 if unmoved else -1)
    return op.reshape(value, op.constant(pattern), special_zero=True) if pattern.count(-1) < 2 else None


def _reshape(node: Node) -> Node | None:
    """For a squeeze or an unsqueeze."""
    return _to_shape(node.input_value(0), list(node.get_output_partial_shape(0)))


def _align_ranks(node: Node) -> Node | None:
    """Give both factors of a product the same number of axes."""
    sides = [node.input_value(0), node.input_value(1)]
    shapes = [list(side.get_partial_shape()) for side in sides]
    most = max(len(shape) for shape in shapes)
    if len(shapes[0]) == len(shapes[1]) or any(_is_constant(side.get_node()) for side in sides):
        return None
    aligned = [
        side if len(shape) == most else _to_shape(side, [Dimension(1)] * (most - len(shape)) + shape)
        for side, shape in zip(sides, shapes, strict=True)
    ]
    now = node.get_attributes()
    return None if None in aligned else op.matmul(*aligned, now["transpose_a"], now["transpose_b"])


def _transpose_itself(node: Node) -> Node | None:
    """A product that transposes its second factor, for one of a factor that was transposed."""
    left, right = node.input_values()
    before, now = right.get_node(), node.get_attributes()
    if before.get_type_name() != "Transpose" or before.input_value(1).get_node().get_type_name() != "Constant":
        return None
    order = before.input_value(1).get_node().data.tolist()
    swapped = [*range(len(order) - 2), len(order) - 1, len(order) - 2]
    if order != swapped:
        return None
    return op.matmul(left, before.input_value(0), now["transpose_a"], not now["transpose_b"])


def _product(node: Node) -> Node | None:
    plain = _transpose_itself(node)
    return _align_ranks(plain or node) or plain


REPLACEMENTS: dict[str, Callable[[Node], Node | None]] = {
    "Subtract": _add_negative,
    "Divide": _multiply_by_inverse,
    "Power": _multiply_by_itself,
    "MaxPool": _plain_max_pool,
    "MatMul": _product,
    "Interpolate": _earlier_interpolate,
    "Pad": _earlier_pad,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
}


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
        if node.get_type_name() == "MatMul" and _is_float(node):
            (left, left_merged), (right, right_merged) = (_before_expansion(each) for each in node.input_values())
            if left_merged == right_merged:
                node.input(0).replace_source_output(left)
                node.input(1).replace_source_output(right)
    model.validate_nodes_and_infer_types()


def _replace_operations(model: ov.Model) -> None:
    """Replace what the CPU plugin would replace."""
    for node in model.get_ordered_ops():
        replace = REPLACEMENTS.get(node.get_type_name())
        replacement = replace(node) if replace and _is_float(node) else None
        if replacement is not None:
            replacement.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(replacement.output(0))


def _split_slices(model: ov.Model) -> None:
    """Replace slices that divide one axis of a tensor among them by one split."""
    groups: dict[tuple[str, int, int], list[tuple[int, int, Node]]] = {}
    for node in model.get_ordered_ops():
        parameters = [node.input_value(each).get_node() for each in range(1, len(node.inputs()))]
        if node.get_type_name() != "Slice" or not _is_float(node) or len(parameters) != 4:
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

    The first value of the input, clamped to zero, is added to it. Otherwise the plugin would make one operation of a
    product and its bias or factor, and another one of an operation with a single number, both without the mark.
    """
    first = model.input(0)
    axes = len(first.get_partial_shape())
    corner = op.slice(first.get_node(), op.constant([0] * axes), op.constant([1] * axes), op.constant([1] * axes))
    zero = op.clamp(op.reshape(op.convert(corner, "f32"), op.constant([1]), special_zero=False), 0.0, 0.0)
    for node in model.get_ordered_ops():
        if node.get_type_name() not in ("Add", "Multiply", "Power") or not _is_float(node):
            continue
        for each, other in ((1, 0), (0, 1)):  # of two constants an exponent, or the plugin would divide again
            value = node.input_value(each)
            beside_product = node.input_value(other).get_node().get_type_name() == "MatMul"
            single = all(side == 1 for side in value.get_partial_shape())
            if _is_constant(value.get_node()) and (single or beside_product):
                node.input(each).replace_source_output(op.add(value, zero).output(0))
                break


def _mark(path: Path) -> None:
    """Mark every operation of a saved model as one to be kept in its precision."""
    tree = ET.parse(path)  # noqa: S314  # written a moment ago
    for layer in tree.getroot().iter("layer"):
        info = layer.find("rt_info")
        info = ET.SubElement(layer, "rt_info") if info is None else info
        if not any(attribute.get("name") == "precise" for attribute in info):
            ET.SubElement(info, "attribute", {"name": "precise", "version": "0"})
    tree.write(path, encoding="utf-8", xml_declaration=True)


def save_in_float32(model: ov.Model, path: Path) -> None:
    """Save a model so that it computes in float32 on every device that honors the mark.

    Args:
        model (ov.Model): The model, which is changed. Its first input is one that everything is computed from.
        path (Path): The ``.xml`` file; the ``.bin`` lies beside it. Weights in half precision stay so.
    """
    _expand_in_products(model)
    _replace_operations(model)
    _split_slices(model)
    _hide_constants(model)
    model.validate_nodes_and_infer_types()
    ov.save_model(model, path, compress_to_fp16=False)
    _mark(path)


def rewrite_in_float32(path: Path) -> None:
    """Do so with a model that was saved already; arguments as of :func:`save_in_float32`."""
    model = ov.Core().read_model(path)
    with TemporaryDirectory(dir=path.parent) as folder:
        new = Path(folder) / path.name
        save_in_float32(model, new)
        del model  # it reads the old weights from the disk
        for suffix in (".bin", ".xml"):
            new.with_suffix(suffix).replace(path.with_suffix(suffix))
