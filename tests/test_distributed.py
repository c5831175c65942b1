# SPDX-License-Identifier: Apache-2.0

"""Training in two processes, and training that goes on from a checkpoint, end where one uninterrupted process does."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.callbacks.checkpoint import ModelCheckpoint
from lightning.pytorch import seed_everything

from anomalib_resad import ResAD
from tests.conftest import TINY, cross_category, product, quiet_engine

ROOT = Path(__file__).resolve().parents[1]
State = dict[str, torch.Tensor]


def train(products: Path, output: Path, processes: int, batch: int, variant: str) -> list[State]:
    """Train in a subprocess that starts the others itself, as Lightning does; the state of each process."""
    output.mkdir()
    arguments = [str(products), str(output), str(processes), str(batch), variant]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "train_distributed.py"), *arguments],
        cwd=output, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return [torch.load(output / f"rank{rank}.pt") for rank in range(processes)]


@pytest.mark.parametrize("variant", ["fused", "resad", "resad++"])
def test_two_processes_agree_with_each_other_and_with_one(products: Path, tmp_path: Path, variant: str) -> None:
    first, second = train(products, tmp_path / "two", 2, 3, variant)
    (alone,) = train(products, tmp_path / "one", 1, 6, variant)
    assert first.keys() == second.keys() == alone.keys()
    different = [
        name for name, value in first.items() if not torch.equal(value.nan_to_num(), second[name].nan_to_num())
    ]
    assert not different, "weights, statistics, ceilings, boundaries, codes, bank and thresholds are those of all"
    learned = [name for name in alone if name.startswith(("model.constraintors", "model.flows", "model.codebooks", "model.head"))]
    assert learned
    for name in ("model.anomaly_map.ceilings", "model.boundaries"):
        if name in alone:
            torch.testing.assert_close(first[name], alone[name], rtol=0.05, atol=0.02, msg=name)
    for name in ("_image_threshold", "image_max", "product_threshold", "spread"):
        key = f"post_processor.{name}"
        torch.testing.assert_close(first[key], alone[key], rtol=0.05, atol=0.05, msg=name)


# -- going on ---------------------------------------------------------------------------------------------------------


def state(model: ResAD) -> State:
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("kind", ["fused", "resad++", "synthetic defects"])
def test_a_training_that_goes_on_ends_where_an_uninterrupted_one_does(
    products: Path, tmp_path: Path, kind: str
) -> None:
    """Bit for bit, whatever the generators hold when it goes on."""
    plus = {"resad++": {"variant": "resad++", "codebook_size": 32}, "fused": {"variant": "fused"}}.get(kind, {})

    def make() -> tuple[ResAD, object]:
        data = cross_category(products) if plus else product(products, "tiles", val_split_mode="synthetic")
        return ResAD(**TINY | plus, visualizer=False), data

    seed_everything(5, verbose=False)
    model, data = make()
    keep = ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1, every_n_epochs=1)
    quiet_engine(tmp_path, max_epochs=2, callbacks=[keep]).fit(model, datamodule=data)
    checkpoints = sorted((tmp_path / "kept").glob("*.ckpt"))
    assert len(checkpoints) == 2
    expected, halfway = state(model), torch.load(checkpoints[0], weights_only=False)["state_dict"]
    seed_everything(99, verbose=False)
    resumed, data = make()
    quiet_engine(tmp_path / "again", max_epochs=2).fit(resumed, datamodule=data, ckpt_path=checkpoints[0])
    ended = state(resumed)
    assert ended.keys() == expected.keys()
    assert not [
        name for name, value in ended.items() if not torch.equal(value.nan_to_num(), expected[name].nan_to_num())
    ]
    trained = [name for name in ended if name.startswith(("model.flows", "model.head")) and name.endswith(".weight")]
    assert trained
    assert not any(torch.equal(ended[name], halfway[name]) for name in trained), "the second epoch did train"


def test_epochs_differ_and_trainings_of_other_seeds_too(products: Path, tmp_path: Path) -> None:
    """The seeds are derived from the training's: it decides, and no epoch repeats another."""
    drawn = {}
    for seed in (1, 2):
        seed_everything(seed, verbose=False)
        model = ResAD(**TINY, visualizer=False)
        original = model.training_step
        drawn[seed] = []

        def step(batch, *args, seed=seed, original=original):
            drawn[seed].append((random.random(), np.random.rand(), torch.rand(()).item(), tuple(batch.image_path)))  # noqa: NPY002, S311
            return original(batch, *args)

        model.training_step = step
        engine = quiet_engine(tmp_path, max_epochs=2, limit_train_batches=1, limit_val_batches=0)
        engine.fit(model, datamodule=cross_category(products))
    values = [value for draws in drawn.values() for value in draws]
    assert len(values) == 4
    assert all(len({value[index] for value in values}) == 4 for index in range(3))
    assert len({value[3] for value in values}) > 1
