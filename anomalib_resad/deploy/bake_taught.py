# SPDX-License-Identifier: Apache-2.0

"""What a product was taught as OpenVINO operations: :meth:`~anomalib_resad.enrollment.taught.Taught.raises`."""

import numpy as np
from openvino import Node, Output
from openvino import opset13 as op

from anomalib_resad.enrollment.taught import EQUAL, Taught, enlarging, most_of


def raised(score: Output, anomaly_map: Output, keys: Output, taught: Taught) -> list[Output]:
    """Raw scores and maps with what taught patches add.

    Args:
        score (Output): Raw scores, shape ``(B,)``.
        anomaly_map (Output): Raw maps, shape ``(B, 1, H, W)``.
        keys (Output): Keys of the photos, shape ``(B, K, h, w)``.
        taught (Taught): What was taught.
    """
    channels, *grid = (side.get_length() for side in list(keys.get_partial_shape())[1:])
    columns = op.reshape(keys, _whole([0, channels, -1]), special_zero=True)
    good, known = (op.log(op.add(_nearest(columns, each), _number(EQUAL))) for each in (taught.good, taught.taught))
    patches = op.multiply(op.relu(op.subtract(good, known)), _number(taught.unit))  # (B, h * w)
    most = op.topk(patches, _whole(most_of(grid[0] * grid[1])), 1, "max", "none")
    high, wide = (op.constant(enlarging(*each)) for each in zip(grid, taught.image_size, strict=True))
    places = op.reshape(patches, _whole([0, 1, *grid]), special_zero=True)
    enlarged = op.matmul(op.matmul(op.transpose(high, _whole([1, 0])), places, False, False), wide, False, False)
    more = op.reduce_mean(most.output(0), _whole([1]), keep_dims=False)
    return [op.add(score, more).output(0), op.add(anomaly_map, enlarged).output(0)]


def _nearest(columns: Node, rows: np.ndarray) -> Node:
    """Squared distance to the nearest row, ``(B, K, N)`` to ``(B, N)``; a transposed factor would lose its float32."""
    cosine = op.reduce_max(op.matmul(op.constant(rows[None]), columns, False, False), _whole([1]), keep_dims=False)
    return op.relu(op.subtract(_number(2), op.multiply(cosine, _number(2))))


def _number(value: float) -> Node:
    return op.constant(np.float32(value))


def _whole(value: int | list[int]) -> Node:
    return op.constant(np.array(value, dtype=np.int64))
