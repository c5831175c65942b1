# SPDX-License-Identifier: Apache-2.0

"""`resad watch` is killed again and again while a camera writes photos: is each of them in the results once?

python -m benchmarks.watch_kills --bundle bundle --output benchmarks/results/watch
"""

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.enrollment.files import LINES
from benchmarks.products import make_product

KILLS, PHOTOS = 20, 400
SECONDS = 600  # in which all of it has to be done


def camera(photos: list[Path], folder: Path, pause: float) -> None:
    """Write photos under new names, each in two halves, as over a slow network."""
    for index in range(PHOTOS):
        content = photos[index % len(photos)].read_bytes()
        with (folder / f"{index:05d}.png").open("wb", buffering=0) as file:
            file.write(content[: len(content) // 2])
            time.sleep(pause / 2)
            file.write(content[len(content) // 2 :])
        time.sleep(pause / 2)


def whole_rows(path: Path) -> int:
    """Rows whose line has ended."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def measure(bundle: Path, work: Path) -> dict[str, object]:
    """Kill the command :data:`KILLS` times, let it finish, and count."""
    make_product(work / "products", "tiles", train=4, good=8, defective=2)
    photos = sorted((work / "products" / "tiles" / "test").rglob("*.png"))
    inferencer = ResADInferencer(bundle, banks=work / "banks")
    inferencer.enroll("tiles", work / "products" / "tiles" / "train" / "good")
    folder, rows = work / "in", work / "found" / LINES
    folder.mkdir()
    options = {"bundle": bundle, "banks": work / "banks", "product": "tiles", "folder": folder, "output": rows.parent}
    command = [
        sys.executable,
        "-m",
        "anomalib_resad.cli",
        "watch",
        *(f"--{key}={value}" for key, value in options.items()),
    ]
    threading.Thread(target=camera, args=(photos, folder, 0.15), daemon=True).start()
    draws, halves, end = random.Random(0), 0, time.monotonic() + SECONDS  # noqa: S311  # no secret
    for turn in range(KILLS + 1):
        before = whole_rows(rows)
        goal = PHOTOS if turn == KILLS else min(before + 1, PHOTOS)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603  # our own command
        while whole_rows(rows) < goal and time.monotonic() < end:
            time.sleep(0.005)
        if turn < KILLS:
            time.sleep(draws.uniform(0, 0.5))
            process.kill()
        else:
            process.terminate()
        status = process.wait()
        halves += rows.exists() and not rows.read_bytes().endswith(b"\n")
        print(f"{turn}: {whole_rows(rows)} rows, status {status}", flush=True)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    counts = Counter(row["photo"] for row in found)
    truth = {path.name: inferencer.predict(path, "tiles").score for path in folder.iterdir()}
    return {
        "kills": KILLS,
        "photos": PHOTOS,
        "rows": len(found),
        "missing": len(truth.keys() - counts.keys()),
        "more_than_once": sum(count > 1 for count in counts.values()),
        "failed": sum(row["error"] is not None for row in found),
        "half_rows_cut_off": halves,
        "scores_that_differ": sum(row["score"] != truth[row["photo"]] for row in found),
        "last_status": status,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with TemporaryDirectory() as made:
        result = measure(arguments.bundle.resolve(), Path(made))
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "kills.json").write_text(json.dumps(result, indent=2) + "\n")
    print(result)
