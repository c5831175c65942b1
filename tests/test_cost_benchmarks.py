# SPDX-License-Identifier: Apache-2.0

"""The benchmarks of cost run as documented, small: speed beside the backbone, and the edge without PyTorch."""

import csv
import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import timm
import torch

from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.enrollment.ranking import auroc
from benchmarks.edge import auroc_of, enrollment_table

ROOT = Path(__file__).resolve().parents[1]
SMALL = "test_resnet.r160_in1k"  # timm's smallest ResNet


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The benchmarks set them."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(monkeypatch: pytest.MonkeyPatch, module: str, *arguments: str) -> None:
    """As ``python -m``, in this process: to import PyTorch and anomalib once more would be most of the time."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def test_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nncf")
    options = ("--backbones", f"[{SMALL}]", "--batches", "[1]", "--ratios", "[0.1]", "--repeats", "1", "--threads", "1")
    shallow = {"resad": {"variant": "resad", "coupling_layers": 1, "layers": ["layer2"]}}
    run(monkeypatch, "benchmarks.speed", "--output", str(tmp_path), "--variants", json.dumps(shallow), *options)
    rows = list(csv.DictReader((tmp_path / "speed.csv").open()))
    items = {(row["runtime"], row["item"]): row for row in rows}
    whole = {"fused", "fused, rotated product", "resad", "Patchcore 0.1"}
    assert items.keys() >= {("torch", f"{name}: whole") for name in whole}
    assert items.keys() >= {
        ("torch", f"fused: {stage}") for stage in ("join", "match", "self-similarity", "head", "map")
    }
    for precision in ("f32", "bf16", "int8"):
        measured = {item: float(row["ratio"]) for (runtime, item), row in items.items() if precision in runtime}
        expected = {"f32": whole, "bf16": whole - {"resad"}, "int8": {"fused"}}[precision]
        assert measured.keys() == {"backbone alone"} | expected
        assert measured["backbone alone"] == 1
        assert min(measured.values()) > 0
    for row in rows:
        if row["ratio"]:
            assert float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])
    for ways in ("", ", 4 orientations", ", 8 orientations"):
        assert float(items["torch", f"fused: enroll 4 photos{ways}"]["ms"]) > 0
    assert float(items["torch training", "fused: step, features kept"]["ms"]) > 0
    assert float(items["torch", "fused: 64 shots"]["bank_mb"]) > 10 * float(items["torch", "fused: 4 shots"]["bank_mb"])
    assert json.loads((tmp_path / "speed.json").read_text())["threads"] == 1


def test_training_with_and_without_kept_features(
    products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "source.yaml"
    config.write_text(
        f"source:\n  class_path: anomalib_resad.ProductFolder\n"
        f"  init_args: {{root: {products}, category: 'grain, pill', num_workers: 0}}\n"
    )
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model(SMALL, pretrained=False).state_dict(), weights)
    options = ("--epochs", "2", "--threads", "1", "--backbone", SMALL, "--weights", str(weights))
    run(monkeypatch, "benchmarks.training", "--config", str(config), "--output", str(tmp_path), *options)
    rows = list(csv.DictReader((tmp_path / "training.csv").open()))
    assert [(row["cache_gb"], row["epoch"]) for row in rows] == [("4", "0"), ("4", "1"), ("0", "0"), ("0", "1")]
    for kept, computed in zip(rows[:2], rows[2:], strict=True):
        assert float(kept["loss"]) == pytest.approx(float(computed["loss"]), rel=1e-2)


def test_edge_without_torch(bundle: Path, products: Path, tmp_path: Path) -> None:
    """20 products, another one at each photo: nothing leaks from one to the next."""
    photos, output = products / "tiles", tmp_path / "device.json"
    options = ("--threads", "1", "--predictions", "120", "--most", "6", "--output", str(output))
    where = ("--bundle", str(bundle), "--references", str(photos / "train" / "good"), "--photos", str(photos / "test"))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.edge", "device", *where, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text())
    assert result["many"]["changed_scores"] == 0
    assert result["many"]["products"] == 20
    assert result["ratio"] > 0
    assert result["rotations"] == 1
    assert result["enroll_rotated_s"] > result["enroll_plain_s"] > 0
    plain, rotated = csv.DictReader(enrollment_table({"tiny": result}, 4).splitlines())
    assert (plain["photos"], plain["orientations"], rotated["orientations"]) == ("4", "1", "8")
    assert float(rotated["seconds"]) > float(plain["seconds"])
    assert [row["max_patches"] for row in result["coreset"]] == [None, 4000, 1000]
    assert all(0 <= row["image_auroc"] <= 1 for row in result["coreset"])


def test_equal_scores_count_half_in_an_auroc(tmp_path: Path) -> None:
    """As everywhere else: a model that gives all photos one score knows as much as a coin, not less."""
    assert auroc([0.5, 0.5, 0.9], [False, True, True]) == 0.75
    assert auroc([0.5, 0.9], [True, True]) is None
    blind: Any = SimpleNamespace(predict=lambda *_: SimpleNamespace(raw_score=0.5))
    photos = [tmp_path / folder / "0.png" for folder in ("good", "spot", "good")]
    assert auroc_of(cast("ResADInferencer", blind), "product", photos) == 0.5
    assert auroc_of(cast("ResADInferencer", blind), "product", photos[:1]) is None
