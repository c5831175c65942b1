# SPDX-License-Identifier: Apache-2.0

"""What each method costs beside its backbone alone: per stage, per photo, to enroll, to train, in memory.

Everything that is compared is timed in turn, so that all of it meets the same load of the machine; the ratios are the
figures. Weights are untrained and photos are noise: neither changes the time.
"""

import json
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from anomalib.data import Folder
from anomalib.deploy import CompressionType
from anomalib.models import Patchcore
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torchvision.utils import save_image

from anomalib_resad import ResAD
from anomalib_resad.enrollment.rotations import TURNS, Rotations, enrolled_rows
from anomalib_resad.method.joined_levels import distance_within
from anomalib_resad.method.presets import VARIANTS
from anomalib_resad.method.reference_bank import to_rows
from benchmarks.measure import PeakMemory
from benchmarks.settings import PACKAGES, cpu, write_whole

Actions = dict[str, Callable[[], Any]]
Row = dict[str, Any]
BACKBONE = "backbone alone"
TURNED = "fused, turned product"
TRAINING_BATCH = 8


def in_turn(actions: Actions, repeats: int, what: str) -> list[Row]:
    """Time actions in turn; a ratio is the median over the rounds, each to the first action's time of that round."""
    rounds: list[list[float]] = []
    for _ in track(range(repeats + 1), what, transient=True):
        times = []
        for action in actions.values():
            start = time.perf_counter()
            action()
            times.append(1000 * (time.perf_counter() - start))
        rounds.append(times)
    counted = rounds[1:]  # the first round warms up
    return [
        {"item": name, "ms": median(times[i] for times in counted), "ratio": median(t[i] / t[0] for t in counted)}
        for i, name in enumerate(actions)
    ]


def enrolled(backbone: str, variant: str, photos: Tensor, is_turned: bool = False) -> ResAD:
    """An untrained ResAD that knows some photos, in evaluation mode; turned copies make a bank half as large again."""
    model = ResAD(backbone, pre_trained=False, variant=variant, visualizer=False, evaluator=False).eval()  # type: ignore[arg-type]
    files = [{"name": f"noise {number}"} for number in range(len(photos))]
    rows = [to_rows(level) for level in model.model.encode(photos)]
    if is_turned:
        rows = [torch.cat([level, level[: len(level) // 2]]) for level in rows]
    model.model.bank.store(rows, {"files": files, "rotations": TURNS if is_turned else 1})
    return model


def known(backbone: str, variants: Sequence[str], references: Tensor) -> dict[str, ResAD]:
    """The default, other variants, and the default with a product that lies turned."""
    models = {variant: enrolled(backbone, variant, references) for variant in dict.fromkeys(("fused", *variants))}
    return models | {TURNED: enrolled(backbone, "fused", references, is_turned=True)}


def patchcore(backbone: str, ratio: float, photos: Tensor) -> Patchcore:
    """Patchcore of anomalib with a bank of the same photos."""
    model = Patchcore(backbone, pre_trained=False, coreset_sampling_ratio=ratio, visualizer=False, evaluator=False)
    model.model.train()
    model.model(photos)
    model.model.subsample_embedding(ratio)
    return model.eval()


def stages(model: ResAD, photos: Tensor) -> Actions:
    """The default model's stages behind the backbone, each on what the one before it gives."""
    net = model.model
    assert net.join is not None
    assert net.head is not None
    head, join = net.head, net.join
    levels, features = net.backbone(photos), net.encode(photos)
    residual, within = to_rows(features[0] - net.bank(features)[0]), distance_within(features[-1])
    anomalies = [head(residual, within)]
    return {
        "fused: join": lambda: join(levels),
        "fused: match": lambda: net.bank(features),
        "fused: distance within": lambda: distance_within(features[-1]),
        "fused: head": lambda: head(residual, within),
        "fused: map": lambda: net.anomaly_map(anomalies, photos.shape[-2:]),
    }


def torch_rows(backbone: str, variants: Sequence[str], references: Tensor, batch: int, repeats: int) -> list[Row]:
    """Times per batch in PyTorch."""
    photos = torch.randn(batch, 3, 224, 224)
    models = known(backbone, variants, references)
    rivals = {f"Patchcore {ratio:g}": patchcore(backbone, ratio, references) for ratio in (0.1, 1.0)}
    fused = models["fused"].model
    actions: Actions = {BACKBONE: lambda: fused.backbone(photos)}
    actions |= {f"{name}: whole": partial(model.model, photos) for name, model in (models | rivals).items()}
    actions |= stages(models["fused"], photos)
    rows = in_turn(actions, repeats, f"{backbone}, torch, batch {batch}")
    return [{"backbone": backbone, "runtime": "torch", "batch": batch} | row for row in rows]


def openvino_rows(
    backbone: str, variants: Sequence[str], references: Tensor, batches: Sequence[int], repeats: int, threads: int
) -> list[Row]:
    """Times per batch of the exports, pre-processing inside, against the backbone exported alone in that precision."""
    import openvino as ov  # noqa: PLC0415  # an extra

    from anomalib_resad.export.openvino_float32 import quantize_encoder  # noqa: PLC0415

    core = ov.Core()
    rows: list[Row] = []
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = known(backbone, variants, references)
        rivals = {f"Patchcore {ratio:g}": patchcore(backbone, ratio, references) for ratio in (0.1, 1.0)}
        noise, size = noise_photos(folder / "noise"), (224, 224)
        alone = _export(models["fused"].model.backbone, folder)
        files: dict[str, Any] = {BACKBONE: core.read_model(alone)}
        files |= {name: model.to_openvino(folder / name, input_size=size) for name, model in models.items()}
        # Of Patchcore, an export for any batch size would only take the size of the example.
        single = {
            name: model.to_openvino(folder / name, input_size=size, onnx_kwargs={"dynamic_shapes": None})
            for name, model in rivals.items()
        }
        arrays = [torch.rand(1, 3, 224, 224).numpy() for _ in range(10)]
        quantized = {
            BACKBONE: quantize_encoder(core.read_model(alone), arrays),
            "fused": models["fused"].to_openvino(
                folder / "int8", input_size=size, compression_type=CompressionType.INT8_PTQ, datamodule=noise
            ),
        }
        for precision, batch in product(("f32", "bf16", "int8"), batches):
            chosen = quantized if precision == "int8" else files | (single if batch == 1 else {})
            photos = torch.rand(batch, 3, 224, 224).numpy()
            config = {
                "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
                "INFERENCE_NUM_THREADS": threads,
            }
            actions: Actions = {}
            for title, file in chosen.items():
                model = file.clone() if isinstance(file, ov.Model) else core.read_model(file)
                model.reshape(photos.shape)
                actions[title] = partial(
                    core.compile_model(model, "CPU", config).create_infer_request().infer, [photos]
                )
            timed = in_turn(actions, repeats, f"{backbone}, OpenVINO, {precision}, batch {batch}")
            rows += [{"backbone": backbone, "runtime": f"openvino {precision}", "batch": batch} | row for row in timed]
    return rows


def noise_photos(folder: Path, count: int = 10) -> Folder:
    """Photos to calibrate 8-bit ranges with; the time does not depend on what they show."""
    folder.mkdir()
    for number in range(count):
        save_image(torch.rand(3, 224, 224), folder / f"{number}.png")
    return Folder("noise", normal_dir=folder, train_batch_size=1, num_workers=0, val_split_mode="none")


def _export(module: nn.Module, folder: Path) -> Path:
    program = torch.onnx.export(module, (torch.rand(1, 3, 224, 224),), dynamo=True, verbose=False)
    assert program is not None
    program.save(folder / "backbone.onnx")
    return folder / "backbone.onnx"


def training_rows(backbone: str, references: Tensor, repeats: int) -> list[Row]:
    """One training step on a batch of images, with and without their features at hand, against the backbone."""
    photos = torch.randn(TRAINING_BATCH, 3, 224, 224)
    shares = torch.zeros(TRAINING_BATCH, 28, 28)
    shares[:, :6, :6] = 1
    model = enrolled(backbone, "fused", references).model
    assert model.head is not None
    optimizer = torch.optim.Adam(model.head.parameters(), lr=1e-3)
    features = model.encode(photos)
    rows_of_each = [model.bank.levels] * TRAINING_BATCH

    def step(maps: list[Tensor]) -> None:
        model.train()
        optimizer.zero_grad()
        with torch.enable_grad():
            model.head_loss(maps, rows_of_each, shares).backward()
        optimizer.step()

    actions: Actions = {
        BACKBONE: lambda: model.backbone(photos),
        "fused: step, features kept": lambda: step(features),
        "fused: step, features computed": lambda: step(model.encode(photos)),
    }
    timed = in_turn(actions, repeats, f"{backbone}, training")
    return [{"backbone": backbone, "runtime": "torch training", "batch": TRAINING_BATCH} | row for row in timed]


def other_rows(backbone: str, repeats: int) -> list[Row]:
    """Enrollment of four photos against four times the backbone, and memory beyond the bank at 4 and 64 shots."""
    photos = torch.randn(4, 3, 224, 224)
    model = enrolled(backbone, "fused", photos).model
    pixels = [np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8) for _ in photos]

    def encode(array: np.ndarray) -> list[np.ndarray]:
        photo = torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float()
        return [to_rows(level).numpy() for level in model.encode(photo)]

    actions: Actions = {BACKBONE: lambda: [model.backbone(photo[None]) for photo in photos]}
    ways: tuple[tuple[Rotations, str], ...] = ((1, ""), (4, ", 4 ways round"), (TURNS, ", 8 ways round"))
    for rotations, what in ways:
        actions[f"fused: enroll 4 photos{what}"] = partial(enrolled_rows, pixels, encode, True, rotations)
    rows = in_turn(actions, repeats, f"{backbone}, enrollment")
    for shots in (4, 64):
        model.bank.fill([level.repeat(shots // 4, 1, 1, 1) for level in model.encode(photos)])
        with PeakMemory() as peak:
            model(photos[:1])
        used = None if peak.bytes is None else peak.bytes / 1e6
        bank = sum(level.nbytes for level in model.bank.levels) / 1e6
        rows.append({"item": f"fused: {shots} shots", "peak_mb": used, "bank_mb": bank})
    return [{"backbone": backbone, "runtime": "torch", "batch": 1} | row for row in rows]


@torch.no_grad()
def speed(
    output: Path,
    backbones: tuple[str, ...] = ("resnet18", "wide_resnet50_2"),
    variants: tuple[str, ...] = tuple(VARIANTS),
    batches: tuple[int, ...] = (1, 8),
    shots: int = 4,
    repeats: int = 9,
    threads: int = 2,
    seed: int = 0,
) -> None:
    """Measure and write ``speed.csv`` and ``speed.json``.

    Args:
        output: Folder to write to.
        backbones: timm model names.
        variants: Those to measure beside the default.
        batches: Batch sizes.
        shots: Reference photos.
        repeats: Counted rounds.
        threads: CPU threads.
        seed: Seed of weights and photos.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    references = torch.randn(shots, 3, 224, 224)
    rows: list[Row] = []
    for backbone in backbones:
        for batch in batches:
            rows += torch_rows(backbone, variants, references, batch, repeats)
        rows += openvino_rows(backbone, variants, references, batches, repeats, threads)
        rows += training_rows(backbone, references, repeats)
        rows += other_rows(backbone, repeats)
        write(output, rows, {"shots": shots, "repeats": repeats, "threads": threads, "seed": seed})
    show(rows)


def write(output: Path, rows: list[Row], settings: dict[str, Any]) -> None:
    """Write what was measured so far, and with what."""
    output.mkdir(parents=True, exist_ok=True)
    fields = ["backbone", "runtime", "batch", "item", "ms", "ratio", "peak_mb", "bank_mb"]
    write_whole(output / "speed.csv", pd.DataFrame(rows, columns=fields).to_csv(index=False, float_format="%.4g"))
    about = settings | {
        "image_size": [224, 224],
        "weights": "untrained",
        "references": "noise",
        "cpu": cpu(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in (*PACKAGES, "openvino")},
    }
    write_whole(output / "speed.json", json.dumps(about, indent=2) + "\n")


def show(rows: list[Row]) -> None:
    """Print the table."""
    table = Table("backbone", "runtime", "batch", "item", "ms", "x backbone", "peak MB", "bank MB")
    for row in rows:
        figures = (row.get(key) for key in ("ms", "ratio", "peak_mb", "bank_mb"))
        formats = ("{:.1f}", "{:.2f}", "{:.0f}", "{:.1f}")
        cells = [form.format(value) if value is not None else "" for form, value in zip(formats, figures, strict=True)]
        table.add_row(row["backbone"], row["runtime"], str(row["batch"]), row["item"], *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    auto_cli(speed, as_positional=False)
