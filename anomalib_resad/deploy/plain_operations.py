# SPDX-License-Identifier: Apache-2.0

"""Operations of OpenVINO that its CPU plugin runs as they are, for some that it would replace by itself."""

from collections.abc import Callable

import numpy as np
from openvino import Dimension, Node, Output
from openvino import opset1 as old
from openvino import opset13 as op
from openvino.utils.node_factory import NodeFactory

END = int(np.iinfo(np.int64).max)  # of an axis, however long it is
SMALLEST_WIDTH = 1e-20  # of a range of scores whose inverse float32 can multiply by


def _scalar(value: float, like: Node) -> Node:
    return op.constant(np.array(value), like.get_element_type())


def is_float(node: Node) -> bool:
    """Whether an operation gives real numbers."""
    return node.get_output_element_type(0).is_real()


def is_constant(node: Node) -> bool:
    """Whether an operation is a constant, of any precision."""
    kind = node.get_type_name()
    return kind == "Constant" or (kind == "Convert" and is_constant(node.input_value(0).get_node()))


def _add_negative(node: Node) -> Node | None:
    left, right = node.input_values()
    return op.add(left, op.multiply(right, _scalar(-1, right)))


def _multiply_by_inverse(node: Node) -> Node | None:
    left, right = node.input_values()
    return op.multiply(left, op.power(right, _scalar(-1, right)))


def _number(node: Node) -> float | None:
    """The number that a constant holds, if it is one."""
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return float(node.data.item()) if node.get_type_name() == "Constant" and node.data.size == 1 else None


def _split_number(node: Node, kind: str) -> tuple[Node, float] | None:
    """What a sum or a product with a number is made of."""
    if node.get_type_name() == kind:
        sides = [value.get_node() for value in node.input_values()]
        for value, other in (sides, sides[::-1]):
            number = _number(other)
            if number is not None:
                return value, number
    return None


def _softsign(node: Node) -> Node | None:
    """For ``a x / (c + |x|)``, which makes scores and maps of raw ones: an inverse of each pixel takes 0.5 ms."""
    above, below = (value.get_node() for value in node.input_values())
    absolute, width = _split_number(below, "Add") or (below, 0.0)
    if absolute.get_type_name() != "Abs" or width < SMALLEST_WIDTH:
        return None
    x = absolute.input_value(0)
    value, factor = _split_number(above, "Multiply") or (above, 1.0)
    if value.get_name() != x.get_node().get_name():
        value, factor = above, 1.0
    if value.get_name() != x.get_node().get_name():
        return None
    share = op.softsign(op.multiply(x, _scalar(1 / width, node)))
    return share if factor == 1 else op.multiply(share, _scalar(factor, node))


def _divide(node: Node) -> Node | None:
    return _softsign(node) or _multiply_by_inverse(node)


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


def _part(value: Output, axis: int, start: int, stop: int, step: int = 1) -> Node:
    """Every ``step``-th place along an axis."""
    return op.slice(value, *(op.constant([each]) for each in (start, stop, step, axis)))


def _sum_of_pairs(node: Node) -> Node | None:
    """For the mean of 4 x 4 places, 2 apart: the plugin drops the mark of a pooling that follows a transposition."""
    now = node.get_attributes()
    windows = [list(now[each]) for each in ("kernel", "strides", "pads_begin", "pads_end")]
    if windows != [[4, 4], [2, 2], [0, 0], [0, 0]] or now["rounding_type"] != "floor":
        return None
    total = node.input_value(0)
    for axis in (2, 3):
        pairs = op.add(_part(total, axis, 0, -1, 2), _part(total, axis, 1, END, 2)).output(0)
        total = op.add(_part(pairs, axis, 0, -1), _part(pairs, axis, 1, END)).output(0)
    return op.multiply(total, _scalar(1 / 16, node))


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
    left, right = (side.get_node() for side in sides)
    folded = left.get_type_name() == "Constant" or is_constant(right)  # one of half precision to the left is not
    if len(shapes[0]) == len(shapes[1]) or folded:
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
    "Divide": _divide,
    "Power": _multiply_by_itself,
    "AvgPool": _sum_of_pairs,
    "MaxPool": _plain_max_pool,
    "MatMul": _product,
    "Interpolate": _earlier_interpolate,
    "Pad": _earlier_pad,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
}
