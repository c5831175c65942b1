# SPDX-License-Identifier: Apache-2.0

"""Train ResAD on all products but one, show it that one through a few good photos, and look at the result.

Without ``--data`` the products are drawn (:mod:`benchmarks.products`). Everything runs through anomalib's engine. The
table compares, on the same reference photos and on raw scores: ResAD, the plain nearest-neighbor distance of the same
features, and, with ``--patchcore``, anomalib's Patchcore on the same backbone.
"""

import csv
import json
import logging
import os
import socket
import time
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import huggingface_hub.constants
import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.engine import Engine
from anomalib.models import AnomalibModule, Patchcore
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Resize

from anomalib_resad import CrossCategory, ProductFolder, ResAD
from anomalib_resad.backbone import FeaturePyramid
from benchmarks.gallery import draw_gallery
from benchmarks.products import PRODUCTS, make_product

console = Console()
LAYERS = ("layer1", "layer2", "layer3")
# A flow that trains in minutes on two cores. The paper's (8 layers, 256 position channels, lr 1e-5, 100 epochs, every
# patch) is the default of the model itself.
QUICK: dict[str, Any] = {
    "coupling_layers": 4,
    "position_channels": 64,
    "lr": 5e-4,
    "flow_batch_size": 2048,
    "flow_steps": 1,
}


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


def engine(output: Path, epochs: int | None = None) -> Engine:
    """An engine with a progress bar and no loggers."""
    limits: dict[str, Any] = {"max_epochs": epochs} if epochs else {}
    return Engine(default_root_dir=output, callbacks=[RichProgressBar()], enable_model_summary=False, **limits)


def predict(model: AnomalibModule, data: AnomalibDataModule, output: Path) -> list[ImageBatch]:
    """Raw predictions of the target's test images; ResAD enrolls the references first."""
    predictions: Any = engine(output).predict(model=model, datamodule=data, return_predictions=True)
    return list(predictions)


def auroc(predictions: list[ImageBatch]) -> dict[str, float | None]:
    """Image and pixel AUROC of raw scores.

    Not by torchmetrics, batch by batch: it passes those batches through a sigmoid that have a score beyond 0..1.
    """
    scores = torch.cat([torch.as_tensor(batch.pred_score) for batch in predictions])
    labels = torch.cat([torch.as_tensor(batch.gt_label) for batch in predictions])
    pixel = None
    if all(batch.gt_mask is not None for batch in predictions):
        maps = torch.cat([torch.as_tensor(batch.anomaly_map).flatten() for batch in predictions])
        masks = torch.cat([torch.as_tensor(batch.gt_mask).flatten() for batch in predictions])
        pixel = float(roc_auc_score(masks, maps))
    return {"image_AUROC": float(roc_auc_score(labels, scores)), "pixel_AUROC": pixel}


def predict_patchcore(resad: ResAD, data: ProductFolder, output: Path) -> list[ImageBatch]:
    """Raw predictions of anomalib's Patchcore, fitted on ResAD's references, with ResAD's backbone weights."""
    pyramid = resad.model.backbone
    size = resad.hparams["image_size"]
    model = Patchcore(
        backbone=pyramid.name,
        pre_trained=False,
        coreset_sampling_ratio=0.1,
        pre_processor=Patchcore.configure_pre_processor(size),
        post_processor=False,
        evaluator=False,
        visualizer=False,
    )
    extractor: Any = model.model.feature_extractor
    state = {key.removeprefix("model."): value for key, value in pyramid.net.state_dict().items()}
    extractor.feature_extractor.load_state_dict(state)
    names = [file["name"] for file in resad.model.bank.record["files"]]
    data.setup()
    train = data.train_data.samples
    chosen = data.train_data.subsample(
        [index for index, path in enumerate(train.image_path) if Path(path).name in names]
    )
    chosen.augmentations = Resize(size, antialias=True)
    loader = DataLoader(chosen, batch_size=len(chosen), collate_fn=chosen.collate_fn)
    run = engine(output)
    run.fit(model=model, train_dataloaders=loader)
    return predict(model, data, output)


def summarize(rows: list[dict[str, Any]], title: str) -> None:
    """Print mean and spread over the draws."""
    table = Table(title=title)
    for column in ("method", "image AUROC %", "pixel AUROC %"):
        table.add_column(column)
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for key in ("image_AUROC", "pixel_AUROC"):
            values = [100 * row[key] for row in rows if row["method"] == method and row.get(key) is not None]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread}" if values else "no masks")
        table.add_row(method, *cells)
    console.print(table)


def write_results(output: Path, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Write ``results.csv`` (one line per method and draw) and ``settings.json``, each whole or not at all."""
    fields = ["method", "target", "k_shot", "draw", "image_AUROC", "pixel_AUROC", "references"]
    temporary = output / "results.csv.part"
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(output / "results.csv")
    packages = ("anomalib", "torch", "timm", "FrEIA", "anomalib-resad")
    settings = settings | {"versions": {name: version(name) for name in packages}, "device": "cpu"}
    temporary = output / "settings.json.part"
    temporary.write_text(json.dumps(settings, indent=2) + "\n")
    temporary.replace(output / "settings.json")


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
    match: str = "l2",
    residual: str = "difference",
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
        patchcore: Test anomalib's Patchcore too.
        output: Folder for data, checkpoint, table and gallery.
    """
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "anomalib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not weights or not str(weights).strip():
        weights = None
    start = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    root = data or drawn_products(output / "products", seed)
    products = sorted(path.name for path in root.iterdir() if (path / "train" / "good").is_dir())
    target = target or products[-1]
    others = [product for product in products if product != target]
    if target not in products or not others:
        msg = f"target '{target}' and at least one other product must be in {root}, which holds {products}."
        raise ValueError(msg)
    seed_everything(seed)
    workers = min(2, os.cpu_count() or 1)
    settings, weights_name = backbone_arguments(backbone, weights)
    settings |= QUICK | {"k_shot": k_shot, "match": match, "residual": residual}
    if checkpoint is None:
        source = CrossCategory(
            ProductFolder(root, ", ".join(others)), None, train_batch_size=8, eval_batch_size=8, num_workers=workers
        )
        console.print(f"Training on {', '.join(others)} for {epochs} epochs; {target} is held out.")
        checkpoint = train(source, settings, epochs, output)
    minutes = (time.perf_counter() - start) / 60

    rows: list[dict[str, Any]] = []
    for draw in range(seed, seed + draws):
        target_data = partial(ProductFolder, root, target, eval_batch_size=8, num_workers=workers)
        resad, neighbor = (
            ResAD(
                checkpoint=checkpoint,
                estimator=estimator,
                k_shot=k_shot,
                reference_seed=draw,
                post_processor=False,
                evaluator=False,
                visualizer=False,
            )
            for estimator in ("flow", "distance")
        )
        predictions = {
            "ResAD": predict(resad, target_data(), output),
            "nearest neighbor": predict(neighbor, target_data(), output),
        }
        if patchcore:
            predictions["Patchcore"] = predict_patchcore(resad, target_data(), output)
        names = " ".join(file["name"] for file in resad.model.bank.record["files"])
        row = {"target": target, "k_shot": k_shot, "draw": draw, "references": names}
        rows += [row | {"method": method} | auroc(batches) for method, batches in predictions.items()]
        if draw == seed:
            draw_gallery(predictions, output / "gallery.png")
    settings |= {"weights": weights_name, "source": others, "target": target, "epochs": epochs, "seed": seed}
    write_results(output, rows, settings | {"image_size": [224, 224], "draws": draws, "training_minutes": minutes})
    summarize(rows, f"{target}, {k_shot}-shot, {draws} draw(s), {backbone} ({weights_name}), 224 px")
    console.print(
        f"Training took {minutes:.1f} min. Gallery: {output / 'gallery.png'}; figures: {output / 'results.csv'}; "
        f"checkpoint: {checkpoint}"
    )


if __name__ == "__main__":
    auto_cli(main)
