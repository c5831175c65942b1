# SPDX-License-Identifier: Apache-2.0

"""`resad enroll` and `resad products`: what a bundle knows."""

from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anomalib_resad.commands.console import say
from anomalib_resad.deploy.bank import Bank
from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.deploy.messages import print_table, printable
from anomalib_resad.deploy.prediction import threshold_of
from anomalib_resad.deploy.products import Rate
from anomalib_resad.enrollment.decoding import BitDepth
from anomalib_resad.enrollment.rotations import Rotations

POSITION = "Photos whose content has moved are told, not judged."
NO_POSITION = "Where things lie differs between the photos, or too few are there: moved content is not told."


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
    false_alarm_rate: Rate = "auto",
    min_area: int | None = None,
    region: str | None = None,
    tile_scale: float | None = None,
) -> None:
    """Teach a bundle a product from good photos, or add some to a product.

    Args:
        bundle: Folder made by `resad export`, or file made by `resad bundle pack`.
        product: Name of the product.
        photos: Folder of good photos, or one photo.
        banks: Folder of the products' banks, if not in the bundle.
        max_patches: Most patches that are searched; by default the model's share of all.
        threshold: The product's own threshold, on the scale of the raw score.
        mode: What to do: a new product, more photos for one, or other photos for one. Its own threshold stays, unless
            another one is given; one for a false-alarm rate is computed anew.
        rotations: In how many orientations each photo is enrolled: 1, 8 (every 45 degrees), or auto for 8 where the
            photos are rotated to each other. By default what the model was made with. Photos that are added follow the
            others.
        bit_depth: Bits of a channel that the camera gives, such as 12, if the photos have more than 8 and do not say
            how many. It is kept with the product, whose photos all have to have it.
        false_alarm_rate: Share of good photos that may alarm: the product gets a threshold of its own, from how its
            photos score against each other. null for the model's threshold. By default 0.05; for
            bundles of 0.1.0, which know no scatter of scores, null.
        min_area: Fewest pixels of a region that is found, of the photo; smaller ones are left out. Change it later with
            `resad threshold`.
        region: What counts in the photos, if not all of them: a mask file (white counts), or the corners of a polygon
            in pixels of the photos, "x,y x,y x,y"; none for all. It stays when the product is replaced.
        tile_scale: For large photos, which are looked at in overlapping tiles: photo pixels per pixel of the model,
            such as 2; 0 for whole photos. It stays when the product is replaced.
    """
    inferencer = ResADInferencer(bundle, banks=banks)
    settings: dict[str, Any] = {
        "threshold": threshold,
        "max_patches": max_patches,
        "rotations": rotations,
        "bit_depth": bit_depth,
        "false_alarm_rate": false_alarm_rate,
        "min_area": min_area,
        "region": region,
        "tile_scale": tile_scale,
    }
    usual = {"bit_depth": "auto", "false_alarm_rate": "auto"}
    given = ", ".join(f"{name}={value}" for name, value in settings.items() if value != usual.get(name))
    if mode == "add" and given:
        msg = f"--mode add keeps the product's settings (given: {given}). Leave them out, or use --mode replace."
        raise ValueError(msg)
    with Console(stderr=True).status("Enrolling"):
        if mode == "add":
            bank = inferencer.add(product, photos)
        else:
            bank = inferencer.enroll(product, photos, replace_existing=mode == "replace", **settings)
    names = ", ".join(reference.name for reference in bank.references)
    orientations = f" in {bank.rotations} orientations" if bank.rotations > 1 else ""
    count = f"{len(bank.references)} photos{orientations}{_resized(bank)}"
    say(f"{product}: {count}, {bank.size / 1e6:.1f} MB ({names}).")
    say(f"{product}: {threshold_of(inferencer.manifest, bank)}.")
    if bank.region is not None:
        told = POSITION if inferencer.has_position(product) else NO_POSITION
        say(f"{product}: {bank.region.mean():.0%} of each photo counts. {told}")


def _resized(bank: Bank) -> str:
    """To which size photos are resized, of a product that has a size of its own."""
    return "" if bank.image_size is None else f" at {' x '.join(map(str, bank.image_size))} pixels (height x width)"


def products(bundle: Path, banks: Path | None = None, remove: str | None = None) -> None:
    """List the enrolled products, or remove one.

    Args:
        bundle: Folder made by `resad export`, or file made by `resad bundle pack`.
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
