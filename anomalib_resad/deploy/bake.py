# SPDX-License-Identifier: Apache-2.0

"""One OpenVINO model for one product, photo to verdict: for model servers and programs that know nothing of bundles.

The two halves of a bundle are joined, with the rows of a product's bank as constants between them, and what the runtime
computes from raw values behind them: normalization, label, mask.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import openvino as ov
from filelock import FileLock
from openvino import Node, Output
from openvino import opset13 as op
from openvino.passes import ConstantFolding, Manager

from anomalib_resad.deploy.bake_region import boxed, placed, settled
from anomalib_resad.deploy.bake_taught import raised
from anomalib_resad.deploy.bank import Bank
from anomalib_resad.deploy.bank_rows import cells_of
from anomalib_resad.deploy.bank_store import BankStore, Loaded
from anomalib_resad.deploy.bundle import DETECTOR, ENCODER, MANIFEST, Manifest, banks_of, read_bundle
from anomalib_resad.deploy.float32 import save_in_float32
from anomalib_resad.deploy.prediction import scales_of
from anomalib_resad.deploy.runtime import canvas_of
from anomalib_resad.deploy.watch import Watch
from anomalib_resad.enrollment.files import new_folder
from anomalib_resad.enrollment.thresholds import center_and_width
from anomalib_resad.version import __version__

Pixels = Literal["uint8", "float32"]
Color = Literal["rgb", "bgr"]
INPUT = "input"
MODEL = "model.xml"
LOCK = ".versions.lock"
ANOMALOUS = 0.5  # of the normalized map, as in anomalib's masks: where it lies above its threshold


def bake(
    bundle: Path | str,
    product: str,
    output: Path | str,
    banks: Path | str | None = None,
    pixels: Pixels = "uint8",
    color: Color = "rgb",
) -> Path:
    """Write the model of an enrolled product.

    Args:
        bundle (Path | str): Folder made by ``resad export``.
        product (str): The product.
        output (Path | str): Folder of the model, in which its versions lie, as model servers expect it: the next number
            is taken. Or the folder of a version, whose name is a number.
        banks (Path | str | None): Folder of the products' banks; ``banks`` in the bundle by default.
        pixels (Pixels): ``"uint8"`` for photos ``(B, H, W, 3)`` of 0 to 255; ``"float32"`` for ``(B, 3, H, W)`` of
            0 to 1, which anomalib's ``OpenVINOInferencer`` gives. Both of any size.
        color (Color): Order of the channels.

    Returns:
        Path: The ``model.xml`` in the folder of the version; ``model.bin`` lies beside it.

    Raises:
        ValueError: If the product is not enrolled, or no threshold is known, without which there is no label.
        BankError: If its bank cannot be used.
        BundleError: If the bundle cannot be used.
        FileExistsError: If that version exists.
    """
    for name, value, known in (("pixels", pixels, get_args(Pixels)), ("color", color, get_args(Color))):
        if value not in known:
            msg = f"{name}={value!r} is not known; use {' or '.join(known)}."
            raise ValueError(msg)
    folder = Path(bundle)
    manifest, files = read_bundle(folder)
    watch = Watch(folder, files[MANIFEST])
    store = BankStore(banks_of(folder, banks), manifest, watch, most_loaded=1)
    known = store.load(product)
    bank = known.bank
    _check(manifest, bank)
    model = _join(files, manifest, known, pixels, color)
    _judge(model, manifest, bank)
    _fold(model)
    for path, value in _information(manifest, bank, pixels, color).items():
        model.set_rt_info(value, path.split("/"))
    return _write(model, Path(output))


def _check(manifest: Manifest, bank: Bank) -> None:
    """Refuse what a baked file cannot be.

    Raises:
        ValueError: If the product is looked at in tiles, or the bundle computes in bfloat16.
    """
    if bank.tile_scale is not None:
        msg = (
            f"{bank.product!r} is looked at in tiles (tile_scale={bank.tile_scale:g}), which a baked file cannot. "
            "Inspect it with `resad`, or enroll it for whole photos (--mode replace --tile_scale 0) and bake it then."
        )
        raise ValueError(msg)
    if manifest.precision == "bf16":
        msg = (
            f"{bank.product!r} was enrolled with a backbone in bfloat16, and a baked file computes in float32. Export "
            "another bundle with --precision fp32, enroll the product there, and bake that."
        )
        raise ValueError(msg)


def _join(
    files: Mapping[str, bytes],
    manifest: Manifest,
    known: Loaded,
    pixels: Pixels,
    color: Color,
) -> ov.Model:
    """Photos to raw scores and maps, the two results of the model."""
    core, bank, rows = ov.Core(), known.bank, known.rows
    encoder, detector = (
        core.read_model(files[name], files[str(Path(name).with_suffix(".bin"))]) for name in (ENCODER, DETECTOR)
    )
    photos, as_stored = _photos(pixels, color)
    if bank.region is not None:
        as_stored = boxed(as_stored, bank.region)
    canvas = [] if bank.image_size is None else [op.constant(canvas_of(bank.image_size)).output(0)]
    for parameter, value in zip(encoder.get_parameters(), [as_stored, *canvas], strict=True):
        parameter.output(0).replace(value)
    features = [result.input_value(0) for result in encoder.get_results()]
    if bank.region is not None:
        features = [
            settled(values, of_level[0], cells_of(bank, level))
            for values, of_level, level in zip(features, rows, manifest.levels_at(bank.image_size), strict=True)
        ]
    values = [*features, *(op.constant(each).output(0) for each in rows)]
    for parameter, value in zip(detector.get_parameters(), values, strict=True):
        parameter.output(0).replace(value)
    results = [result.input_value(0) for result in detector.get_results()]
    if known.taught is not None:
        score, anomaly_map = results
        results = raised(score, anomaly_map, features[-1], known.taught)
    return ov.Model(results, [photos], "resad")


def _photos(pixels: Pixels, color: Color) -> tuple[Node, Output]:
    """The input, and what the encoder takes: ``(B, H, W, 3)`` of 0 to 255 in the order red, green, blue."""
    layout, shape = ("NHWC", [-1, -1, -1, 3]) if pixels == "uint8" else ("NCHW", [-1, 3, -1, -1])
    photos = op.parameter(shape, np.uint8 if pixels == "uint8" else np.float32, name=INPUT)
    photos.set_layout(ov.Layout(layout))
    photos.output(0).set_names({INPUT})
    values: Node = photos
    if color == "bgr":
        values = op.gather(values, op.constant([2, 1, 0]), op.constant(layout.index("C")))
    if pixels == "float32":
        values = op.transpose(op.multiply(values, op.constant(np.float32(255))), op.constant([0, 2, 3, 1]))
    return photos, values.output(0)


def _judge(model: ov.Model, manifest: Manifest, bank: Bank) -> None:
    """Replace the results by what anomalib's exports give, computed as the runtime of the edge does.

    Raises:
        ValueError: If no threshold is known.
    """
    score_scale, map_scale = scales_of(manifest, bank)
    if np.isnan(score_scale[0]):
        msg = (
            f"No threshold is known for {bank.product!r}: the model was trained without validation, so a baked file "
            "could not say what is anomalous. Give the product a threshold of its own (`set_threshold`, or `resad "
            "enroll --mode replace --threshold`)."
        )
        raise ValueError(msg)
    score, anomaly_map = (
        _normalized(result.input_value(0), scale)
        for result, scale in zip(model.get_results(), (score_scale, map_scale), strict=True)
    )
    if bank.region is not None:
        anomaly_map = placed(anomaly_map.output(0), bank.region)
    results = {
        "pred_score": score,
        "pred_label": _above(score, manifest.label_above),
        "anomaly_map": anomaly_map,
        "pred_mask": _above(anomaly_map, ANOMALOUS),
    }
    for result in model.get_results():
        model.remove_result(result)
    for name, node in results.items():
        node.output(0).set_names({name})
        node.set_friendly_name(name)
        model.add_results([op.result(node)])


def _normalized(raw: Output, scale: tuple[np.float32, ...]) -> Node:
    """:func:`~anomalib_resad.enrollment.thresholds.normalize` as operations."""
    center, width = (np.float32(each) for each in center_and_width(*scale))
    distance = op.multiply(op.add(raw, op.constant(-center)), op.constant(np.float32(2)))
    share = op.divide(distance, op.add(op.absolute(distance), op.constant(width)))
    return op.add(op.multiply(share, op.constant(np.float32(0.5))), op.constant(np.float32(0.5)))


def _above(value: Node, threshold: float) -> Node:
    """1 or 0, as uint8: OpenVINO Model Server cannot write booleans in JSON."""
    return op.convert(op.greater(value, op.constant(np.float32(threshold))), "u8")


def _fold(model: ov.Model) -> None:
    """Compute once what no photo changes: lengths of the bank's rows, weights of the smoothing."""
    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(model)
    core = ov.Core()
    for node in model.get_ordered_ops():
        constant = all(value.get_node().get_type_name() == "Constant" for value in node.input_values())
        if node.get_type_name() == "Convolution" and constant:  # which the pass leaves alone
            found = core.compile_model(ov.Model([node.output(0)], []), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])
            node.output(0).replace(op.constant(found[0]).output(0))
    manager.run_passes(model)


def _information(manifest: Manifest, bank: Bank, pixels: Pixels, color: Color) -> dict[str, Any]:
    """What the file says of itself: to OpenVINO's Model API, and to a reader."""
    height, width = bank.image_size or manifest.image_size
    (threshold, *_), (map_threshold, *_) = scales_of(manifest, bank)
    for_model_api = {
        "model_type": "AnomalyDetection",
        "task": "segmentation",
        "labels": "Normal Anomaly",
        "image_threshold": manifest.label_above,
        "pixel_threshold": ANOMALOUS,
        "normalization_scale": 1.0,
        # Photos of 8 bits go in as they are. Its own way with what is not embedded ends in 0..1, channels first.
        "embedded_processing": pixels == "uint8",
        "orig_height": height,
        "orig_width": width,
    }
    about = {
        "product": bank.product,
        "threshold": float(threshold),
        "map_threshold": float(map_threshold),
        "bit_depth": bank.bit_depth,
        "color": color,
        "photos": len(bank.references),
        "bank": bank.checksum,
        "model": manifest.model,
        "precision": manifest.precision,
        "backbone": manifest.backbone,
        "version": __version__,
    }
    named = {f"model_info/{name}": value for name, value in for_model_api.items()}
    return named | {f"resad/{name}": value for name, value in about.items()}


def _write(model: ov.Model, output: Path) -> Path:
    """Write a version, whole or not at all."""
    given = output.name.isascii() and output.name.isdigit() and int(output.name) > 0
    versions = output.parent if given else output
    versions.mkdir(parents=True, exist_ok=True)
    with FileLock(versions / LOCK):  # two that bake at the same time take two numbers
        numbers = [int(path.name) for path in versions.iterdir() if path.name.isascii() and path.name.isdigit()]
        path = output if given else versions / str(1 + max(numbers, default=0))
        if path.exists():
            msg = f"{path} exists; nothing was changed. Choose another version, or give {versions} for the next one."
            raise FileExistsError(msg)
        with new_folder(path) as folder:
            save_in_float32(model, folder / MODEL)
    return path / MODEL
