# SPDX-License-Identifier: Apache-2.0

"""Times of exports to OpenVINO, pre-processing inside, against the backbone exported alone in the same precision."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import openvino as ov
import torch
from anomalib.deploy import CompressionType
from anomalib.models import Patchcore
from torch import nn

from anomalib_resad import ResAD
from anomalib_resad.export.quantization import quantize_backbone, quantize_encoder
from benchmarks.speed_models import BACKBONE, Actions, Row, in_turn

SIZE = (224, 224)
CALIBRATION = 10  # photos for 8-bit ranges, noise: the time does not depend on what they show
Exports = dict[str, ov.Model]


def openvino_rows(
    backbone: str,
    models: Mapping[str, ResAD],
    rivals: Mapping[str, Patchcore],
    batches: Sequence[int],
    repeats: int,
    threads: int,
) -> list[Row]:
    """Times per batch.

    Args:
        backbone (str): Its name.
        models (Mapping[str, ResAD]): As of :func:`benchmarks.speed_models.known`.
        rivals (Mapping[str, Patchcore]): As of :func:`benchmarks.speed_models.rivals`, of one photo only.
        batches (Sequence[int]): Batch sizes.
        repeats (int): Counted rounds.
        threads (int): CPU threads.
    """
    rows: list[Row] = []
    with TemporaryDirectory() as folder:
        exact, half, single, quantized = export_all(models, rivals, Path(folder))
        exports = {"f32": exact, "bf16": half, "int8": quantized}
        for precision, batch in product(exports, batches):
            chosen = exports[precision] | (single if batch == 1 and precision != "int8" else {})
            hint = "bf16" if precision == "bf16" else "f32"
            config = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
            photos = torch.rand(batch, 3, *SIZE).numpy()
            actions: Actions = {}
            for name, export in chosen.items():
                model = export.clone()
                model.reshape(photos.shape)
                actions[name] = partial(ov.compile_model(model, "CPU", config).create_infer_request().infer, [photos])
            timed = in_turn(actions, repeats, f"{backbone}, OpenVINO, {precision}, batch {batch}")
            rows += [{"backbone": backbone, "runtime": f"openvino {precision}", "batch": batch} | row for row in timed]
    return rows


def export_all(
    models: Mapping[str, ResAD], rivals: Mapping[str, Patchcore], folder: Path
) -> tuple[Exports, Exports, Exports, Exports]:
    """Exports for any batch, those of the default with FP16, those of Patchcore for one photo, and those in 8 bits.

    Their weights stay in the folder. With FP16 a backbone may be computed in bfloat16. Of Patchcore, an export for any
    batch size would only take the size of the example.
    """
    core = ov.Core()
    exact = {BACKBONE: core.read_model(_export(models["fused"].model.encoder.backbone, folder))}
    half = {BACKBONE: exact[BACKBONE]}
    for number, (name, model) in enumerate(models.items()):  # OpenVINO takes a comma in a name for two files
        onnx = model.to_onnx(folder / f"traced_{number}", input_size=SIZE, opset_version=18)  # once: it takes the time
        with patch.object(ResAD, "to_onnx", lambda *_, onnx=onnx, **__: onnx):
            exact[name] = core.read_model(model.to_openvino(folder / name / "exact", input_size=SIZE))
            if name.startswith("fused"):
                compressed = model.to_openvino(folder / name / "half", compression_type=CompressionType.FP16)
                half[name] = core.read_model(compressed)
    single: Exports = {}
    for name, rival in rivals.items():
        path = rival.to_openvino(folder / name, input_size=SIZE, onnx_kwargs={"dynamic_shapes": None})
        single[name] = core.read_model(path)
    noise = [torch.rand(1, 3, *SIZE).numpy() for _ in range(CALIBRATION)]
    quantized = {
        BACKBONE: quantize_encoder(exact[BACKBONE], noise),
        "fused": quantize_backbone(exact["fused"], noise),  # as INT8_PTQ does it, without one more export
    }
    return exact, half, single, quantized


def _export(module: nn.Module, folder: Path) -> Path:
    program = torch.onnx.export(module, (torch.rand(1, 3, *SIZE),), dynamo=True, verbose=False)
    assert program is not None
    program.save(folder / "backbone.onnx")
    return folder / "backbone.onnx"
