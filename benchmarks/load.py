# SPDX-License-Identifier: Apache-2.0

"""Photos a second and waiting times by clients, against anomalib's OpenVINOInferencer, and a soak whose memory is seen.

The models are ResAD with a ready head, and Patchcore with the same backbone and references, both in float32. All get
the same photos, of the size that the models take, as files. Clients share the cores with what they ask.
"""

import csv
import http.client
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import auto_cli
from rich.console import Console

from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.enrollment.files import write_whole
from anomalib_resad.enrollment.photos import list_photos
from benchmarks.machine import cpu

PRODUCT, BACKBONE, SIZE, SHOTS, PHOTOS = "tiles", "resnet18", 224, 4, 24
CLIENTS = (1, 2, 4, 8)
SMALL, SOAKED = 64, 20  # side of the photos of the soak, and its products
SAMPLES = 20  # of the memory
PACKAGES = ("anomalib-resad", "anomalib", "openvino", "torch")
Ask = Callable[[Path], Any]


def prepare(folder: Path, weights: Path | None = None) -> None:
    """Make what is measured: bundles, Patchcore, photos.

    Args:
        folder: Folder to write to.
        weights: File with the weights of ResNet-18; timm's by default.
    """
    from anomalib_resad import ResAD  # noqa: PLC0415  # PyTorch
    from anomalib_resad.export.edge_bundle import convert, write_bundle  # noqa: PLC0415
    from anomalib_resad.export.ready_bundle import export_ready  # noqa: PLC0415
    from benchmarks.edge import export_patchcore  # noqa: PLC0415
    from benchmarks.products import make_product  # noqa: PLC0415

    for name, size in (("photos", SIZE), ("small", SMALL)):
        make_product(folder / name, PRODUCT, train=SHOTS, good=PHOTOS - 6, defective=2, size=size)
    references = folder / "photos" / PRODUCT / "train" / "good"
    ResADInferencer(export_ready(BACKBONE, folder / "bundle", weights)).enroll(PRODUCT, references, rotations=1)
    export_patchcore(BACKBONE, references, folder / "patchcore")
    model = ResAD(backbone=BACKBONE, pre_trained=False, estimator="distance", image_size=(SMALL, SMALL)).eval()
    small = ResADInferencer(write_bundle(model, convert(model), folder / "small_bundle", "fp32"))
    for number in range(SOAKED):
        small.enroll(f"product{number}", folder / "small" / PRODUCT / "train" / "good", rotations=1)


# -- who is asked -----------------------------------------------------------------------------------------------------


@contextmanager
def served(bundle: Path, streams: int) -> Iterator[tuple[str, int]]:
    """The command in a process of its own: its address and the number of the process."""
    command = [sys.executable, "-u", "-m", "anomalib_resad.cli", "serve", "--page=false", f"--bundle={bundle}"]
    with subprocess.Popen([*command, f"--streams={streams}"], stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            assert process.stdout is not None
            yield (
                next(found[1] for line in process.stdout if (found := re.search(r"http://([\d.:]+)", line))),
                process.pid,
            )
        finally:
            process.terminate()


class Rest:
    """Asks the service, over one connection for each client."""

    def __init__(self, address: str) -> None:
        self.address, self._mine = address, threading.local()

    def __call__(self, photo: Path, product: str = PRODUCT) -> float:
        """The raw score of a photo."""
        if not hasattr(self._mine, "connection"):
            self._mine.connection = http.client.HTTPConnection(self.address, timeout=60)
        connection = self._mine.connection
        connection.request("POST", f"/v1/products/{product}/inspect", photo.read_bytes(), {"Content-Type": "image/png"})
        answer = connection.getresponse()
        content = json.loads(answer.read())
        if answer.status != http.HTTPStatus.OK:
            msg = f"status {answer.status}: {content}"
            raise RuntimeError(msg)
        return float(content["results"][0]["raw_score"])


def patchcore(folder: Path) -> Ask:
    """The inferencer of anomalib; its model refuses two calls at the same time, so clients take turns."""
    from anomalib.deploy import OpenVINOInferencer  # noqa: PLC0415  # PyTorch

    path, turn = next(folder.rglob("*.xml")).resolve(), threading.Lock()
    here = Path.cwd()
    os.chdir(folder)  # it leaves a cache where it is made
    inferencer = OpenVINOInferencer(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    os.chdir(here)

    def ask(photo: Path) -> Any:  # noqa: ANN401
        with turn:
            return inferencer.predict(photo).pred_score

    return ask


# -- measuring --------------------------------------------------------------------------------------------------------


def loaded(ask: Ask, photos: Sequence[Path], clients: int, most: int, seconds: float) -> list[float]:
    """Clients that ask again and again, until so many photos or seconds are over: seconds of each answer."""
    times: list[float] = []
    failures: list[BaseException] = []
    numbers, end = count(), time.perf_counter() + seconds

    def client() -> None:
        try:
            while (number := next(numbers)) < most and time.perf_counter() < end:
                start = time.perf_counter()
                ask(photos[number % len(photos)])
                times.append(time.perf_counter() - start)
        except BaseException as error:  # noqa: BLE001  # told by the caller
            failures.append(error)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return times


def figures(times: Sequence[float], seconds: float) -> dict[str, float]:
    """Photos a second, and the median and the 99th percentile of their times."""
    middle, late = np.percentile(times, [50, 99]) * 1000
    return {"photos": len(times), "per_s": len(times) / seconds, "p50_ms": middle, "p99_ms": late}


def clients(
    folder: Path, output: Path = Path("benchmarks/results/load"), cores: int = 2, seconds: float = 5, streams: int = 2
) -> None:
    """Measure who can be asked, with one client and several, in turn, on some cores: ``clients_<cores>.csv``.

    Args:
        folder: As of prepare.
        output: Folder of the results.
        cores: How many cores all of it may use, the clients and the service, too.
        seconds: For each row.
        streams: Of what computes several photos at the same time.
    """
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))  # inherited by the services
    photos = list_photos(folder / "photos" / PRODUCT / "test")
    rows = []
    with ExitStack() as stack:
        asked: dict[str, Ask] = {"Patchcore, OpenVINOInferencer": patchcore(folder / "patchcore")}
        for number in (1, streams):
            inferencer = ResADInferencer(folder / "bundle", streams=number)
            asked[f"ResAD, Python, streams={number}"] = partial(inferencer.predict, product=PRODUCT)
            address, _ = stack.enter_context(served(folder / "bundle", number))
            asked[f"ResAD, REST, streams={number}"] = Rest(address)
        for ask in asked.values():
            loaded(ask, photos, 2, 2 * streams, 60)  # compiles
        for many in CLIENTS:
            for who, ask in asked.items():
                start = time.perf_counter()
                times = loaded(ask, photos, many, 1_000_000, seconds)
                rows.append({"who": who, "clients": many, **figures(times, time.perf_counter() - start)})
                settings = {"cores": cores, "seconds": seconds, "load": os.getloadavg()[0]}
                _write(output / f"clients_{cores}", rows, settings)  # what is done stays if it is stopped


def memory_mb(process: int | str = "self") -> float:
    """Memory that a process holds at the moment."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096 / 1e6


def soak(folder: Path, output: Path = Path("benchmarks/results/load"), python: int = 20_000, rest: int = 2000) -> None:
    """Ask for small photos of 20 products, four clients, and see the memory: ``soak.csv``.

    Args:
        folder: As of prepare.
        output: Folder of the results.
        python: Requests to the Python API.
        rest: Requests to the service.
    """
    photos, bundle, turns = list_photos(folder / "small" / PRODUCT / "test"), folder / "small_bundle", count()
    inferencer = ResADInferencer(bundle, streams=2)
    rows = []
    with served(bundle, 2) as (address, process):
        over_http = Rest(address)

        def ask(act: Callable[[Path, str], Any], photo: Path) -> None:
            act(photo, f"product{next(turns) % SOAKED}")

        for who, act, many, watched in (
            ("Python", inferencer.predict, python, "self"),
            ("REST", over_http, rest, process),
        ):
            every = max(1, many // SAMPLES)
            for done in range(every, many + 1, every):
                start = time.perf_counter()
                times = loaded(partial(ask, act), photos, 4, every, 3600)
                row = figures(times, time.perf_counter() - start) | {"memory_mb": memory_mb(watched)}
                rows.append({"who": who, "requests": done, **row})
                settings = {"products": SOAKED, "clients": 4, "side": SMALL, "load": os.getloadavg()[0]}
                _write(output / "soak", rows, settings)  # what is done stays if it is stopped


def _write(path: Path, rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> None:
    """A table, and beside it what it was measured with."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    rounded = ({key: round(each, 2) if isinstance(each, float) else each for key, each in row.items()} for row in rows)
    writer.writerows(rounded)
    record = settings | {"versions": {name: version(name) for name in PACKAGES}, "cpu": cpu(), "seed": 0}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path.with_suffix(".csv"), table.getvalue().encode())
    write_whole(path.with_suffix(".json"), (json.dumps(record, indent=2) + "\n").encode())
    Console().print(f"{path}.csv: {len(rows)} rows.")


if __name__ == "__main__":
    auto_cli({"prepare": prepare, "clients": clients, "soak": soak}, as_positional=False)
