# SPDX-License-Identifier: Apache-2.0

"""How far each runtime and precision is from PyTorch, on photos of yours. Needs PyTorch."""

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from anomalib.deploy import OpenVINOInferencer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from anomalib_resad.deploy.bundle import DETECTOR, ENCODER, Precision
from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.deploy.messages import print_table
from anomalib_resad.deploy.prediction import Prediction
from anomalib_resad.enrollment.files import write_whole
from anomalib_resad.enrollment.photos import list_photos
from anomalib_resad.enrollment.ranking import auroc
from anomalib_resad.enrollment.references import read_references
from anomalib_resad.export.edge_bundle import convert, load_model, write_bundle
from anomalib_resad.export.halves import encoder_inputs, trace
from anomalib_resad.few_shot_references import store
from anomalib_resad.lightning_model import ResAD
from anomalib_resad.method.bank_record import BankRecord
from anomalib_resad.reference_rows import product_size, read_photo, reference_rows

COLUMNS = {
    "score_max": "score max",
    "score_mean": "score mean",
    "map_max": "map max",
    "map_mean": "map mean",
    "map_correlation_min": "map corr.",
    "same_labels": "same labels",
    "image_auroc": "AUROC",
    "milliseconds": "ms/photo",
}
PACKAGES = ("anomalib-resad", "torch", "openvino", "nncf", "onnxruntime")
STOCK = "anomalib's inferencer"


class OnnxInferencer(ResADInferencer):
    """The same runtime on ONNX files, for comparison.

    Args:
        bundle (Path): A bundle of the same model.
        onnx (Path): Folder of ``encoder.onnx`` and ``detector.onnx``.
    """

    def __init__(self, bundle: Path, onnx: Path) -> None:
        import onnxruntime  # noqa: PLC0415  # optional

        super().__init__(bundle, banks=onnx)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._sessions = {
            name: onnxruntime.InferenceSession(str((onnx / name).with_suffix(".onnx")), options)
            for name in (ENCODER, DETECTOR)
        }

    def _run(self, file: str, inputs: list[np.ndarray]) -> list[np.ndarray]:
        session = self._sessions[file]
        names = [port.name for port in session.get_inputs()]
        return session.run(None, dict(zip(names, inputs, strict=True)))


class TorchReference:
    """The evaluation of the checkpoint: the pre-processor's own transform, the model, the post-processor."""

    def __init__(self, model: ResAD, references: Sequence[Path]) -> None:
        self.model = model
        read = read_references(references)
        torch_model, before = model.model, model.pre_processor
        size = product_size(torch_model, read.sizes)
        rows, orientations = reference_rows(torch_model, before, read.values(), model.hparams["rotations"], size)
        files = tuple((each.name, each.sha256) for each in read)
        record = BankRecord(files=files, photos=len(read), rotations=orientations, image_size=size)
        store(torch_model, before, model.post_processor, rows, record)

    def _image(self, photo: Path) -> torch.Tensor:
        return self.model.pre_processor.transform(read_photo(str(photo))[None])  # type: ignore[union-attr, operator]

    def predict(self, photo: Path) -> Prediction:
        """Inspect a photo."""
        with torch.no_grad():
            raw = self.model.model(self._image(photo))
            result = self.model.post_processor(raw)  # type: ignore[misc]
        score = float(result.pred_score)
        return Prediction(score, bool(result.pred_label), result.anomaly_map[0, 0].numpy(), float(raw.pred_score))


def stock(model: ResAD, folder: Path) -> Callable[[Path], Prediction]:
    """Anomalib's own way: one file with the bank inside, its own inferencer, the precision that the device chooses."""
    with redirect_stdout(StringIO()):  # the exporter's progress
        path = model.to_openvino(folder)
    inferencer = OpenVINOInferencer(path, device="CPU")

    def predict(photo: Path) -> Prediction:
        result: Any = inferencer.predict(str(photo))
        score, label = (np.asarray(value).item() for value in (result.pred_score, result.pred_label))
        return Prediction(score, bool(label), np.asarray(result.anomaly_map).squeeze(), math.nan)

    return predict


def write_onnx(model: ResAD, folder: Path) -> None:
    """Both halves as ONNX files."""
    encoder, detector, levels = trace(model)
    features, rows = ([f"{kind}_{level}" for level in range(len(levels))] for kind in ("features", "rows"))
    parts = (
        (ENCODER, encoder, encoder_inputs(model), features),
        (DETECTOR, detector, [*features, *rows], ["score", "map"]),
    )
    for name, traced, inputs, outputs in parts:
        path = (folder / name).with_suffix(".onnx")
        torch.onnx.export(
            traced, f=path, dynamo=True, opset_version=18, input_names=inputs, output_names=outputs, verbose=False
        )


def labels_of(photos: Sequence[Path]) -> list[bool] | None:
    """Whether each photo is anomalous: not in a folder ``good``. ``None`` where there is no such folder."""
    labels = [path.parent.name != "good" for path in photos]
    return labels if len(set(labels)) == 2 else None


def _timed(predict: Callable[[Path], Prediction], photos: Sequence[Path], name: str) -> tuple[list[Prediction], float]:
    """Predictions, and the median time in milliseconds, after one photo that is not counted."""
    predict(photos[0])
    results, seconds = [], []
    for photo in track(photos, description=name):
        start = time.perf_counter()
        results.append(predict(photo))
        seconds.append(time.perf_counter() - start)
    return results, 1000 * statistics.median(seconds)


def _row(theirs: list[Prediction], ours: list[Prediction], labels: list[bool] | None) -> dict[str, Any]:
    scores = np.array([abs(a.score - b.score) for a, b in zip(theirs, ours, strict=True)])
    maps = [np.abs(a.map - b.map) for a, b in zip(theirs, ours, strict=True)]
    correlations = [np.corrcoef(a.map.ravel(), b.map.ravel())[0, 1] for a, b in zip(theirs, ours, strict=True)]
    known = [a.label == b.label for a, b in zip(theirs, ours, strict=True) if a.label is not None]
    return {
        "score_max": float(scores.max()),
        "score_mean": float(scores.mean()),
        "map_max": float(max(each.max() for each in maps)),
        "map_mean": float(np.mean([each.mean() for each in maps])),
        "map_correlation_min": float(min(correlations)),
        "same_labels": float(np.mean(known)) if known else None,
        "image_auroc": auroc([each.score for each in theirs], labels) if labels else None,
    }


def _predict(runtime: ResADInferencer, product: str, photo: Path) -> Prediction:
    return runtime.predict(photo, product)


def compare(
    checkpoint: Path,
    references: Sequence[Path],
    photos: Sequence[Path],
    calibration: Sequence[Path] | None = None,
    product: str = "product",
    threads: int | None = None,
) -> dict[str, Any]:
    """Export a checkpoint in every precision, enroll the same photos in each, and compare them with PyTorch.

    Args:
        checkpoint (Path): A trained ResAD.
        references (Sequence[Path]): Good photos to enroll.
        photos (Sequence[Path]): Photos to compare on; those of a folder ``good`` are the good ones, if there is one.
        calibration (Sequence[Path] | None): Photos for INT8, which is left out without.
        product (str): Name of the product.
        threads (int | None): CPU threads of OpenVINO.

    Returns:
        dict[str, Any]: ``rows`` per runtime: differences of score and map, both on the scale of 0 to 1 that users see.
    """
    model, labels = load_model(checkpoint), labels_of(photos)
    rows: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as folder, Console(stderr=True).status("Exporting") as status:
        converted = convert(model)
        runtimes: dict[str, ResADInferencer] = {}
        precisions: list[Precision] = ["fp32", "fp16", *(["int8"] if calibration else [])]  # type: ignore[list-item]
        for precision in precisions:
            photos_for = calibration if precision == "int8" else None
            bundle = write_bundle(model, converted, Path(folder) / precision, precision, photos_for)
            runtimes[f"OpenVINO {precision.upper()}"] = ResADInferencer(bundle, threads=threads)
        if find_spec("onnxruntime"):
            onnx = Path(folder) / "onnx"
            onnx.mkdir()
            write_onnx(model, onnx)
            runtimes = {"ONNX": OnnxInferencer(Path(folder) / "fp32", onnx), **runtimes}
        status.stop()
        ours, milliseconds = _timed(TorchReference(model, references).predict, photos, "torch")
        rows["torch"] = _row(ours, ours, labels) | {"milliseconds": milliseconds}
        predictors: dict[str, Callable[[Path], Prediction]] = {}
        for name, runtime in runtimes.items():
            runtime.enroll(product, references, false_alarm_rate=None)  # compared at the model's threshold
            predictors[name] = partial(_predict, runtime, product)
        predictors[STOCK] = stock(model, Path(folder) / "stock")
        for name, predict in predictors.items():
            theirs, milliseconds = _timed(predict, photos, name)
            rows[name] = _row(theirs, ours, labels) | {"milliseconds": milliseconds}
    return {
        "checkpoint": checkpoint.name,
        "references": [path.name for path in references],
        "photos": [path.name for path in photos],
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "rows": rows,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def table(rows: dict[str, dict[str, Any]]) -> Table:
    """The comparison as a table."""
    shown = Table("runtime", *COLUMNS.values())
    for name, row in rows.items():
        figures = [row.get(key) for key in COLUMNS]
        shown.add_row(name, *("-" if figure is None else f"{figure:.3g}" for figure in figures))
    return shown


def parity(
    checkpoint: Path,
    references: Path,
    photos: Path,
    calibration: Path | None = None,
    output: Path | None = None,
    most: int = 25,
) -> None:
    """Print :func:`compare` of folders, and write it to a file; the arguments are those of ``resad parity``.

    Raises:
        ValueError: If there is nothing to compare, or the checkpoint cannot be exported.
    """
    if most < 1:
        msg = f"most={most} must be at least 1."
        raise ValueError(msg)
    paths = list_photos(photos)
    chosen = paths[:: max(1, -(-len(paths) // most))]
    result = compare(checkpoint, list_photos(references), chosen, list_photos(calibration) if calibration else None)
    print_table(table(result["rows"]))
    if output is not None:
        write_whole(output, (json.dumps(result, indent=2) + "\n").encode())
