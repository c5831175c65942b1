# SPDX-License-Identifier: Apache-2.0

"""Training in two processes, and training that goes on from a checkpoint, end where one uninterrupted process does."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.callbacks.checkpoint import ModelCheckpoint
from lightning.pytorch import seed_everything
from torch import multiprocessing

from anomalib_resad import ResAD
from anomalib_resad.method.residual_flow import ResidualFlow
from tests import train_distributed
from tests.conftest import DEFAULT, PLUS, TINY, cross_category, product, quiet_engine
from tests.train_distributed import PARTS, share

ROOT = Path(__file__).resolve().parents[1]
State = dict[str, torch.Tensor]


def train_in_two(products: Path, output: Path, kind: str = "resad++") -> list[State]:
    """Train in a subprocess that starts the other one itself, as Lightning does; the state of each process."""
    output.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, train_distributed.__file__, str(products), str(output), "2", "3", kind]
    result = subprocess.run(
        command, cwd=output, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return [torch.load(output / f"rank{rank}.pt") for rank in range(2)]


def train_alone(products: Path, output: Path, order: int) -> State:
    output.mkdir()
    train_distributed.main(products, output, 1, 6, order=order)
    return torch.load(output / "rank0.pt")


def joined(state: State, name: str) -> torch.Tensor:
    """What was learned under a name, as one vector."""
    found = [value.flatten().double() for key, value in state.items() if key.startswith(name)]
    return torch.cat(found)


def test_two_processes_agree_with_each_other_and_with_one(products: Path, tmp_path: Path) -> None:
    """With each other exactly; with one process as far as that agrees with itself on images in another order."""
    first, second = train_in_two(products, tmp_path / "two")
    alone = [train_alone(products, tmp_path / f"one{order}", order) for order in range(3)]
    assert first.keys() == second.keys() == alone[0].keys()
    different = [
        name for name, value in first.items() if not torch.equal(value.nan_to_num(), second[name].nan_to_num())
    ]
    assert not different, "weights, statistics, ceilings, boundaries, codes, bank and thresholds are those of all"
    names = ["model.estimator.constraintors", "model.estimator.flows", "model.estimator.ceilings"]
    names += ["post_processor._image_threshold", "post_processor.product_threshold", "post_processor.image_max"]
    names += ["model.estimator.boundaries"]
    for name in names:
        ours, theirs = joined(first, name), [joined(state, name) for state in alone]
        noise = max((one - other).norm() for one, other in combinations(theirs, 2))
        assert noise > 0
        assert min((ours - one).norm() for one in theirs) < 5 * noise, name


def test_two_processes_of_the_default_model_agree(products: Path, tmp_path: Path) -> None:
    """On keys, head, statistics, bank and thresholds; the frozen backbone stays what it was."""
    first, second = train_in_two(products, tmp_path / "two", "fused")
    assert first.keys() == second.keys()
    different = [
        name for name, value in first.items() if not torch.equal(value.nan_to_num(), second[name].nan_to_num())
    ]
    assert not different
    assert first["model.encoder.join.learned"]
    assert first["model.estimator.batches"] == 6, "two epochs of three batches, which both processes count alike"
    assert first["model.bank.rows_0"].shape[0] > 0


def test_frozen_statistics_are_not_averaged(monkeypatch: pytest.MonkeyPatch, products: Path, tmp_path: Path) -> None:
    """Those of the backbone are the same in every process; averaging them would be work at every step."""
    averaged: list[torch.nn.Module] = []
    monkeypatch.setattr("anomalib_resad.lightning_model.average_batch_norms", averaged.extend)
    model = ResAD(**TINY, visualizer=False)
    engine = quiet_engine(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    engine.fit(model, datamodule=cross_category(products))
    kinds = (torch.nn.BatchNorm2d, torch.nn.BatchNorm1d)
    norms = [module for module in averaged if isinstance(module, kinds)]
    backbone = {id(module) for module in model.model.encoder.modules()}
    assert len(norms) == 3, "those of the three constraintors"
    assert not backbone & {id(module) for module in averaged}


@pytest.fixture(scope="module")
def parted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """What two real processes make of the halves of :data:`PARTS`."""
    folder = tmp_path_factory.mktemp("parted")
    multiprocessing.start_processes(share, args=(folder,), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_processes_share_what_the_whole_batch_gives(parted: list[dict[str, torch.Tensor]]) -> None:
    first, second = parted
    assert all(torch.equal(value.nan_to_num(), second[name].nan_to_num()) for name, value in first.items())
    whole = ResidualFlow([4], coupling_layers=1, position_channels=0)
    whole.update_ceiling(0, PARTS.flatten(), torch.zeros(8))
    assert first["ceilings"] == whole.ceilings == PARTS.max(), "the highest of both processes"
    assert first["known"] == PARTS[1].mean(), "the other process knew none"
    assert torch.isnan(first["unknown"])
    assert first["batch norm"] == pytest.approx(PARTS.mean().item())
    assert set(first["codes"].flatten().tolist()) <= set(PARTS[0].tolist()), "the first process's residuals"


# -- going on ---------------------------------------------------------------------------------------------------------


def state(model: ResAD) -> State:
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """With several, sums over threads are not always rounded alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("kind", ["resad++", "synthetic defects", "fused"])
def test_a_training_that_goes_on_ends_where_an_uninterrupted_one_does(
    products: Path, tmp_path: Path, kind: str
) -> None:
    """Whatever the generators hold when it goes on."""
    settings = {"resad++": PLUS | {"codebook_size": 32}, "fused": DEFAULT, "synthetic defects": TINY}[kind]

    def make() -> tuple[ResAD, object]:
        synthetic = kind == "synthetic defects"
        data = product(products, "tiles", val_split_mode="synthetic") if synthetic else cross_category(products)
        return ResAD(**settings, visualizer=False), data

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
    floats = [name for name in ended if name.startswith("model.") and ended[name].is_floating_point()]
    for name in floats:
        torch.testing.assert_close(ended[name], expected[name], rtol=0, atol=1e-6, equal_nan=True, msg=name)
    trained = [
        name
        for name in ended
        if name.startswith(("model.estimator.flows", "model.estimator.classifier")) and name.endswith(".weight")
    ]
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
            drawn[seed].append(
                (random.random(), np.random.rand(), torch.rand(()).item(), tuple(each.path for each in batch.photos))  # noqa: NPY002, S311
            )
            return original(batch, *args)

        model.training_step = step
        engine = quiet_engine(tmp_path, max_epochs=2, limit_train_batches=1, limit_val_batches=0)
        engine.fit(model, datamodule=cross_category(products))
    values = [value for draws in drawn.values() for value in draws]
    assert len(values) == 4
    assert all(len({value[index] for value in values}) == 4 for index in range(3))
    for draws in drawn.values():
        assert draws[0][3] != draws[1][3], "the order of the images changes with the epoch"
