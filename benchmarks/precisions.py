# SPDX-License-Identifier: Apache-2.0

"""What bfloat16 and 8 bits change: image AUROC, labels and scores of bundles with a ready head, beside float32."""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
import openvino as ov
import pandas as pd
from jsonargparse import auto_cli
from rich.progress import track

from anomalib_resad import ResAD
from anomalib_resad.deploy.bundle import Precision
from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.enrollment.draws import draw_references
from anomalib_resad.enrollment.files import write_whole
from anomalib_resad.enrollment.photos import list_photos
from anomalib_resad.enrollment.ranking import auroc
from anomalib_resad.export.edge_bundle import convert, write_bundle
from anomalib_resad.ready_heads import READY
from benchmarks.settings import PACKAGES, cpu

CAPABILITIES = ("CPU", "OPTIMIZATION_CAPABILITIES")


def measured(bundles: dict[str, ResADInferencer], references: Sequence[Path], photos: Sequence[Path]) -> list[Any]:
    """One row for each precision; each has references and a threshold of its own, as on a device."""
    labels = [photo.parent.name != "good" for photo in photos]
    found = {}
    for precision, inferencer in bundles.items():
        inferencer.enroll("product", references, replace_existing=True)
        found[precision] = [inferencer.predict(photo, "product") for photo in photos]
    exact = found["fp32"]
    return [
        {
            "precision": precision,
            "photos": len(photos),
            "image_auroc": auroc([each.raw_score for each in theirs], labels),
            "labels_changed": sum(a.label != b.label for a, b in zip(theirs, exact, strict=True)),
            "score_max": max(abs(a.score - b.score) for a, b in zip(theirs, exact, strict=True)),
            "map_mean": float(np.mean([np.abs(a.map - b.map).mean() for a, b in zip(theirs, exact, strict=True)])),
        }
        for precision, theirs in found.items()
    ]


def precisions(
    data: Path,
    products: tuple[str, ...],
    output: Path,
    backbone: str = "resnet18",
    weights: Path | None = None,
    shots: int = 4,
    draws: int = 3,
    most: int = 60,
    threads: int = 2,
) -> None:
    """Write ``precisions.csv`` and ``precisions.json``.

    8 bits are calibrated on the good photos of the other products that are measured.

    Args:
        data: Folder of the products, each with `train/good` and `test`.
        products: Names of their folders, two or more.
        output: Folder to write to.
        backbone: timm name of a backbone with a ready head.
        weights: File with its weights.
        shots: References.
        draws: Draws of references.
        most: Photos to inspect of each product, evenly spaced.
        threads: CPU threads of OpenVINO.
    """
    model = ResAD(backbone, weights=weights, checkpoint=READY, visualizer=False).eval()
    converted = convert(model)
    rows = []
    with TemporaryDirectory() as folder:
        bundles = {}
        for precision in get_args(Precision):
            # A CPU without bfloat16 computes such a bundle in float32, which would say that nothing changes.
            if precision != "int8" and (precision != "bf16" or "BF16" in ov.Core().get_property(*CAPABILITIES)):
                written = write_bundle(model, converted, Path(folder) / precision, precision)
                bundles[precision] = ResADInferencer(written, threads=threads)
        for product in track(products, "Inspecting"):
            others = [list_photos(data / each / "train" / "good")[:20] for each in products if each != product]
            path = Path(folder) / f"int8_{product}"
            write_bundle(model, converted, path, "int8", [photo for each in others for photo in each])
            every = list_photos(data / product / "test")
            photos = every[:: max(1, -(-len(every) // most))]
            for seed in range(draws):
                good = [str(photo) for photo in list_photos(data / product / "train" / "good")]
                references = [Path(name) for name in draw_references(good, shots, seed, product)]
                found = measured(bundles | {"int8": ResADInferencer(path, threads=threads)}, references, photos)
                rows += [{"product": product, "draw": seed} | row for row in found]
            output.mkdir(parents=True, exist_ok=True)
            table = pd.DataFrame(rows).to_csv(index=False, float_format="%.4g")
            write_whole(output / "precisions.csv", table.encode())
    about: dict[str, Any] = {
        "backbone": backbone,
        "weights": weights and weights.name,
        "shots": shots,
        "most": most,
        "cpu": cpu(),
    }
    about |= {"versions": {name: version(name) for name in (*PACKAGES, "openvino", "nncf")}}
    write_whole(output / "precisions.json", (json.dumps(about, indent=2) + "\n").encode())
    print(pd.DataFrame(rows).groupby(["product", "precision"]).mean(numeric_only=True))


if __name__ == "__main__":
    auto_cli(precisions, as_positional=False)
