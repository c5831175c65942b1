# SPDX-License-Identifier: Apache-2.0

"""`resad watch`: inspect what a camera writes into a folder."""

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from anomalib_resad.commands.console import say
from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.deploy.journal import Journal
from anomalib_resad.deploy.prediction import Prediction
from anomalib_resad.deploy.results import map_of
from anomalib_resad.deploy.sinks import Sender, mqtt_sink, webhook_sink
from anomalib_resad.deploy.watching import FolderWatch
from anomalib_resad.enrollment.files import write_whole


def watch(
    bundle: Path,
    product: str,
    folder: Path,
    output: Path,
    banks: Path | None = None,
    maps: Literal["none", "anomalous", "all"] = "anomalous",
    settle: float = 0.5,
    patience: float = 10.0,
    webhook: str | None = None,
    mqtt: str | None = None,
    streams: int = 1,
) -> None:
    """Inspect the photos that a camera writes into a folder, until Ctrl+C or SIGTERM ends it.

    Each photo gets one row in results.jsonl, also if the command is killed and started again. A photo that is written
    again under its name gets another row if its content differs.

    Args:
        bundle: Folder made by `resad export`, or file made by `resad bundle pack`.
        product: What the photos show.
        folder: Folder that photos are written to, or to folders in it.
        output: Folder for the results, outside of that one.
        banks: Folder of the products' banks, if not in the bundle.
        maps: Of which photos a map over the photo is kept, in `maps` (PNG).
        settle: Seconds without a change after which a file is complete.
        patience: Seconds without a change after which a file that cannot be read is recorded as failed.
        webhook: Address that each row is sent to as JSON; while it does not answer, rows wait.
        mqtt: The same for an MQTT broker, as host:port/topic.
        streams: Photos that are computed at the same time where several are complete, each slower: for many cores.
    """
    if folder.resolve() in (output.resolve(), *output.resolve().parents):
        msg = f"--output {output} is in {folder}: maps would be taken for photos. Choose a folder outside of it."
        raise ValueError(msg)
    sinks = {} if webhook is None else {"webhook": webhook_sink(webhook)}
    if mqtt is not None:
        sinks["mqtt"] = mqtt_sink(mqtt)
    inferencer = ResADInferencer(bundle, banks=banks, streams=streams)
    inferencer.bank(product)
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(output))
        keep = partial(_keep, output, maps, inferencer.manifest.map.threshold is None)
        inspect = partial(_inspect, inferencer, product)
        watching = FolderWatch(folder, journal, inspect, keep, settle, patience, inferencer.in_flight)
        for name, sink in sinks.items():
            stack.callback(Sender(name, sink, journal.path).close)
        known = len(journal.recorded)
        say(f"Watching {folder}, {known} photos are in {journal.path} already (Ctrl+C ends it)")
        try:
            while True:
                watching.look()
                time.sleep(settle / 2)
        except KeyboardInterrupt:
            say(f"Ended; {len(journal.recorded)} photos are in {journal.path}.")


def _inspect(inferencer: ResADInferencer, product: str, content: bytes) -> tuple[Prediction, np.ndarray]:
    return inferencer.inspect(content, product)


def _keep(output: Path, maps: str, stretch: bool, name: str, found: Prediction, pixels: np.ndarray) -> None:
    """Write the map of a photo, if it is wanted."""
    if maps == "all" or (maps == "anomalous" and found.label):
        path = map_of(output, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, found.png(pixels, stretch))
