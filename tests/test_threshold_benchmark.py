# SPDX-License-Identifier: Apache-2.0

"""The benchmark of thresholds: its arithmetic, and a whole run on tiny products that goes on and refuses a mixture."""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from sklearn.metrics import f1_score as sklearn_f1

from anomalib_resad import ResAD
from anomalib_resad.enrollment.calibration import product_threshold
from benchmarks.methods import Method
from benchmarks.threshold import best_possible, best_threshold, f1_score, image_figures, labeled_half, main, shown
from tests.conftest import product

CONFIGS = Path(__file__).resolve().parents[1] / "benchmarks" / "configs"


@pytest.fixture
def judged() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(60, generator=generator) > 0.6
    return torch.randn(60, generator=generator) + labels, labels


def test_figures_are_those_of_scikit_learn(judged: tuple[torch.Tensor, torch.Tensor]) -> None:
    scores, labels = judged
    found = scores > 0.3
    figures = image_figures(found, labels)
    assert figures["F1"] == pytest.approx(sklearn_f1(labels, found))
    assert figures["false_alarm_rate"] == pytest.approx(((scores > 0.3) & ~labels).sum() / (~labels).sum())
    assert figures["recall"] == pytest.approx(((scores > 0.3) & labels).sum() / labels.sum())


def test_no_threshold_beats_the_best_and_anomalib_finds_it_too(judged: tuple[torch.Tensor, torch.Tensor]) -> None:
    scores, labels = judged
    best = f1_score(scores > best_possible(scores, labels), labels)
    assert best == max(sklearn_f1(labels, scores > limit) for limit in [-9.0, *scores.tolist()])
    assert f1_score(scores > best_threshold(scores, labels), labels) == pytest.approx(best)
    assert f1_score(labeled_half(scores, labels, 0), labels) <= best, "half of the labels cannot do better than all"


def test_a_whole_run(
    products: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("benchmarks.threshold.quiet_lightning", lambda: None)  # for good, and so for other tests
    caplog.set_level(logging.ERROR, "anomalib_resad")  # as the benchmark does it, but undone at the end
    for category in ("grain", "pill", "tiles"):
        (tmp_path / "sources").mkdir(exist_ok=True)
        shutil.copy(trained, tmp_path / "sources" / f"ResAD_without_{category}_12345678.ckpt")
    arguments: dict[str, Any] = {
        "target": product(products, "grain, pill, tiles"),
        "checkpoints": tmp_path / "sources",
        "output": tmp_path / "out",
        "shots": [2],
        "draws": 1,
        "rates": [0.1, 0.4],
        "val_ratio": 0.4,
    }
    main(**arguments)
    cells = (tmp_path / "out" / "cells.jsonl").read_text()
    results = pd.read_csv(tmp_path / "out" / "results.csv")
    assert len(results) == 3 * 5
    for _, rows in results.groupby("category"):
        figures = rows.set_index(["rule", "rate"])
        assert (figures.F1["best possible", 0.0] >= figures.F1).all()
        assert (figures.pixel_F1.dropna() <= figures.pixel_F1["best possible", 0.0] + 1e-6).all()
        assert figures.threshold["calibrated", 0.1] > figures.threshold["calibrated", 0.4]
        assert figures.good_shown["calibrated", 0.1] <= figures.good_shown["calibrated", 0.4]
    row = json.loads(cells.splitlines()[0])
    low, high = (product_threshold(row["leave_one_out"], 1.0, rate) for rate in (0.4, 0.1))
    spread = (row["rules"][1]["threshold"] - row["rules"][2]["threshold"]) / (high - low)
    assert 0 < spread < 1, "the scatter of the source categories, the same at both rates"
    main(**arguments)
    assert (tmp_path / "out" / "cells.jsonl").read_text() == cells, "nothing was measured twice"
    with pytest.raises(ValueError, match="cells of other rates"):
        main(**arguments | {"rates": [0.3]})
    (tmp_path / "sources" / "ResAD_without_pill_12345678.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold one ResAD_without_<category>_<digest>\.ckpt.*'pill': \[\]"):
        main(**arguments)


def test_share_of_photos_whose_map_shows_something() -> None:
    labels = torch.tensor([True, True, True, False, False])
    found = torch.tensor([True, True, False, True, False])
    above = torch.tensor([True, False, True, False, True])
    assert shown(above, found, labels) == {"shown": 0.5, "good_shown": 0.5}
    assert math.isnan(shown(above, ~labels, labels)["shown"]), "none was found"


def test_configs_name_what_there_is() -> None:
    for path in CONFIGS.glob("threshold_*.yaml"):
        config = yaml.safe_load(path.read_text())
        ready = "model" in config
        board = path.name.replace("threshold_", "" if ready else "shared_")
        leaderboard = yaml.safe_load((CONFIGS / board).read_text())
        if ready:
            assert config["model"] == {name: leaderboard[name] for name in ("backbone", "weights")} | {
                "checkpoint": "ready"
            }
        else:
            assert config["checkpoints"] == f"{leaderboard['output']}/sources"
        assert config["target"] == leaderboard["target"]


def test_each_row_of_the_ablation_is_another_model() -> None:
    methods = yaml.safe_load((CONFIGS / "ablation.yaml").read_text())["methods"]
    small = {"layers": ["layer1"], "backbone": "resnet18", "pre_trained": False}
    made = []
    for name, spec in methods.items():
        method = Method(**spec)
        assert bool(method.source_epochs) == (name != "its distance"), name
        settings = method.init_args | small
        if "coupling_layers" in settings and "coupling" not in name:
            settings["coupling_layers"] = 1
        made.append({key: str(value) for key, value in ResAD(**settings).hparams.items() if key != "variant"})
    assert all(made[index] not in made[:index] for index in range(len(made)))
