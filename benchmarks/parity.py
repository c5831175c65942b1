# SPDX-License-Identifier: Apache-2.0

"""How far an exported model is from the evaluation of the checkpoint, on photos of yours.

Evaluation means: the pre-processor's own transform, the model, the post-processor. The export runs in anomalib's
``OpenVINOInferencer``, in float32 and in whatever precision OpenVINO chooses by itself on this CPU.
"""

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data.utils.image import get_image_filenames
from anomalib.deploy import OpenVINOInferencer
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track
from rich.table import Table

from anomalib_resad import ResAD
from anomalib_resad.photos import read_photo
from benchmarks.settings import write_whole

PRECISIONS: dict[str, dict[str, str]] = {"f32": {"INFERENCE_PRECISION_HINT": "f32"}, "default": {}}


def evaluate(model: ResAD, photo: Path) -> tuple[float, bool, np.ndarray]:
    """Score, label and map of a photo as in test and predict."""
    image = model.pre_processor.transform(read_photo(photo)[None])  # type: ignore[union-attr, operator]
    with torch.no_grad():
        result = model.post_processor(model.model(image))  # type: ignore[misc]
    return result.pred_score.item(), bool(result.pred_label), result.anomaly_map.squeeze().numpy()


def measure(path: Path, config: dict[str, str], photos: list[Path], model: ResAD) -> dict[str, Any]:
    """Differences of score (0..1), label and map (0..1), and the exported model's time per photo in milliseconds."""
    inferencer = OpenVINOInferencer(path, device="CPU", config=config)
    rows, seconds = [], []
    for photo in track(photos, description=f"{path.name} {config or 'default'}"):
        score, label, anomaly_map = evaluate(model, photo)
        start = time.perf_counter()
        theirs = inferencer.predict(photo)
        seconds.append(time.perf_counter() - start)
        other = np.asarray(theirs.anomaly_map).squeeze()
        difference = np.abs(other - anomaly_map)
        rows.append(
            (
                abs(float(np.asarray(theirs.pred_score).squeeze()) - score),
                bool(np.asarray(theirs.pred_label).squeeze()) == label,
                difference.max(),
                difference.mean(),
                np.corrcoef(other.ravel(), anomaly_map.ravel())[0, 1],
            )
        )
    scores, labels, maxima, means, correlations = (np.array(column) for column in zip(*rows, strict=True))
    return {
        "precision": str(inferencer.model.get_property("INFERENCE_PRECISION_HINT").to_string()),
        "score_max": float(scores.max()),
        "same_labels": float(labels.mean()),
        "map_max": float(maxima.max()),
        "map_mean": float(means.mean()),
        "map_correlation_min": float(correlations.min()),
        "milliseconds_median": 1000 * float(np.median(seconds)),
    }


def main(checkpoint: Path, exported: Path, photos: Path, output: Path, most: int = 25) -> None:
    """Compare an exported model with its checkpoint.

    Args:
        checkpoint: The enrolled checkpoint that was exported.
        exported: OpenVINO ``.xml`` file.
        photos: Folder of photos.
        output: JSON file to write.
        most: Photos to take, evenly spaced.
    """
    model = ResAD.load_from_checkpoint(checkpoint).eval()
    assert isinstance(model, ResAD)
    paths = get_image_filenames(photos)
    paths = paths[:: max(1, len(paths) // most)][:most]
    results = {name: measure(exported, config, paths, model) for name, config in PRECISIONS.items()}
    table = Table("precision", "score max", "same labels", "map max", "map mean", "least map correlation", "ms")
    for name, row in results.items():
        figures = [row[key] for key in row if key != "precision"]
        table.add_row(f"{name} ({row['precision']})", *(f"{figure:.3g}" for figure in figures))
    Console().print(table)
    packages = {name: version(name) for name in ("anomalib", "torch", "openvino", "anomalib-resad")}
    record = {"photos": [path.name for path in paths], "versions": packages, "results": results}
    write_whole(output, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
