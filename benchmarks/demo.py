# SPDX-License-Identifier: Apache-2.0

"""Train ResAD on all products but one, show it that one through a few good photos, and look at the result.

Without ``--data`` the products are drawn (:mod:`benchmarks.products`). Everything runs through anomalib's engine. The
table compares, on the same reference photos and on raw scores: ResAD, the plain nearest-neighbor distance of the same
features, and, with ``--patchcore true``, anomalib's Patchcore on the same backbone.
"""

import logging
import os
import re
import socket
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub.constants
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from rich.console import Console

from anomalib_resad import CrossCategory, ProductFolder, ResAD
from anomalib_resad.backbone import FeaturePyramid
from benchmarks.compare import auroc, compare, engine, print_table, write_results
from benchmarks.gallery import draw_gallery
from benchmarks.products import PRODUCTS, make_product

console = Console()
LAYERS = ("layer1", "layer2", "layer3")
# Settings that train in minutes on two cores: a small flow, few of its steps, a high learning rate, and the published
# code's matching and residual. The paper's (8 layers, 256 position channels, every patch, lr 1e-5, 100 epochs, L2,
# signed residual) are the defaults of the model itself.
QUICK: dict[str, Any] = {
    "coupling_layers": 4,
    "position_channels": 64,
    "flow_batch_size": 2048,
    "flow_steps": 1,
}


def quiet_lightning() -> None:
    """Leave the messages out that say nothing about the demo."""
    warnings.filterwarnings("ignore")
    logging.getLogger("anomalib").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.callbacks").setLevel(logging.ERROR)
    noise = re.compile(r"GPU|TPU|Tip:|`Trainer|ckpt_path is not provided|callbacks returned in")
    for name in ("lightning_fabric.utilities.rank_zero", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: not noise.search(record.getMessage()))


def drawn_products(root: Path, seed: int) -> Path:
    """Draw the products, unless they are there."""
    for product in PRODUCTS:
        if not (root / product / "test" / "spot" / "005.png").exists():
            make_product(root, product, seed=seed)
    return root


def backbone_arguments(backbone: str, weights: Path | None) -> tuple[dict[str, Any], str]:
    """Backbone arguments of the model, and what to call the weights: the given file, timm's, or none at all."""
    if weights is not None:
        return {"backbone": backbone, "weights": str(weights), "pre_trained": True}, weights.name
    try:
        socket.getaddrinfo("huggingface.co", 443)
    except OSError:  # ask the hub's cache only, instead of retrying for a minute
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        FeaturePyramid(backbone, LAYERS).bring_weights()
    except RuntimeError as error:
        console.print(f"[yellow]{str(error)[:400]}[/yellow]", highlight=False)
        console.print(
            "[yellow]The demo goes on with an UNTRAINED backbone; its figures show the mechanics only.[/yellow]"
        )
        return {"backbone": backbone, "pre_trained": False}, "untrained"
    return {"backbone": backbone, "pre_trained": True}, "timm pretrained"


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


def train(source: CrossCategory, arguments: dict[str, Any], epochs: int, output: Path) -> Path:
    """Train on the source categories; returns the checkpoint."""
    model = ResAD(**arguments, visualizer=False)
    run = engine(output, epochs)
    run.fit(model=model, datamodule=source)
    checkpoint = run.best_model_path
    assert checkpoint, "training saved no checkpoint"
    return Path(checkpoint)


def main(
    data: Path | None = None,
    target: str | None = None,
    weights: Path | None = None,
    backbone: str = "resnet18",
    checkpoint: Path | None = None,
    k_shot: int = 4,
    draws: int = 1,
    epochs: int = 6,
    seed: int = 0,
    match: str = "cosine",
    residual: str = "squared",
    lr: float = 2e-3,
    patchcore: bool = False,
    output: Path = Path("demo"),
) -> None:
    """Train on all products but the target, enroll the target, compare, draw a gallery.

    Args:
        data: Folder of product folders in MVTec AD's layout; drawn products by default.
        target: Product to hold out; the last one by default.
        weights: Local file with the backbone's weights.
        backbone: timm name of the backbone, a ResNet.
        checkpoint: A ResAD trained before on the other products; then training is left out.
        k_shot: Reference photos.
        draws: How many different draws of references to test.
        epochs: Epochs of training.
        seed: Seed of the training, and of the first draw.
        match: Nearest reference by l2 or cosine.
        residual: difference or squared.
        lr: Learning rate.
        patchcore: Test anomalib's Patchcore too.
        output: Folder for data, checkpoint, table and gallery.
    """
    quiet_lightning()
    start = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    root = data or drawn_products(output / "products", seed)
    target, others = split_products(root, target)
    seed_everything(seed)
    workers = min(2, os.cpu_count() or 1)
    settings, weights_name = backbone_arguments(backbone, weights)
    settings |= QUICK | {"k_shot": k_shot, "match": match, "residual": residual, "lr": lr}
    if checkpoint is None:
        source = CrossCategory(
            ProductFolder(root, ", ".join(others)), None, train_batch_size=8, eval_batch_size=8, num_workers=workers
        )
        console.print(f"Training on {', '.join(others)} for {epochs} epochs; {target} is held out.")
        checkpoint = train(source, settings, epochs, output)
        settings["training_minutes"] = round((time.perf_counter() - start) / 60, 1)

    rows: list[dict[str, Any]] = []
    target_data = partial(ProductFolder, root, target, eval_batch_size=8, num_workers=workers)
    for draw in range(seed, seed + draws):
        predictions, names = compare(checkpoint, k_shot, draw, target_data, output, patchcore=patchcore)
        row = {"target": target, "k_shot": k_shot, "draw": draw, "references": " ".join(names)}
        rows += [row | {"method": method} | auroc(batches) for method, batches in predictions.items()]
        if draw == seed:
            draw_gallery(predictions, output / "gallery.png")
    settings |= {"weights": weights_name, "source": others, "target": target, "epochs": epochs, "seed": seed}
    write_results(output, rows, settings | {"image_size": [224, 224], "draws": draws})
    print_table(rows, f"{target}, {k_shot}-shot, {draws} draw(s), {backbone} ({weights_name}), 224 px", console)
    console.print(f"Gallery: {output / 'gallery.png'}; figures: {output / 'results.csv'}; checkpoint: {checkpoint}")


if __name__ == "__main__":
    auto_cli(main)
