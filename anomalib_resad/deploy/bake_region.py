# SPDX-License-Identifier: Apache-2.0

"""A product's region of interest as OpenVINO operations: what the runtime computes before and behind the two models."""

import numpy as np
from openvino import Node, Output
from openvino import opset13 as op

from anomalib_resad.deploy.placing import place_of
from anomalib_resad.enrollment.region import FILL, bounds, core


def boxed(photos: Output, region: np.ndarray) -> Output:
    """The box of a region, filled outside of it: :func:`~anomalib_resad.enrollment.region.cut_out`.

    Args:
        photos (Output): Photos of any size, uint8 or float32, 0 to 255, shape ``(B, H, W, 3)``.
        region (np.ndarray): The region.
    """
    top, left, bottom, right = bounds(region)
    sides = op.shape_of(photos, "i64")
    edges, indices = [], []
    for axis, (start, end) in enumerate(((top, bottom), (left, right))):
        pixels = op.gather(sides, _whole([axis + 1]), _whole(0))
        first, last = (_scaled(pixels, edge, region.shape[axis]) for edge in (start, end))
        edges.append((first, last))
        length = op.squeeze(op.subtract(last, first), _whole(0))
        numbers = op.range(_whole(0), length, _whole(1), "i64")
        doubled = op.add(op.multiply(numbers, _whole(2)), _whole(1))
        indices.append(op.divide(op.multiply(doubled, _whole(end - start)), op.multiply(length, _whole(2))))
    (first_row, last_row), (first_column, last_column) = edges
    starts, stops = op.concat([first_row, first_column], 0), op.concat([last_row, last_column], 0)
    box = op.slice(photos, starts, stops, _whole([1, 1]), _whole([1, 2]))
    inside: Node = op.constant(core(region) > 0)
    for axis, index in enumerate(indices):
        inside = op.gather(inside, index, _whole(axis))
    fill = op.convert(op.constant(np.array(FILL, np.float32)), photos.get_element_type().to_string())
    return op.select(op.unsqueeze(inside, _whole([0, 3])), box, fill).output(0)


def settled(features: Output, row: np.ndarray, cells: np.ndarray) -> Output:
    """Features of a level in which patches outside of the region are like a row of the bank."""
    inside, known = op.constant(cells[None, None]), op.constant(row[None, :, None, None])
    return op.select(inside, features, known).output(0)


def placed(anomaly_map: Output, region: np.ndarray) -> Node:
    """Maps of the box in those of photos: :func:`~anomalib_resad.deploy.placing.placed`."""
    height, width = (side.get_length() for side in list(anomaly_map.get_partial_shape())[2:])
    place, values = place_of(region, height, width), anomaly_map.get_node()
    if place.pooled > 1:
        size = [place.pooled, place.pooled]
        values = op.avg_pool(anomaly_map, size, [0, 0], [0, 0], size, True, "ceil")
    else:
        values = anomaly_map
    inside = op.multiply(values, op.constant(place.inside.astype(np.float32)[None, None]))
    (above, below), (before, behind) = place.margins
    return op.pad(inside, _whole([0, 0, above, before]), _whole([0, 0, below, behind]), "constant", np.float32(0))


def _whole(value: int | list[int]) -> Node:
    return op.constant(np.array(value, dtype=np.int64))


def _scaled(pixels: Node, edge: int, cells: int) -> Node:
    """An edge of the box in whole pixels, rounded as :func:`~anomalib_resad.enrollment.region.box_of` does."""
    return op.divide(op.add(op.multiply(pixels, _whole(2 * edge)), _whole(cells)), _whole(2 * cells))
