# SPDX-License-Identifier: Apache-2.0

"""`resad predict`: inspect a folder of photos."""

import sys
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from rich.console import Console
from rich.progress import track

from anomalib_resad.commands.console import explained, say
from anomalib_resad.deploy.in_flight import in_order, usual_streams
from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.deploy.prediction import Prediction
from anomalib_resad.deploy.regions import check_min_area
from anomalib_resad.deploy.results import Results, finished
from anomalib_resad.enrollment.files import TABLE, content_hash
from anomalib_resad.enrollment.photos import PhotoError, list_photos


class _Done(NamedTuple):
    """What was found in a photo, its picture, and its mark."""

    found: Prediction
    picture: Image.Image
    mark: str


def predict(
    bundle: Path,
    product: str,
    photos: Path,
    output: Path,
    banks: Path | None = None,
    resume: bool = False,
    min_area: int | None = None,
    streams: int | None = None,
) -> None:
    """Inspect photos: a map over each with boxes (PNG), a table (results.csv), and regions (results.jsonl).

    Files that cannot be read are reported and left out; the command then ends with status 1. Where it is interrupted,
    or the disk is full, the rows so far stay, and it ends with status 2.

    Args:
        bundle: Folder made by `resad export`, or file made by `resad bundle pack`.
        product: What the photos show.
        photos: Folder of photos, or one photo.
        output: Folder for the results.
        banks: Folder of the products' banks, if not in the bundle.
        resume: Keep the rows of an earlier run whose photo, bank and model are the same, and inspect the others.
        min_area: Fewest pixels of a region, of the photo, instead of the product's own.
        streams: Photos that are computed at the same time; by default as many as there are cores, at most 4.
    """
    check_min_area(min_area or 0)
    inferencer = ResADInferencer(bundle, banks=banks, streams=usual_streams() if streams is None else streams)
    inferencer.bank(product)
    root = photos if photos.is_dir() else photos.parent
    paths = {path.relative_to(root).as_posix(): path for path in list_photos(photos)}

    def mark_of(name: str) -> str:
        with suppress(OSError):  # inspecting it says so
            return f"{content_hash(paths[name])} {inferencer.fingerprint(product)} {min_area}"
        return ""

    kept = finished(output, paths, mark_of) if resume else {}
    stretch = inferencer.manifest.map.threshold is None

    def inspected(name: str) -> _Done | PhotoError:
        mark = mark_of(name)
        try:
            found, pixels = inferencer.inspect(paths[name], product)
        except PhotoError as error:
            return error
        found = found if min_area is None else replace(found, min_area=min_area)
        return _Done(found, found.picture(pixels, stretch), mark)

    todo = [name for name in paths if name not in kept]
    with Results(output, kept) as results:
        try:
            with closing(in_order(inspected, todo, inferencer.in_flight)) as found:
                _record(results, todo, found)
        except (KeyboardInterrupt, Exception) as error:
            why = "it was interrupted" if isinstance(error, KeyboardInterrupt) else explained(error)
            rows = f"{results.count} of {len(paths)} rows are in {output / TABLE}"
            msg = f"Inspecting ended early: {why}. {rows}. Run the command again with --resume to inspect the others."
            raise ValueError(msg) from error
    _tell(results, f"{len(paths) - results.failed} of {len(paths)} photos inspected: {output / TABLE}")


def _record(results: Results, names: Sequence[str], found: Iterable[_Done | PhotoError]) -> None:
    """Write the row of each photo as it comes."""
    for name, each in zip(track(names, "Inspecting", console=Console(stderr=True)), found, strict=True):
        if isinstance(each, PhotoError):
            results.fail(name, str(each))
        else:
            results.add(name, *each)


def _tell(results: Results, text: str) -> None:
    """Say what was done, and what was not."""
    say(text)
    for problem in results.problems:
        say(problem)
    if results.problems:
        sys.exit(1)
