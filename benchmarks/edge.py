# SPDX-License-Identifier: Apache-2.0

"""What the edge costs: enrollment and inspection in a process without PyTorch, against the encoder and Patchcore.

Parity is measured by ``resad parity``, whose table is written beside the figures.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from jsonargparse import auto_cli
from PIL import Image
from rich.console import Console
from rich.table import Table

from anomalib_resad.deploy.bank import Bank
from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.enrollment.files import write_whole
from anomalib_resad.enrollment.photos import list_photos, read_pixels
from anomalib_resad.enrollment.ranking import auroc
from anomalib_resad.enrollment.rotations import ORIENTATIONS, Rotations

REPEATS = 7
PATCHCORE_SIZE = (224, 224)


def milliseconds(action: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median time of an action, after one that is not counted."""
    action()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def memory_mb() -> float:
    """Memory that this process holds at the moment."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def auroc_of(inferencer: ResADInferencer, product: str, photos: Sequence[Path]) -> float | None:
    """Image AUROC on photos whose folder says whether they are good."""
    scores = [inferencer.predict(photo, product).raw_score for photo in photos]
    return auroc(scores, [photo.parent.name != "good" for photo in photos])


def device(
    bundle: Path,
    references: Path,
    photos: Path,
    output: Path,
    threads: int = 2,
    predictions: int = 1000,
    patchcore: Path | None = None,
    most: int = 25,
) -> None:
    """Measure one bundle in this process, which must not import PyTorch.

    Args:
        bundle: The bundle.
        references: Folder of photos to enroll.
        photos: Folder of photos to inspect.
        output: JSON file to write.
        threads: CPU threads of OpenVINO.
        predictions: Predictions over 20 products, one after the other.
        patchcore: Patchcore exported to OpenVINO with the same backbone and references, to time in turn.
        most: Photos to inspect, evenly spaced.
    """
    chosen, every = list_photos(references), list_photos(photos)
    tests = every[:: max(1, -(-len(every) // most))]
    with TemporaryDirectory() as banks:
        start = time.perf_counter()
        inferencer = ResADInferencer(bundle, banks=banks, threads=threads)
        loading = time.perf_counter() - start
        bank, enrolling = _enroll(inferencer, chosen)
        pixels = read_pixels(tests[0])
        result: dict[str, Any] = {
            "backbone": inferencer.manifest.backbone,
            "precision": inferencer.manifest.precision,
            "threads": threads,
            "bundle_mb": sum(path.stat().st_size for path in bundle.glob("*.*")) / 1e6,
            "bank_mb": bank.size / 1e6,
            "load_s": loading,
            "rotations": bank.rotations,
            **enrolling,
            "encoder_ms": milliseconds(lambda: inferencer.encode(pixels[None])),
            "photo_ms": milliseconds(lambda: inferencer.predict(pixels, "try")),
            "photo_rotated_ms": milliseconds(lambda: inferencer.predict(pixels, "rotated")),
        }
        result["ratio"] = result["photo_ms"] / result["encoder_ms"]
        if patchcore is not None:
            result |= _patchcore_ms(patchcore, pixels, threads)
        result["coreset"] = _coreset(inferencer, chosen, tests, pixels)
        if predictions:
            result["many"] = _many_products(inferencer, chosen, tests, predictions)
    assert "torch" not in sys.modules
    write_whole(output, (json.dumps(result, indent=2) + "\n").encode())


def _enroll(inferencer: ResADInferencer, photos: Sequence[Path]) -> tuple[Bank, dict[str, float]]:
    """Enroll photos as ``try``, as ``plain`` in one orientation, and as ``rotated`` in all: a bank, and seconds."""

    def timed(name: str, rotations: Rotations | None = None) -> tuple[Bank, float]:
        start = time.perf_counter()
        bank = inferencer.enroll(name, photos, rotations=rotations, replace_existing=True)
        return bank, time.perf_counter() - start

    bank, first = timed("try")
    seconds = {"enroll_first_s": first, "enroll_s": statistics.median(timed("try")[1] for _ in range(3))}
    for name, rotations in (("plain", 1), ("rotated", ORIENTATIONS)):
        seconds[f"enroll_{name}_s"] = statistics.median(timed(name, rotations)[1] for _ in range(3))
    return bank, seconds


def enrollment_table(results: Mapping[str, Mapping[str, Any]], photos: int) -> str:
    """Seconds to enroll photos, as CSV: a row for each backbone, in one orientation and in all."""
    rows = [
        f"{backbone},{photos},{rotations},{result[f'enroll_{name}_s']:.4g}"
        for backbone, result in results.items()
        for name, rotations in (("plain", 1), ("rotated", ORIENTATIONS))
    ]
    return "\n".join(["backbone,photos,orientations,seconds", *rows, ""])


def _patchcore_ms(path: Path, pixels: np.ndarray, threads: int) -> dict[str, float]:
    import openvino as ov  # noqa: PLC0415

    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    request = ov.Core().compile_model(path, "CPU", config).create_infer_request()
    resized = np.asarray(Image.fromarray(pixels).resize(PATCHCORE_SIZE), dtype=np.float32)
    image = np.ascontiguousarray(resized.transpose(2, 0, 1)[None]) / 255
    return {"patchcore_ms": milliseconds(lambda: request.infer([image]))}


def _coreset(
    inferencer: ResADInferencer, references: Sequence[Path], photos: Sequence[Path], pixels: np.ndarray
) -> list[dict[str, Any]]:
    """The effect of searching less: size of what is searched, time, image AUROC."""
    rows = []
    for most in (None, 4000, 1000):
        start = time.perf_counter()
        inferencer.enroll("thin", references, max_patches=most, replace_existing=True)
        rows.append(
            {
                "max_patches": most,
                "bank_mb": sum(level.nbytes for level in inferencer.searched("thin")) / 1e6,
                "enroll_s": time.perf_counter() - start,
                "photo_ms": milliseconds(lambda: inferencer.predict(pixels, "thin")),
                "image_auroc": auroc_of(inferencer, "thin", photos),
            }
        )
    return rows


def _many_products(
    inferencer: ResADInferencer, references: Sequence[Path], photos: Sequence[Path], predictions: int
) -> dict[str, Any]:
    """Twenty products, another one at each photo: does anything leak from one to the next, or in memory?"""
    names = [f"product {number}" for number in range(20)]
    for number, name in enumerate(names):
        inferencer.enroll(name, [references[number % len(references)], photos[number % len(photos)]])
    pairs = [(names[index % 20], photos[index // 20 % 2]) for index in range(predictions)]
    first: dict[tuple[str, Path], float] = {}
    before, changed = 0.0, 0
    for index, pair in enumerate(pairs):
        score = inferencer.predict(pair[1], pair[0]).raw_score
        changed += first.setdefault(pair, score) != score
        if index == 99:
            before = memory_mb()
    return {"products": 20, "predictions": predictions, "changed_scores": changed, "growth_mb": memory_mb() - before}


def export_patchcore(backbone: str, references: Path, folder: Path) -> Path:
    """Fit anomalib's Patchcore on the references and export it; untrained weights cost the same time.

    For one photo of one size, which is resized before the clock starts: an export for any batch size would only take
    the example's.
    """
    from anomalib.data import Folder  # noqa: PLC0415  # PyTorch
    from anomalib.engine import Engine  # noqa: PLC0415
    from anomalib.models import Patchcore  # noqa: PLC0415

    model = Patchcore(backbone=backbone, pre_trained=False, visualizer=False, evaluator=False)
    data = Folder(
        "references", normal_dir=references.absolute(), train_batch_size=4, num_workers=0, val_split_mode="none"
    )
    engine = Engine(default_root_dir=folder, enable_progress_bar=False, limit_val_batches=0)
    engine.fit(model, datamodule=data)
    return model.to_openvino(folder, input_size=PATCHCORE_SIZE, onnx_kwargs={"dynamic_shapes": None})


def _apart(output: Path, **arguments: object) -> dict[str, Any]:
    """What :func:`device` measures in a process of its own."""
    options = [str(word) for name, value in arguments.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "benchmarks.edge", "device", "--output", str(output), *options]
    subprocess.run(command, check=True)  # noqa: S603
    return json.loads(output.read_text())


def run(
    checkpoint: Path,
    references: Path,
    photos: Path,
    output: Path,
    calibration: Path | None = None,
    most: int = 25,
    threads: int = 2,
    predictions: int = 1000,
) -> None:
    """Measure a checkpoint on the edge: parity of all precisions, enrollment, inspection.

    The WideResNet50 is untrained and measured for its time alone.

    Args:
        checkpoint: A trained ResAD.
        references: Folder of good photos to enroll.
        photos: Folder of test photos, the good ones in a folder `good`.
        output: Folder for ``parity.json``, ``edge.json``, and ``enrollment.csv`` with the time that enrolling takes.
        calibration: Folder of good photos to calibrate INT8 on.
        most: Photos to compare on and to inspect, evenly spaced.
        threads: CPU threads of OpenVINO.
        predictions: Predictions over 20 products.
    """
    from anomalib_resad import ResAD  # noqa: PLC0415  # PyTorch
    from anomalib_resad.export.edge_bundle import convert, load_model, write_bundle  # noqa: PLC0415
    from anomalib_resad.export.parity import compare, table  # noqa: PLC0415
    from benchmarks.machine import cpu  # noqa: PLC0415

    output.mkdir(parents=True, exist_ok=True)
    every = list_photos(photos)
    chosen = every[:: max(1, -(-len(every) // most))]
    quantized = list_photos(calibration) if calibration else None
    parity = compare(checkpoint, list_photos(references), chosen, quantized, threads=threads) | {"cpu": cpu()}
    write_whole(output / "parity.json", (json.dumps(parity, indent=2) + "\n").encode())
    Console(width=140).print(table(parity["rows"]))
    wide = ResAD(backbone="wide_resnet50_2", pre_trained=False, visualizer=False).eval()
    results = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        for model, count in ((load_model(checkpoint), predictions), (wide, 0)):
            backbone = model.hparams["backbone"]
            bundle = write_bundle(model, convert(model), folder / backbone, "fp32")
            patchcore = export_patchcore(backbone, references, folder / f"patchcore_{backbone}")
            given = {"bundle": bundle, "references": references, "photos": photos, "patchcore": patchcore}
            numbers = {"threads": threads, "predictions": count, "most": most}
            results[backbone] = _apart(folder / "device.json", **given, **numbers)
    record = {key: parity[key] for key in ("checkpoint", "references", "photos", "versions", "cpu")}
    write_whole(output / "edge.json", (json.dumps(record | {"results": results}, indent=2) + "\n").encode())
    write_whole(output / "enrollment.csv", enrollment_table(results, len(list_photos(references))).encode())
    shown = Table("", *results)
    for key, value in next(iter(results.values())).items():
        if isinstance(value, float):
            shown.add_row(key, *(f"{each[key]:.3g}" for each in results.values()))
    Console().print(shown, {key: each.get(kind) for key, each in results.items() for kind in ("many", "coreset")})


if __name__ == "__main__":
    auto_cli({"run": run, "device": device}, as_positional=False)
