# SPDX-License-Identifier: Apache-2.0

"""Leaderboards as users run them: one that is killed goes on, the demo compares what belongs together."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from jsonargparse import auto_cli

from anomalib_resad import ProductFolder
from anomalib_resad.method.estimators import Distance
from benchmarks import demo
from benchmarks.cells import Cell, read_cells
from benchmarks.leaderboard import main

ROOT = Path(__file__).resolve().parents[1]
TIMES = ["latency_ms", "backbone_ms", "fit_seconds", "peak_bytes", "seconds"]
SMALL = "test_resnet.r160_in1k"  # timm's smallest ResNet
METHODS = {
    "ResAD": {"class_path": "anomalib_resad.ResAD", "source_epochs": 1},
    "distance": {"class_path": "anomalib_resad.ResAD", "init_args": {"estimator": "distance"}},
    "Patchcore": {"class_path": "anomalib.models.Patchcore"},
    "PaDiM": {"class_path": "anomalib.models.Padim", "init_args": {"n_features": 10}},
    "broken": {"class_path": "anomalib.models.Patchcore", "init_args": {"layers": ["no_such_layer"]}},
}
# Several runs in one process, since importing PyTorch and anomalib takes longer than a run. One that fails stops none.
SEVERAL = """
import gc, json, runpy, sys, traceback
import benchmarks.leaderboard
gc.freeze()  # each cell collects garbage before its memory is measured; among what was imported there is none
for arguments in json.loads(sys.argv.pop()):
    sys.argv[1:] = arguments
    try:
        runpy.run_module("benchmarks.leaderboard", run_name="__main__", alter_sys=True)
    except BaseException:
        traceback.print_exc()
"""


def start(runs: list[list[str]], folder: Path, log: Path) -> subprocess.Popen:
    """Start ``python -m benchmarks.leaderboard`` with each of the arguments, one after the other, in one process."""
    environment = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-c", SEVERAL, json.dumps(runs)],
            cwd=folder,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def arguments(products: Path, weights: Path, output: Path) -> list[str]:
    target = ["--target", "anomalib_resad.ProductFolder", "--target.root", str(products)]
    target += ["--target.category", "grain, pill, tiles", "--target.num_workers", "0"]
    model = ["--backbone", SMALL, "--weights", str(weights), "--image_size", "[64,64]"]
    cells = ["--shots", "[1,2]", "--draws", "1", "--gallery_shots", "2", "--conditions", '{"noise": [0.1]}']
    methods = ["--methods", json.dumps(METHODS), "--source_batch_size", "4", "--categories", "[pill, tiles]"]
    return [*target, *model, *cells, *methods, "--output", str(output)]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(timm.create_model(SMALL, pretrained=False).state_dict(), tmp_path / "small.pth")
    return tmp_path / "small.pth"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A leaderboard runs in this process: it must silence no other test, nor look for garbage in all that they hold.

    Nor must it fork image loaders: the trainings' loaders have no more workers than there are other CPUs.
    """
    for module in ("leaderboard", "demo"):
        monkeypatch.setattr(f"benchmarks.{module}.quiet_lightning", lambda: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("here")
def test_a_killed_run_goes_on_and_ends_with_the_same_table(
    products: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """One process does a whole run, and is killed in another; this process goes on with that."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs = [arguments(products, weights, folder) for folder in (whole, killed)]
    cells, log = killed / "cells.jsonl", tmp_path / "log.txt"
    victim = start(runs, ROOT, log)
    deadline = time.monotonic() + 400
    while len(read_cells(cells)) < 7 and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    before = cells.read_text().splitlines() if cells.is_file() else []
    assert 7 <= len(before) < 30, log.read_text()[-3000:]
    auto_cli(main, args=runs[1], as_positional=False)
    assert cells.read_text().splitlines()[: len(before) - 1] == before[:-1], "what was measured is kept"
    assert "no_such_layer" in capsys.readouterr().out
    tables = [pd.read_csv(folder / "results.csv").drop(columns=TIMES) for folder in (whole, killed)]
    keys = ["method", "category", "shots", "draw", "condition"]
    tables = [table.sort_values(keys, ignore_index=True) for table in tables]
    assert len(tables[0]) == 2 * 3 * 5
    pd.testing.assert_frame_equal(tables[0], tables[1])
    ok = tables[0][tables[0].status == "ok"]
    assert set(ok.method) == {"ResAD", "distance", "Patchcore", "PaDiM"}
    assert np.isfinite(ok[["image_AUROC", "pixel_AUROC", "AUPRO"]]).all(axis=None)
    assert ok.groupby(["category", "shots", "condition"]).references.nunique().eq(1).all()
    assert len(list((killed / "sources").glob("*.ckpt"))) == 2
    for name in ("leaderboard.html", "leaderboard.md", "summary.csv", "gallery.png"):
        assert (killed / name).stat().st_size > 500


@pytest.mark.usefixtures("here")
def test_the_demo_compares_what_one_training_made(
    products: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ResAD and its distance are matched by the same keys, those that the training learned."""
    models = {}

    def note(model: Any, data: Any, pyramid: Any, epochs: Any, cell: Cell) -> None:
        del data, pyramid, epochs
        models[cell.method] = model
        msg = "not measured"
        raise ValueError(msg)

    monkeypatch.setattr("benchmarks.leaderboard.measure", note)
    with pytest.raises(ValueError, match="not measured"):  # by the report, which finds no finished cell
        demo.compare(products, "tiles", ["grain"], SMALL, weights, True, 2, 1, 1, 0, tmp_path / "demo")
    trained, distance = (models[name].model for name in ("ResAD", "its distance"))
    assert isinstance(distance.estimator, Distance)
    assert distance.encoder.join.learned
    assert torch.equal(distance.encoder.join.directions, trained.encoder.join.directions)


def test_a_target_among_the_sources_is_refused(products: Path, weights: Path, tmp_path: Path) -> None:
    source = [ProductFolder(products, "grain, tiles")]
    with pytest.raises(ValueError, match="must never be trained on"):
        main(ProductFolder(products, "pill, tiles"), {}, tmp_path, source, backbone=SMALL, weights=weights)
