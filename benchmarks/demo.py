# SPDX-License-Identifier: Apache-2.0

"""Three ways to inspect a product after a look at a few good photos: at once, after a training, on a device.

1. ``resad inspect``, with the head that comes with the package: nothing is trained.
2. A training on the other products, in a leaderboard (:mod:`benchmarks.leaderboard`) with the plain distance of the
   same features, the ready head, and anomalib's Patchcore, on the same reference photos.
3. The trained model as a bundle, enrolled and run where PyTorch cannot be imported.

Without ``--data`` the products are drawn (:mod:`benchmarks.products`).
"""

import os
from pathlib import Path

from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Column, Table

from anomalib_resad import ProductFolder
from anomalib_resad.method.backbone import FeaturePyramid, describe
from anomalib_resad.method.backbone_weights import PYPI
from anomalib_resad.ready_heads import READY, head_file
from benchmarks.demo_steps import Step, few_photos, inspect_at_once, inspect_on_a_device, picture
from benchmarks.leaderboard import main as leaderboard
from benchmarks.maps import slug
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
    """Inspect the target at once, train on the other products and compare, and do it again without PyTorch.

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
    good, steps = few_photos(root / target, k_shot, output / "good"), []
    if pre_trained:
        console.rule(f"1. {target}, {k_shot} good photos, nothing trained")
        model = ["--backbone", name, *(["--weights", weights] if weights else [])]
        steps = [inspect_at_once(root / target, good, output / "day_one", model, "at once, ready head")]
        show(steps)
        console.print(f"Look at {picture(output / 'day_one' / 'maps', output / 'day_one.png')}.", highlight=False)
    console.rule(f"2. {target}, after a training on {', '.join(others)}")
    compare(root, target, others, name, weights, pre_trained, k_shot, draws, epochs, seed, output)
    console.rule("3. The trained model on a device without PyTorch")
    checkpoint = next((output / "sources").glob(f"ResAD_without_{slug(target)}_*.ckpt"))
    steps.append(inspect_on_a_device(root / target, good, checkpoint, output / "device", "trained, without PyTorch"))
    show(steps)


def compare(
    root: Path,
    target: str,
    others: list[str],
    backbone: str,
    weights: Path | None,
    pre_trained: bool,
    k_shot: int,
    draws: int,
    epochs: int,
    seed: int,
    output: Path,
) -> None:
    """The leaderboard of one target."""
    layers = describe(backbone).default_layers
    resad = "anomalib_resad.ResAD"
    ready = {"ResAD, ready head": {"class_path": resad, "init_args": {"checkpoint": READY}}}
    has_head = pre_trained and head_file(backbone).is_file()
    workers = min(2, os.cpu_count() or 1)
    leaderboard(
        target=ProductFolder(root, ", ".join([*others, target]), eval_batch_size=8, num_workers=workers),
        categories=[target],
        methods={
            "ResAD": {"class_path": resad, "source_epochs": epochs},
            **(ready if has_head else {}),
            "its distance": {"class_path": resad, "init_args": {"estimator": "distance"}, "trained_as": "ResAD"},
            "Patchcore": {"class_path": "anomalib.models.Patchcore", "init_args": {"layers": layers[1:]}},
        },
        output=output,
        shots=[k_shot],
        draws=draws,
        backbone=backbone,
        layers=layers,
        weights=weights,
        pre_trained=pre_trained,
        gallery_shots=k_shot,
        seed=seed,
        source_batch_size=8,
    )


def show(steps: list[Step]) -> None:
    """Print what the steps found."""
    table = Table(Column("", no_wrap=True), "image AUROC", "defects found", "false alarms", "seconds")
    for step in steps:
        table.add_row(step.name, f"{100 * step.image_auroc:.1f}", step.found, step.false_alarms, f"{step.seconds:.0f}")
    console.print(table)


if __name__ == "__main__":
    auto_cli(main)
