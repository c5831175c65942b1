# SPDX-License-Identifier: Apache-2.0

"""Several processes that add photos to one product at once, one photo at a time: what is there in the end.

A tiny model stands in: adding waits for the lock and for the disk, whatever the model is.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from jsonargparse import auto_cli
from PIL import Image
from rich.console import Console

from anomalib_resad.deploy import ResADInferencer

ADD = """
import sys
from anomalib_resad.deploy import ResADInferencer
inferencer = ResADInferencer(sys.argv[1], banks=sys.argv[2], threads=1)
for photo in sys.argv[3:]:
    try:
        inferencer.add("tiles", [photo])
    except ValueError as error:
        print(f"{photo}: {error}")
"""


def run(
    output: Path = Path("benchmarks/results/adds/adds.json"),
    bundle: Path | None = None,
    processes: int = 4,
    adds: int = 50,
) -> None:
    """Add photos, and write how many are in the bank, and how many were refused.

    Args:
        output: JSON file to write.
        bundle: A bundle; by default an untrained model is exported.
        processes: How many add at once.
        adds: How many photos each of them adds.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        bundle = bundle or _untrained(folder / "bundle")
        random, photos = np.random.default_rng(0), []
        for number in range(processes * adds + 1):
            photos.append(folder / f"{number:04}.png")
            Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(photos[-1])
        inferencer = ResADInferencer(bundle, banks=folder / "banks", threads=1)
        inferencer.enroll("tiles", photos[:1], rotations=1)
        start = time.perf_counter()
        running = [
            subprocess.Popen(  # noqa: S603  # ours
                [
                    sys.executable,
                    "-c",
                    ADD,
                    str(bundle),
                    str(inferencer.banks),
                    *map(str, photos[1 + each :: processes]),
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
            for each in range(processes)
        ]
        said = [line for process in running for line in process.communicate()[0].splitlines()]
        seconds = time.perf_counter() - start
        failed = [process.returncode for process in running if process.returncode]
        kept = {each.name for each in inferencer.bank("tiles").references}
        at_once = inferencer.enroll("at once", photos, rotations=1)
        row = {
            "processes": processes,
            "adds of each": adds,
            "photos": len(photos),
            "in the bank": len(kept),
            "lost": sorted({photo.name for photo in photos} - kept),
            "refused": said,
            "processes that failed": failed,
            "as enrolled at once": inferencer.bank("tiles").arrays.keys() == at_once.arrays.keys()
            and all(
                np.array_equal(at_once.arrays[key], value) for key, value in inferencer.bank("tiles").arrays.items()
            ),
            "left beside": sorted(path.name for path in inferencer.banks.glob(".*.part")),
            "seconds": round(seconds, 1),
        }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(row, indent=2) + "\n")
    Console().print(f"{output}: {row['in the bank']} of {row['photos']} photos, {len(said)} refused.")


def _untrained(output: Path) -> Path:
    from anomalib_resad import ResAD  # noqa: PLC0415  # PyTorch, which the adding processes are without
    from anomalib_resad.export.edge_bundle import convert, write_bundle  # noqa: PLC0415

    model = ResAD(backbone="resnet18", pre_trained=False, estimator="distance", image_size=(64, 64)).eval()
    return write_bundle(model, convert(model), output, "fp32")


if __name__ == "__main__":
    auto_cli(run, as_positional=False)
