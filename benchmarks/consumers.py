# SPDX-License-Identifier: Apache-2.0

"""Do all who read a product's model say the same of the same photos?

One checkpoint, one product: the evaluation in PyTorch, the runtime of the edge, the service and the watched folder that
stand on it, the file of ``resad bake`` in every program that reads it, and anomalib's ONNX export. Each one says a
score and a label of each photo.
"""

import csv
import io
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import openvino as ov
from jsonargparse import auto_cli
from PIL import Image

from anomalib_resad.deploy.bake import bake
from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.enrollment.files import LINES, content_hash, write_whole
from anomalib_resad.enrollment.photos import list_photos, read_pixels
from benchmarks.model_server import answer, outputs_of, request_of

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "cpp"
PRODUCT = "product"
EVALUATION, EDGE = "evaluation (PyTorch)", "edge runtime"
PACKAGES = ("anomalib-resad", "anomalib", "openvino", "openvino-model-api", "onnxruntime", "torch")


class Verdict(NamedTuple):
    """What is said of a photo."""

    score: float
    label: bool


Judge = Callable[[Sequence[Path]], list[Verdict]]


def one_by_one(judge: Callable[[Path], Verdict]) -> Judge:
    """Judge photos by what judges one."""
    return lambda photos: [judge(photo) for photo in photos]


def _verdict(outputs: Mapping[str, Any]) -> Verdict:
    return Verdict(np.asarray(outputs["pred_score"]).item(), bool(np.asarray(outputs["pred_label"]).item()))


def installed(package: str) -> bool:
    """Whether a package is there."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


# -- who reads the baked file -----------------------------------------------------------------------------------------


def openvino_model(path: Path, color: str = "rgb") -> Judge:
    """OpenVINO's Python interface, in the precision that the device chooses."""
    compiled = ov.Core().compile_model(path, "CPU")

    def judge(photo: Path) -> Verdict:
        pixels = read_pixels(photo)[None]
        found = compiled({"input": np.ascontiguousarray(pixels[..., ::-1] if color == "bgr" else pixels)})
        return _verdict({port.get_any_name(): value for port, value in found.items()})

    return one_by_one(judge)


def anomalib_inferencer(path: Path) -> Judge:
    """The ``OpenVINOInferencer`` of anomalib, which reads the photo itself."""
    from anomalib.deploy import OpenVINOInferencer  # noqa: PLC0415  # PyTorch

    inferencer = OpenVINOInferencer(path, device="CPU")
    return one_by_one(lambda photo: _verdict(vars(inferencer.predict(str(photo)))))


def model_api(path: Path) -> Judge:
    """OpenVINO's Model API, by the information that the file holds."""
    from model_api.models import AnomalyDetection  # noqa: PLC0415  # optional

    model = AnomalyDetection.create_model(str(path), device="CPU")

    def judge(photo: Path) -> Verdict:
        found = model(read_pixels(photo))
        return Verdict(float(found.pred_score), found.pred_label == "1")

    return one_by_one(judge)


def cpp_example(path: Path, folder: Path) -> Judge:
    """The example in C++, built against the headers and libraries of OpenVINO's wheel."""
    where = Path(ov.__path__[0]) / "cmake"
    configure = ["cmake", "-S", str(EXAMPLE), "-B", str(folder), f"-DOpenVINO_DIR={where}"]
    for command in (configure, ["cmake", "--build", str(folder)]):
        subprocess.run(command, check=True, capture_output=True)  # noqa: S603

    def judge(photos: Sequence[Path]) -> list[Verdict]:
        files = [folder / f"{number}.ppm" for number in range(len(photos))]
        for photo, file in zip(photos, files, strict=True):
            Image.fromarray(read_pixels(photo)).save(file)
        command = [folder / "inspect", path, *files]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
        lines = [line.rsplit(maxsplit=3) for line in printed.splitlines()]
        return [Verdict(float(score), label == "anomalous") for _, score, label, _ in lines]

    return judge


def served(model: Path) -> Judge:
    """The requests and the layout of OpenVINO Model Server, KServe and Triton, without the server."""
    return one_by_one(lambda photo: _verdict(outputs_of(*answer(model, *request_of(read_pixels(photo)[None])))))


# -- who stands on the edge runtime -----------------------------------------------------------------------------------


def rest(inferencer: ResADInferencer) -> Judge:
    """The REST API, in this process: photos as they lie on the disk, answers as JSON."""
    from fastapi.testclient import TestClient  # noqa: PLC0415  # an extra

    from anomalib_resad.deploy.api import application  # noqa: PLC0415  # an extra

    client = TestClient(application(inferencer), base_url="http://127.0.0.1")

    def judge(photo: Path) -> Verdict:
        answer = client.post(f"/v1/products/{PRODUCT}/inspect", files={"photos": (photo.name, photo.read_bytes())})
        return _told(answer.json()["results"][0])

    return one_by_one(judge)


def watched(bundle: Path, banks: Path, folder: Path) -> Judge:
    """``resad watch``, as a command, of a folder that the photos are copied into."""

    def judge(photos: Sequence[Path]) -> list[Verdict]:
        taken, found = folder / "in", folder / "found"
        taken.mkdir(parents=True)
        for number, photo in enumerate(photos):
            shutil.copy(photo, taken / f"{number}{photo.suffix}")
        options = {"bundle": bundle, "banks": banks, "product": PRODUCT, "folder": taken, "output": found}
        command = [sys.executable, "-m", "anomalib_resad.cli", "watch", "--maps=none", "--settle=0.1"]
        command += [f"--{name}={value}" for name, value in options.items()]
        lines: list[str] = []
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:  # noqa: S603
            while len(lines) < len(photos) and process.poll() is None:
                time.sleep(0.05)
                lines = (found / LINES).read_text().splitlines() if (found / LINES).is_file() else []
            process.terminate()
        rows = {int(Path(row["photo"]).stem): row for row in map(json.loads, lines)}
        return [_told(rows[number]) for number in range(len(photos))]

    return judge


def _told(row: Mapping[str, Any]) -> Verdict:
    return Verdict(row["score"], row["label"] == "anomalous")


# -- all of them ------------------------------------------------------------------------------------------------------


def baked(bundle: Path, banks: Path, folder: Path) -> dict[str, Judge]:
    """All who read the file of a product, those of them that can run here."""
    plain = bake(bundle, PRODUCT, folder / "plain", banks)
    bgr = bake(bundle, PRODUCT, folder / "bgr", banks, color="bgr")
    for_anomalib = bake(bundle, PRODUCT, folder / "anomalib", banks, pixels="float32")
    judges = {
        "OpenVINO, Python": openvino_model(plain),
        "OpenVINO, Python, BGR": openvino_model(bgr, "bgr"),
        "requests of model servers": served(plain.parents[1]),
    }
    if find_spec("anomalib"):
        judges["anomalib's OpenVINOInferencer"] = anomalib_inferencer(for_anomalib)
    if find_spec("model_api"):
        judges["OpenVINO Model API"] = model_api(plain)
    if shutil.which("cmake") and shutil.which("c++"):
        judges["OpenVINO, C++"] = cpp_example(plain, folder / "cpp")
    return judges


def on_it(bundle: Path, inferencer: ResADInferencer, folder: Path) -> dict[str, Judge]:
    """All who stand on the edge runtime, those of them that can run here."""
    judges = {"`resad watch`": watched(bundle, inferencer.banks, folder / "watch")}
    return ({"REST API": rest(inferencer)} if find_spec("fastapi") and find_spec("httpx") else {}) | judges


def of_checkpoint(checkpoint: Path, references: Sequence[Path], folder: Path, onnx: bool) -> dict[str, Judge]:
    """All who judge without a bundle."""
    from anomalib_resad.export.edge_bundle import load_model  # noqa: PLC0415  # PyTorch
    from anomalib_resad.export.parity import TorchReference  # noqa: PLC0415

    model = load_model(checkpoint)
    evaluation = TorchReference(model, references)

    def evaluate(photo: Path) -> Verdict:
        found = evaluation.predict(photo)
        return Verdict(found.score, bool(found.label))

    judges: dict[str, Judge] = {EVALUATION: one_by_one(evaluate)}
    if onnx and find_spec("onnxruntime"):
        with redirect_stdout(io.StringIO()):  # the exporter's progress
            path = model.to_onnx(folder)
        judges["ONNX Runtime, anomalib's export"] = onnx_runtime(path)
    return judges


def onnx_runtime(path: Path) -> Judge:
    """The ONNX export of anomalib, of the enrolled checkpoint: nothing writes ONNX from an OpenVINO file."""
    import onnxruntime  # noqa: PLC0415  # optional

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options)
    names = [port.name for port in session.get_outputs()]

    def judge(photo: Path) -> Verdict:
        image = read_pixels(photo)[None].transpose(0, 3, 1, 2) / np.float32(255)
        return _verdict(dict(zip(names, session.run(None, {session.get_inputs()[0].name: image}), strict=True)))

    return one_by_one(judge)


def compare(
    checkpoint: Path, bundle: Path, references: Sequence[Path], photos: Sequence[Path], onnx: bool = True
) -> tuple[dict[str, list[Verdict]], dict[str, float]]:
    """What each one says of each photo; and how long a file took to write, and its size in MB."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        judges = of_checkpoint(checkpoint, references, folder, onnx)
        inferencer = ResADInferencer(bundle, banks=folder / "banks")
        inferencer.enroll(PRODUCT, references, false_alarm_rate=None)  # by the threshold of the checkpoint, like all

        def on_the_edge(photo: Path) -> Verdict:
            found = inferencer.predict(photo, PRODUCT)
            return Verdict(found.score, bool(found.label))

        judges |= {EDGE: one_by_one(on_the_edge), **on_it(bundle, inferencer, folder)}
        judges |= baked(bundle, inferencer.banks, folder)
        make = partial(bake, bundle, PRODUCT, folder / "timed", inferencer.banks)
        seconds, size = [], 0
        for _ in range(5):
            start = time.perf_counter()
            path = make()
            seconds.append(time.perf_counter() - start)
            size = sum(each.stat().st_size for each in path.parent.iterdir())
        said = {who: judge(photos) for who, judge in judges.items()}
    return said, {"bake_s": statistics.median(seconds), "baked_mb": size / 1e6}


def rows_of(said: Mapping[str, Sequence[Verdict]]) -> list[dict[str, Any]]:
    """A row for each one: the largest difference from the evaluation and the edge, and how many labels are the same."""

    def furthest(verdicts: Sequence[Verdict], other: str) -> float:
        return max(abs(one.score - each.score) for one, each in zip(verdicts, said[other], strict=True))

    return [
        {
            "who": who,
            "photos": len(verdicts),
            "from_evaluation": furthest(verdicts, EVALUATION),
            "from_edge": furthest(verdicts, EDGE),
            "same_labels": sum(one.label == each.label for one, each in zip(verdicts, said[EVALUATION], strict=True)),
        }
        for who, verdicts in said.items()
    ]


def run(checkpoint: Path, references: Path, photos: Path, output: Path, shots: int = 8, most: int = 25) -> None:
    """Write what each one says: ``consumers.csv`` and ``consumers.json``.

    Args:
        checkpoint: A trained ResAD.
        references: Folder of good photos, of which the first ones are enrolled.
        photos: Folder of photos to inspect.
        output: Folder to write to.
        shots: Photos to enroll.
        most: Photos to inspect, evenly spaced.
    """
    from anomalib_resad.export.edge_bundle import export_bundle  # noqa: PLC0415  # PyTorch
    from benchmarks.machine import cpu  # noqa: PLC0415

    enrolled, every = list_photos(references)[:shots], list_photos(photos)
    chosen = every[:: max(1, -(-len(every) // most))]
    with TemporaryDirectory() as folder:
        bundle = export_bundle(checkpoint, Path(folder) / "bundle")
        said, cost = compare(checkpoint, bundle, enrolled, chosen)
    table = io.StringIO()
    rows = rows_of(said)
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    record = {
        "checkpoint": {"name": checkpoint.name, "sha256": content_hash(checkpoint)},
        "references": [path.relative_to(references).as_posix() for path in enrolled],
        "photos": [path.relative_to(photos).as_posix() for path in chosen],
        "versions": {name: version(name) for name in PACKAGES if installed(name)},
        "cpu": cpu(),
        **cost,
        "verdicts": {who: [list(verdict) for verdict in verdicts] for who, verdicts in said.items()},
    }
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "consumers.csv", table.getvalue().encode())
    write_whole(output / "consumers.json", (json.dumps(record, indent=1) + "\n").encode())
    print(table.getvalue())


if __name__ == "__main__":
    auto_cli({"run": run}, as_positional=False)
