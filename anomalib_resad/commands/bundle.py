# SPDX-License-Identifier: Apache-2.0

"""`resad bundle`: a bundle as one file, and what a bundle is."""

import hashlib
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from anomalib_resad.commands.console import say
from anomalib_resad.deploy.bundle import MANIFEST, Manifest, read_bundle
from anomalib_resad.deploy.messages import print_table, printable
from anomalib_resad.deploy.packed import packed
from anomalib_resad.enrollment.files import content_hash, write_whole


def pack(bundle: Path, output: Path) -> None:
    """Write a bundle as one file, which every command takes as --bundle. Its products' banks are not taken along.

    Args:
        bundle: Folder made by `resad export`.
        output: New file, such as model.resad.
    """
    manifest, contents = read_bundle(bundle)
    if output.exists():
        msg = f"{output} exists; nothing was changed. Choose another output file, or remove this one."
        raise FileExistsError(msg)
    content = packed({name if name == MANIFEST else manifest.place(name): each for name, each in contents.items()})
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, content)
    say(f"{output}: {len(content) / 1e6:.1f} MB, SHA-256 {hashlib.sha256(content).hexdigest()}.")


def verify(bundle: Path) -> None:
    """Check that each file of a bundle is as it was written, and print the SHA-256 of a packed one.

    Compare that with what `resad bundle pack` printed: checksums within the file tell damage, not who made it.

    Args:
        bundle: Folder, or packed file.
    """
    manifest, contents = read_bundle(bundle)
    digest = f", SHA-256 {content_hash(bundle)}" if bundle.is_file() else ""
    size = sum(map(len, contents.values())) / 1e6
    say(f"{bundle} is whole: {len(contents)} files, {size:.1f} MB, model {manifest.model[:16]}{digest}.")


def info(bundle: Path) -> None:
    """Tell what a bundle is; its files are checked, too.

    Args:
        bundle: Folder, or packed file.
    """
    manifest, contents = read_bundle(bundle)
    table = Table("", printable(escape(str(bundle))))
    for name, value in _facts(manifest).items():
        table.add_row(name, escape(printable(value)))
    for name in sorted(contents):
        table.add_row(name, f"{len(contents[name]) / 1e6:.2f} MB")
    print_table(table)


def _facts(manifest: Manifest) -> dict[str, str]:
    height, width = manifest.image_size
    levels = ", ".join(f"{each.channels} x {each.height} x {each.width}" for each in manifest.levels)
    threshold = manifest.score.threshold
    of_area = " for square photos, as many pixels in the shape of each product's"
    return {
        "model": manifest.model,
        "precision": manifest.precision,
        "backbone": f"{manifest.backbone}, weights: {manifest.weights}",
        "image size": f"{height} x {width}" + (of_area if manifest.area_side else ""),
        "levels": levels,
        "orientations": str(manifest.rotations),
        "threshold": "none was learned" if threshold is None else f"{threshold:.4g}",
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
