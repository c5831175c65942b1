# SPDX-License-Identifier: Apache-2.0

"""The benchmarks of growth, of the first epoch, and of a GPU, small; trainings of leaderboards go on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from rich.progress import Progress

from anomalib_resad import ResAD
from benchmarks import first_epoch, gpu, growth, speed_device
from benchmarks.methods import Backbone, Method, train_source
from benchmarks.speed_models import enrolled, rivals
from tests.conftest import cross_category
from tests.test_cost_benchmarks import SMALL


def test_growth(bundle_default: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = growth.model_rows(SMALL, (1, 2), (1, 8), 1)
    assert [(row["grows"], row["times"]) for row in rows] == [
        ("photo area", 1),
        ("photo area", 2),
        ("references", 1),
        ("references", 8),
    ]
    assert rows[3]["searched_mb"] == pytest.approx(8 * rows[2]["searched_mb"])
    assert rows[1]["searched_mb"] == pytest.approx(rows[0]["searched_mb"] * (320 / 224) ** 2)
    shutil.copytree(bundle_default, tmp_path / "bundle")
    growth.products(tmp_path / "bundle", "1,3", threads=1)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["times"] for row in found] == [1, 3]
    assert len(list((tmp_path / "bundle" / "banks").glob("*.safetensors"))) == 3
    growth.plot(rows + [row | {"ratio": row["ms"] / row["backbone_ms"]} for row in found], tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_first_epoch(
    products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(first_epoch, "quiet_lightning", lambda: None)
    names = ["grain", "pill"]
    first_epoch.make_photos(products, names, 30, tmp_path / "photos")
    contents = [path.read_bytes() for path in (tmp_path / "photos").rglob("train/good/*.png")]
    assert len(contents) == len(set(contents)) == 30 - len(list(products.glob("[gp]*/test/*/*")))
    settings = {"cache_dir": str(tmp_path / "cache"), "pre_trained": False, "image_size": (64, 64), "k_shot": 2}
    first_epoch.one(tmp_path / "photos", ",".join(names), settings, 0, 4, 1)
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["images"] == 30
    assert (
        row["in_memory"]
        == len(list((tmp_path / "cache").glob("*.pt")))
        == 60 - len(list(products.glob("[gp]*/ground_truth/*/*")))
    )
    table = tmp_path / "table.csv"
    for seconds in (1.0, 2.0):
        first_epoch.keep({"photos": 30, "method": "default", "features": "memory", "before_s": seconds}, table)
    assert table.read_text().splitlines()[1:] == ["30,default,memory,2"]


def test_the_run_for_a_gpu_is_that_of_the_papers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(gpu, "leaderboard", lambda **given: asked.update(given))
    monkeypatch.setattr(gpu, "speed", lambda *given, **named: asked.update(speed=(given, named)))
    gpu.main(target="all products", output=tmp_path)  # type: ignore[arg-type]
    methods = {name: Method(**spec) for name, spec in asked["methods"].items()}
    assert [name for name, method in methods.items() if method.source_epochs == 100] == ["resad", "resad++"]
    for name in ("resad", "resad++"):
        trained = ResAD(SMALL, pre_trained=False, layers=["layer2"], **methods[name].init_args)
        plain = ResAD(SMALL, pre_trained=False, layers=["layer2"], **methods[f"{name}, its distance"].init_args)
        assert trained.is_trainable
        assert not plain.is_trainable
        assert trained.hparams["match"] == plain.hparams["match"], "the distance that its flow should beat"
    assert asked["speed"][1]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")


def test_times_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_device, "WAYS", ("eager",))  # to compile takes a minute
    photos = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        models = {"fused": enrolled(SMALL, photos), **rivals(SMALL, (0.1,), photos)}
    rows = speed_device.device_rows(SMALL, models, (1,), 1, "cpu")
    assert [row["item"] for row in rows] == 2 * ["backbone alone", "fused", "Patchcore 0.1"]
    assert [row["runtime"] for row in rows] == 3 * ["torch cpu, eager, f32"] + 3 * ["torch cpu, eager, bf16"]


def test_a_training_that_is_stopped_goes_on(products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the epoch that was reached, to the weights of a training without interruption."""
    torch.manual_seed(0)
    torch.save(timm.create_model(SMALL, pretrained=False).state_dict(), tmp_path / "weights.pth")
    method, backbone = (
        Method("anomalib_resad.ResAD", source_epochs=3),
        Backbone(SMALL, tmp_path / "weights.pth", True, (64, 64)),
    )
    epochs: list[int] = []
    step = ResAD.training_step

    def watched(model: ResAD, batch: Any, batch_idx: int = 0) -> Any:
        epochs.append(model.current_epoch)
        if monkeypatched and model.current_epoch == 2:
            msg = "stopped"
            raise RuntimeError(msg)
        return step(model, batch, batch_idx)

    monkeypatch.setattr(ResAD, "training_step", watched)
    monkeypatched = False

    def train(name: str) -> dict[str, torch.Tensor]:
        path = tmp_path / name / "model.ckpt"
        train_source(method, backbone, cross_category(products, target=None), 0, path, Progress(disable=True))
        assert not path.with_suffix(".training").exists()
        return torch.load(path, weights_only=False)["state_dict"]

    whole = train("whole")
    monkeypatched = True
    with pytest.raises(RuntimeError, match="stopped"):
        train("stopped")
    monkeypatched = False
    epochs.clear()
    resumed = train("stopped")
    assert set(epochs) == {2}
    assert json.loads((tmp_path / "stopped" / "model.json").read_text())["resumed"]
    for name, value in whole.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, equal_nan=True, msg=name)
