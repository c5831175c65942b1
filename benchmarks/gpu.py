# SPDX-License-Identifier: Apache-2.0

"""Both papers' methods at their published schedule, and times on a GPU: ``make gpu``.

Each product is left out in turn; both methods are trained on the others, and compared with the plain distance of the
same features, which their flows should beat. What was stopped goes on, at the epoch that was reached.
"""

from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from jsonargparse import auto_cli

from benchmarks.leaderboard import main as leaderboard
from benchmarks.speed import speed

RESAD = "anomalib_resad.ResAD"
EPOCHS = 100  # of both papers
BATCH = 32  # images


def methods(epochs: int) -> dict[str, dict[str, Any]]:
    """Both methods at their presets, the distances that they start from, the default, and Patchcore."""
    found: dict[str, dict[str, Any]] = {}
    for variant in ("resad", "resad++"):
        found[variant] = {"class_path": RESAD, "init_args": {"variant": variant}, "source_epochs": epochs}
        distance = {"variant": variant, "estimator": "distance"}
        found[f"{variant}, its distance"] = {"class_path": RESAD, "init_args": distance}
    found["default"] = {"class_path": RESAD, "source_epochs": min(epochs, 8)}
    return found | {"Patchcore": {"class_path": "anomalib.models.Patchcore"}}


def main(
    target: AnomalibDataModule,
    output: Path = Path("results/gpu"),
    weights: Path | None = None,
    epochs: int = EPOCHS,
    categories: list[str] | None = None,
    shots: list[int] = [2, 4],  # noqa: B006  # read only
    draws: int = 3,
    repeats: int = 9,
    speed_backbones: tuple[str, ...] = ("resnet18", "wide_resnet50_2"),
    device: str | None = None,
) -> None:
    """Train, compare, and time.

    Args:
        target: Datamodule of the products, separated by commas.
        output: Folder for cells, checkpoints, reports, and times.
        weights: Local file with the weights of ResNet-18; by default timm's.
        epochs: Epochs of both methods; 100 are published.
        categories: Products to leave out; by default each.
        shots: Numbers of reference photos.
        draws: Draws of them.
        repeats: Counted rounds of the times.
        speed_backbones: Backbones to time; none times nothing.
        device: Where to time, by default the GPU if there is one. Trainings choose for themselves.
    """
    leaderboard(
        target=target,
        categories=categories,
        methods=methods(epochs),
        output=output / "papers_resnet18",
        shots=shots,
        draws=draws,
        backbone="resnet18",
        weights=weights,
        baseline="resad, its distance",
        gallery_shots=shots[-1],
        source_batch_size=BATCH,
    )
    if speed_backbones:
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        speed(output / f"speed_{where}", speed_backbones, repeats=repeats, device=where)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
