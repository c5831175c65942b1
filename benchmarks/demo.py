# SPDX-License-Identifier: Apache-2.0

"""Train ResAD on all products but one, show it that one through a few good photos, and look at the result.

A leaderboard (:mod:`benchmarks.leaderboard`) with one target: ResAD, the plain nearest-neighbor distance of the same
features, and anomalib's Patchcore, on the same reference photos. Without ``--data`` the products are drawn
(:mod:`benchmarks.products`).
"""

import os
from pathlib import Path

from jsonargparse import auto_cli
from rich.console import Console

from anomalib_resad import ProductFolder
from anomalib_resad.method.backbone import FeaturePyramid, describe
from anomalib_resad.method.backbone_weights import PYPI
from benchmarks.leaderboard import main as leaderboard
from benchmarks.products import PRODUCTS, make_product
from benchmarks.quiet import ask_cache_if_offline, quiet_lightning

console = Console()
BACKBONE = "resnet18"
PACKAGED = "tf_efficientnet_lite0"  # its weights come with the extra `dev`, as a package


def drawn_products(root: Path, seed: int) -> Path:
    """Draw the products, unless they are there."""
    for product in PRODUCTS:
        if not (root / product / "test" / "spot" / "005.png").exists():
            make_product(root, product, seed=seed)
    return root


def choose_backbone(asked: str | None) -> tuple[str, Path | None, bool]:
    """A backbone whose weights can be had, and says so if it is not the one that was meant.

    Args:
        asked: What the user asked for, which is never replaced by another.

    Returns:
        tuple[str, Path | None, bool]: timm's name, the weights where they are not timm's, and whether there are any.
    """
    try:
        FeaturePyramid(asked or BACKBONE).bring_weights()
    except RuntimeError as error:
        console.print(f"[yellow]{error}[/yellow]", highlight=False)
    else:
        return asked or BACKBONE, None, True
    if asked is None:
        try:
            FeaturePyramid(PACKAGED, weights=PYPI).bring_weights()
        except ImportError as error:
            console.print(f"[yellow]{error}[/yellow]", highlight=False)
        else:
            console.print(f"[yellow]The demo goes on with {PACKAGED}, whose weights are installed.[/yellow]")
            return PACKAGED, Path(PYPI), True
    console.print("[yellow]The demo goes on with an UNTRAINED backbone; its figures show the mechanics only.[/yellow]")
    return asked or BACKBONE, None, False


def split_products(root: Path, target: str | None) -> tuple[str, list[str]]:
    """The target, by default the last product, and the products to train on.

    Raises:
        ValueError: If the target is not there, or nothing else.
    """
    products = sorted(path.name for path in root.iterdir() if (path / "train" / "good").is_dir())
    target = target or (products[-1] if products else "")
    others = [product for product in products if product != target]
    if target not in products or not others:
        msg = f"target '{target}' and at least one other product must be in {root}, which holds {products}."
        raise ValueError(msg)
    return target, others


def main(
    data: Path | None = None,
    target: str | None = None,
    weights: Path | None = None,
    backbone: str | None = None,
    k_shot: int = 4,
    draws: int = 1,
    epochs: int = 8,
    seed: int = 0,
    output: Path = Path("demo"),
) -> None:
    """Train on all products but the target, enroll the target, compare, draw a gallery.

    Args:
        data: Folder of product folders in MVTec AD's layout; drawn products by default.
        target: Product to hold out; the last one by default.
        weights: Local file with the backbone's weights, or ``pypi`` for its installed package.
        backbone: timm name of the backbone; by default ResNet-18, or where its weights cannot be had, a backbone
            whose weights are installed.
        k_shot: Reference photos.
        draws: How many different draws of references to test.
        epochs: Epochs of training.
        seed: Seed of the training.
        output: Folder for data, checkpoint, tables and gallery.
    """
    quiet_lightning()
    ask_cache_if_offline()
    output.mkdir(parents=True, exist_ok=True)
    root = data or drawn_products(output / "products", seed)
    target, others = split_products(root, target)
    name, weights, pre_trained = (backbone or BACKBONE, weights, True) if weights else choose_backbone(backbone)
    layers = describe(name).default_layers
    console.print(f"Training on {', '.join(others)} for {epochs} epochs; {target} is held out.")
    workers = min(2, os.cpu_count() or 1)
    leaderboard(
        target=ProductFolder(root, ", ".join([*others, target]), eval_batch_size=8, num_workers=workers),
        categories=[target],
        methods={
            "ResAD": {"class_path": "anomalib_resad.ResAD", "source_epochs": epochs},
            "its distance": {
                "class_path": "anomalib_resad.ResAD",
                "init_args": {"estimator": "distance"},
                "trained_as": "ResAD",
            },
            "Patchcore": {"class_path": "anomalib.models.Patchcore", "init_args": {"layers": layers[1:]}},
        },
        output=output,
        shots=[k_shot],
        draws=draws,
        backbone=name,
        layers=layers,
        weights=weights,
        pre_trained=pre_trained,
        gallery_shots=k_shot,
        seed=seed,
        source_batch_size=8,
    )


if __name__ == "__main__":
    auto_cli(main)
