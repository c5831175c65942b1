# SPDX-License-Identifier: Apache-2.0

"""Draw source products: ``python -m benchmarks.sources --output DIR --products 60 --first_seed 0``."""

from pathlib import Path

from jsonargparse import auto_cli
from rich.progress import track

from benchmarks.sources.drawn import FAMILIES, make_product
from benchmarks.sources.pictures import list_surfaces, surface_of


def main(
    output: Path,
    products: int = 60,
    first_seed: int = 0,
    train: int = 24,
    good: int = 8,
    defective: int = 24,
    size: int = 256,
    pictures: Path | None = None,
) -> None:
    """Draw products, each from a seed of its own, family after family, in the layout of MVTec AD.

    Args:
        output: Folder of the products.
        products: How many.
        first_seed: Seed of the first one; ranges that do not overlap have no product in common.
        train: Good training photos of each.
        good: Good test photos.
        defective: Defective test photos, over several kinds of defects.
        size: Side of the photos in pixels.
        pictures: Folder of pictures of surfaces; each becomes a product too, with seeds after those of the drawn ones.
    """
    families = list(FAMILIES.items())
    designs = [(*families[seed % len(families)], seed) for seed in range(first_seed, first_seed + products)]
    for seed, path in enumerate(list_surfaces(pictures) if pictures else [], first_seed + products):
        designs.append(("picture", surface_of(path), seed))
    for name, design_of, seed in track(designs, "Drawing products"):
        make_product(output, name, design_of, seed, train=train, good=good, defective=defective, size=size)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
