# SPDX-License-Identifier: Apache-2.0

"""The ``resad`` command: what `anomalib` has no verb for. Only `export` and `parity` need PyTorch."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.deploy.messages import print_table, printable
from anomalib_resad.deploy.pictures import overlay
from anomalib_resad.deploy.results import Results, finished
from anomalib_resad.enrollment.decoding import BitDepth
from anomalib_resad.enrollment.files import TABLE, content_hash
from anomalib_resad.enrollment.photos import PhotoError, list_photos
from anomalib_resad.enrollment.rotations import Rotations

console = Console()


def say(text: str) -> None:
    """Print a line that may hold names of files and products."""
    console.print(escape(printable(text)), soft_wrap=True)


def export(
    checkpoint: Path,
    output: Path,
    precision: Literal["fp32", "fp16", "int8"] = "fp32",
    calibration: Path | None = None,
) -> None:
    """Write a bundle: one model for all products, to be enrolled on a device without PyTorch.

    Args:
        checkpoint: A trained ResAD.
        output: New folder.
        precision: Weights of 32 or 16 bits, or an encoder of 8 bits; the matching is computed in float32 always.
        calibration: Folder of good photos, of several products, that int8 is calibrated on.
    """
    from anomalib_resad.export.edge_bundle import export_bundle  # noqa: PLC0415  # PyTorch

    with Console(stderr=True).status("Exporting"):
        export_bundle(checkpoint, output, precision, calibration)
    size = sum(path.stat().st_size for path in output.iterdir())
    say(f"{output}: {size / 1e6:.1f} MB, {precision}.")


def parity(
    checkpoint: Path,
    references: Path,
    photos: Path,
    calibration: Path | None = None,
    output: Path | None = None,
    most: int = 25,
) -> None:
    """Print how far ONNX and OpenVINO (FP32, FP16, INT8) are from PyTorch on photos of yours.

    Score and map are compared on the scale of 0 to 1 that users see. ONNX is left out where onnxruntime is not
    installed, and INT8 where there are no calibration photos.

    Args:
        checkpoint: A trained ResAD.
        references: Folder of good photos of a product, to enroll.
        photos: Folder of photos of it; if it has a folder `good`, those are the good ones, and AUROC is given.
        calibration: Folder of good photos to calibrate INT8 on.
        output: JSON file to write, too.
        most: Photos to take, evenly spaced.
    """
    from anomalib_resad.export.parity import parity as compare  # noqa: PLC0415  # PyTorch

    compare(checkpoint, references, photos, calibration, output, most)


def enroll(
    bundle: Path,
    product: str,
    photos: Path,
    banks: Path | None = None,
    max_patches: int | None = None,
    threshold: float | None = None,
    mode: Literal["new", "add", "replace"] = "new",
    rotations: Rotations | None = None,
    bit_depth: BitDepth = "auto",
) -> None:
    """Teach a bundle a product from good photos, or add some to a product.

    Args:
        bundle: Folder made by `resad export`.
        product: Name of the product.
        photos: Folder of good photos, or one photo.
        banks: Folder of the products' banks, if not in the bundle.
        max_patches: Most rows of a level; by default all are kept.
        threshold: The product's own threshold, on the scale of the raw score.
        mode: What to do: a new product, more photos for one, or other photos for one. Its own threshold stays, unless
            another one is given.
        rotations: In how many orientations each photo is enrolled: 1, 8 (every 45 degrees), or auto for 8 where the
            photos are rotated to each other. By default what the model was made with. Photos that are added follow the
            others.
        bit_depth: Bits of a channel that the camera gives, such as 12, if the photos have more than 8 and do not say
            how many. It is kept with the product, whose photos all have to have it.
    """
    inferencer = ResADInferencer(bundle, banks=banks)
    if mode == "add" and (threshold, max_patches, rotations, bit_depth) != (None, None, None, "auto"):
        msg = (
            f"--mode add keeps the product's threshold, rotations and bit depth (given: threshold={threshold}, "
            f"max_patches={max_patches}, rotations={rotations}, bit_depth={bit_depth}). Leave them out, or use --mode "
            "replace with all photos."
        )
        raise ValueError(msg)
    with Console(stderr=True).status("Enrolling"):
        if mode == "add":
            bank = inferencer.add(product, photos)
        else:
            bank = inferencer.enroll(product, photos, threshold, max_patches, mode == "replace", rotations, bit_depth)
    names = ", ".join(reference.name for reference in bank.references)
    orientations = f" in {bank.rotations} orientations" if bank.rotations > 1 else ""
    count = f"{len(bank.references)} photos{orientations}"
    own = "" if bank.threshold is None else f", its own threshold {bank.threshold:g}"
    say(f"{product}: {count}, {bank.size / 1e6:.1f} MB{own} ({names}).")


def products(bundle: Path, banks: Path | None = None, remove: str | None = None) -> None:
    """List the enrolled products, or remove one.

    Args:
        bundle: Folder made by `resad export`.
        banks: Folder of the products' banks, if not in the bundle.
        remove: Product to remove.
    """
    inferencer = ResADInferencer(bundle, banks=banks)
    if remove is not None:
        inferencer.remove(remove)
        say(f"{remove} was removed.")
    table = Table("product", "photos", "MB", "threshold")
    for name in inferencer.products:
        try:
            bank = inferencer.bank(name)
        except ValueError as error:
            table.add_row(escape(printable(name)), "-", "-", escape(printable(str(error))))
            continue
        own = "the model's" if bank.threshold is None else f"{bank.threshold:.4g}"
        table.add_row(escape(name), str(len(bank.references)), f"{bank.size / 1e6:.1f}", own)
    print_table(table)


def predict(
    bundle: Path, product: str, photos: Path, output: Path, banks: Path | None = None, resume: bool = False
) -> None:
    """Inspect photos: a map over each (PNG), and a table (results.csv), row by row.

    Files that cannot be read are reported and left out; the command then ends with status 1. Where it is interrupted,
    or the disk is full, the rows so far stay, and it ends with status 2.

    Args:
        bundle: Folder made by `resad export`.
        product: What the photos show.
        photos: Folder of photos, or one photo.
        output: Folder for the results.
        banks: Folder of the products' banks, if not in the bundle.
        resume: Keep the rows of an earlier run whose photo, bank and model are the same, and inspect the others.
    """
    inferencer = ResADInferencer(bundle, banks=banks)
    inferencer.bank(product)
    root = photos if photos.is_dir() else photos.parent
    paths = {path.relative_to(root).as_posix(): path for path in list_photos(photos)}

    def mark_of(name: str) -> str:
        with suppress(OSError):  # inspecting it says so
            return f"{content_hash(paths[name])} {inferencer.fingerprint(product)}"
        return ""

    kept = finished(output, paths, mark_of) if resume else {}
    stretch = inferencer.manifest.map.threshold is None
    with Results(output, kept) as results:
        try:
            todo = [name for name in paths if name not in kept]
            for name in track(todo, description="Inspecting", console=Console(stderr=True)):
                mark = mark_of(name)
                try:
                    found, pixels = inferencer.inspect(paths[name], product)
                except PhotoError as error:
                    results.fail(name, str(error))
                    continue
                results.add(name, found, overlay(pixels, found.map, stretch=stretch), mark)
        except (KeyboardInterrupt, Exception) as error:
            why = "it was interrupted" if isinstance(error, KeyboardInterrupt) else explained(error)
            msg = (
                f"Inspecting ended early: {why}. {results.count} of {len(paths)} rows are in {output / TABLE}. "
                "Run the command again with --resume true to inspect the others."
            )
            raise ValueError(msg) from error
    say(f"{len(paths) - results.failed} of {len(paths)} photos inspected: {output / TABLE}")
    for problem in results.problems:
        say(problem)
    if results.problems:
        sys.exit(1)


def serve(
    bundle: Path,
    banks: Path | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    allowed_hosts: list[str] | str | None = None,
    token: str | None = None,
    max_upload_mb: int = 30,
    max_total_mb: int = 200,
) -> None:
    """Open a web page to enroll products and inspect photos.

    Args:
        bundle: Folder made by `resad export`.
        banks: Folder of the products' banks, if not in the bundle.
        host: Address to listen on; by default this machine alone can open the page.
        port: Port; by default the first free one from 7860 on.
        allowed_hosts: Further names under which the page is opened, separated by commas: that of a proxy, or of this
            machine. Requests under other names are refused.
        token: What a visitor must give as password (of any user), or a client as bearer token. By default that in
            RESAD_TOKEN; where others can reach the page, one is made and printed.
        max_upload_mb: Largest file that is accepted.
        max_total_mb: Largest request, of up to 20 files.
    """
    try:
        from anomalib_resad.deploy.serve import launch  # noqa: PLC0415  # Gradio is an extra
    except ModuleNotFoundError as error:
        msg = f"The page needs {error.name}: pip install gradio, or the extra [serve]."
        raise ValueError(msg) from error

    hosts = allowed_hosts.split(",") if isinstance(allowed_hosts, str) else (allowed_hosts or [])
    token = token or os.environ.get("RESAD_TOKEN")
    launch(ResADInferencer(bundle, banks=banks), say, host, port, hosts, token, max_upload_mb, max_total_mb)


VERBS: dict[str, Any] = {
    "export": export,
    "enroll": enroll,
    "predict": predict,
    "products": products,
    "parity": parity,
    "serve": serve,
}


def main() -> None:
    """Run the command. Whatever goes wrong is one sentence, and with ``--debug`` Python's traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl+C does
    words = [each for each in sys.argv[1:] if each != "--debug"]
    about = "ResAD on a device. With --debug, an error shows where in the program it came up."
    try:
        auto_cli(VERBS, as_positional=False, prog="resad", args=words, description=about)
    except (KeyboardInterrupt, Exception) as error:
        if "--debug" in sys.argv[1:]:
            raise
        said = "Interrupted." if isinstance(error, KeyboardInterrupt) else explained(error)
        Console(stderr=True).print(f"[red]Error:[/red] {escape(printable(said))}", soft_wrap=True)
        sys.exit(2)


def explained(error: Exception) -> str:
    """What to tell of an error; of those that nobody foresaw, also what it is."""
    if isinstance(error, ValueError | OSError | ModuleNotFoundError):
        return str(error)
    return f"unexpected {type(error).__name__}: {error}. Add --debug to see where it came up, and report it"


if __name__ == "__main__":
    main()
