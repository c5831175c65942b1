# SPDX-License-Identifier: Apache-2.0

"""What each method costs beside its backbone alone: per stage, per photo, to enroll, to train, in memory.

Everything that is compared is timed in turn, so that all of it meets the same load of the machine; the ratios are the
figures. Weights are untrained and photos are noise: neither changes the time.
"""

import json
import platform
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anomalib.models import Patchcore
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor

from anomalib_resad import ResAD
from anomalib_resad.enrollment.files import write_whole
from anomalib_resad.enrollment.rotations import ORIENTATIONS, Rotations, enrolled_rows
from anomalib_resad.method.features import Features, as_list, from_list, rows_of
from anomalib_resad.method.head import EvidenceHead
from anomalib_resad.method.presets import PRESETS
from anomalib_resad.method.self_similarity import self_similarity_distance
from benchmarks.measure import PeakMemory
from benchmarks.settings import PACKAGES, cpu
from benchmarks.speed_device import device_name, device_rows
from benchmarks.speed_models import BACKBONE, Actions, Row, enrolled, in_turn, known, rivals
from benchmarks.speed_openvino import openvino_rows

TRAINING_BATCH = 8
VARIANTS: dict[str, dict[str, Any]] = {name: {"variant": name} for name in PRESETS if name != "fused"}


def stages(model: ResAD, photos: Tensor) -> Actions:
    """The default model's stages behind the backbone, each on what the one before it gives."""
    net = model.model
    head, join = net.estimator, net.encoder.join
    assert isinstance(head, EvidenceHead)
    assert join is not None
    levels, features = net.encoder.backbone(photos), net.encode(photos)
    keys = torch.as_tensor(features.keys)
    matched = net.bank(features)
    anomalies = head(features, matched)
    return {
        "fused: join": lambda: join(levels),
        "fused: match": lambda: net.bank(features),
        "fused: self-similarity": lambda: self_similarity_distance(keys),
        "fused: head": lambda: head(features, matched),
        "fused: map": lambda: net.anomaly_map(anomalies, photos.shape[-2:]),
    }


def torch_rows(
    backbone: str, models: Mapping[str, ResAD], others: Mapping[str, Patchcore], batch: int, repeats: int
) -> list[Row]:
    """Times per batch in PyTorch."""
    photos = torch.randn(batch, 3, 224, 224)
    fused = models["fused"].model
    actions: Actions = {BACKBONE: lambda: fused.encoder.backbone(photos)}
    actions |= {f"{name}: whole": partial(model.model, photos) for name, model in {**models, **others}.items()}
    actions |= stages(models["fused"], photos)
    rows = in_turn(actions, repeats, f"{backbone}, torch, batch {batch}")
    return [{"backbone": backbone, "runtime": "torch", "batch": batch} | row for row in rows]


def training_rows(backbone: str, references: Tensor, repeats: int) -> list[Row]:
    """One training step on a batch of images, with and without their features at hand, against the backbone."""
    photos = torch.randn(TRAINING_BATCH, 3, 224, 224)
    mask = torch.zeros(TRAINING_BATCH, 224, 224)
    mask[:, :48, :48] = 1
    model = enrolled(backbone, references).model.train()
    optimizer = torch.optim.Adam(model.estimator.parameters(), lr=1e-3)
    features = model.encode(photos)
    rows_of_each = [model.bank.rows] * TRAINING_BATCH

    @torch.enable_grad()
    def step(features: Features) -> None:
        for losses in model.losses(features.photos, rows_of_each, [*mask], 0.0):
            optimizer.zero_grad()
            torch.stack([*losses.values()]).sum().backward()
            optimizer.step()

    actions: Actions = {
        BACKBONE: lambda: model.encoder.backbone(photos),
        "fused: step, features kept": lambda: step(features),
        "fused: step, features computed": lambda: step(model.encode(photos)),
    }
    timed = in_turn(actions, repeats, f"{backbone}, training")
    return [{"backbone": backbone, "runtime": "torch training", "batch": TRAINING_BATCH} | row for row in timed]


def other_rows(backbone: str, repeats: int) -> list[Row]:
    """Enrollment of four photos against four times the backbone, and memory beyond the bank at 4 and 64 shots."""
    photos = torch.randn(4, 3, 224, 224)
    model = enrolled(backbone, photos).model
    pixels = [np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8) for _ in photos]

    def encode(array: np.ndarray) -> list[np.ndarray]:
        photo = torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float()
        return [level.numpy() for level in as_list(rows_of(model.encode(photo)))]

    actions: Actions = {BACKBONE: lambda: [model.encoder.backbone(photo[None]) for photo in photos]}
    ways: tuple[tuple[Rotations, str], ...] = ((1, ""), (4, ", 4 orientations"), (ORIENTATIONS, ", 8 orientations"))
    for rotations, what in ways:
        actions[f"fused: enroll 4 photos{what}"] = partial(enrolled_rows, pixels, encode, True, rotations)
    rows = in_turn(actions, repeats, f"{backbone}, enrollment")
    for shots in (4, 64):
        repeated = [level.repeat(shots // 4, 1, 1, 1) for level in as_list(model.encode(photos))]
        model.bank.fill(from_list(repeated, model.bank.keyed))
        with PeakMemory() as peak:
            model(photos[:1])
        used = None if peak.bytes is None else peak.bytes / 1e6
        bank = sum(level.nbytes for level in as_list(model.bank.rows)) / 1e6
        rows.append({"item": f"fused: {shots} shots", "peak_mb": used, "bank_mb": bank})
    return [{"backbone": backbone, "runtime": "torch", "batch": 1} | row for row in rows]


@torch.no_grad()
def speed(
    output: Path,
    backbones: tuple[str, ...] = ("resnet18", "wide_resnet50_2"),
    variants: dict[str, dict[str, Any]] = VARIANTS,
    ratios: tuple[float, ...] = (0.1, 1.0),
    batches: tuple[int, ...] = (1, 8),
    shots: int = 4,
    repeats: int = 9,
    threads: int = 2,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Measure and write ``speed.csv`` and ``speed.json``; rows of other backbones that are there stay.

    Args:
        output: Folder to write to.
        backbones: timm model names.
        variants: Models to measure beside the default: names, and arguments of ResAD.
        ratios: Patchcores to measure: shares of the rows that their coresets keep.
        batches: Batch sizes.
        shots: Reference photos.
        repeats: Counted rounds.
        threads: CPU threads.
        seed: Seed of weights and photos.
        device: Measure PyTorch on this device instead, eager and compiled, in float32 and bfloat16: ``cuda``, ``cpu``.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    references = torch.randn(shots, 3, 224, 224)
    rows = kept_rows_of_others(output / "speed.csv", backbones)
    for backbone in backbones:
        models, others = known(backbone, variants, references), rivals(backbone, ratios, references)
        settings: dict[str, Any] = {"shots": shots, "repeats": repeats, "threads": threads, "seed": seed}
        if device is not None:
            parts = [partial(device_rows, backbone, {**models, **others}, batches, repeats, device)]
            settings |= {"device": device_name(device)}
        else:
            parts = [partial(torch_rows, backbone, models, others, batch, repeats) for batch in batches]
            parts += [
                partial(openvino_rows, backbone, models, others, batches, repeats, threads),
                partial(training_rows, backbone, references, repeats),
                partial(other_rows, backbone, repeats),
            ]
        for part in parts:
            rows += part()
            write(output, rows, settings)
    show(rows)


def kept_rows_of_others(path: Path, backbones: tuple[str, ...]) -> list[Row]:
    """Rows of backbones that are not to be measured."""
    if not path.is_file():
        return []
    table = pd.read_csv(path).astype(object)
    others = table[~table["backbone"].isin(backbones)]
    return [
        {str(key): value for key, value in row.items()} for row in others.where(others.notna(), None).to_dict("records")
    ]


def write(output: Path, rows: list[Row], settings: dict[str, Any]) -> None:
    """Write what was measured so far, and with what."""
    output.mkdir(parents=True, exist_ok=True)
    fields = ["backbone", "runtime", "batch", "item", "ms", "ratio", "ratio_low", "ratio_high", "peak_mb", "bank_mb"]
    table = pd.DataFrame(rows, columns=fields).to_csv(index=False, float_format="%.4g")
    write_whole(output / "speed.csv", table.encode())
    about = settings | {
        "image_size": [224, 224],
        "weights": "untrained",
        "references": "noise",
        "cpu": cpu(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in (*PACKAGES, "openvino")},
    }
    write_whole(output / "speed.json", (json.dumps(about, indent=2) + "\n").encode())


def show(rows: list[Row]) -> None:
    """Print the table."""
    table = Table("backbone", "runtime", "batch", "item", "ms", "x backbone", "quartiles", "", "peak MB", "bank MB")
    for row in rows:
        figures = (row.get(key) for key in ("ms", "ratio", "ratio_low", "ratio_high", "peak_mb", "bank_mb"))
        formats = ("{:.1f}", "{:.2f}", "{:.2f}", "{:.2f}", "{:.0f}", "{:.1f}")
        cells = [form.format(value) if value is not None else "" for form, value in zip(formats, figures, strict=True)]
        table.add_row(row["backbone"], row["runtime"], str(row["batch"]), row["item"], *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    auto_cli(speed, as_positional=False)
