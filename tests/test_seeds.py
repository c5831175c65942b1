# SPDX-License-Identifier: Apache-2.0

"""`--seed_everything` of anomalib's command line: equal commands give equal weights."""

from pathlib import Path

import pytest
import torch
import yaml

from tests.test_commands import run, run_alone


def settings(products: Path, output: Path) -> str:
    """A small training whose checkpoints of both epochs are kept."""
    source = {"class_path": "anomalib_resad.ProductFolder", "init_args": {"root": str(products), "category": "grain"}}
    keep = {"dirpath": str(output), "filename": "{epoch}", "save_top_k": -1}
    content = {
        "model": {
            "class_path": "ResAD",
            "init_args": {"backbone": "resnet18", "pre_trained": False, "k_shot": 2, "image_size": [64, 64]},
        },
        "data": {
            "class_path": "anomalib_resad.CrossCategory",
            "init_args": {"source": source, "train_batch_size": 4, "num_workers": 0},
        },
        "trainer": {
            "max_epochs": 2,
            "callbacks": [{"class_path": "anomalib.callbacks.ModelCheckpoint", "init_args": keep}],
        },
    }
    output.mkdir()
    (output / "config.yaml").write_text(yaml.safe_dump(content))
    return f"anomalib fit --config {output / 'config.yaml'}"


def weights(output: Path, epoch: int = 1) -> dict[str, torch.Tensor]:
    state = torch.load(output / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert list(first) == list(second)
    return all(torch.equal(value.nan_to_num(), second[name].nan_to_num()) for name, value in first.items())


@pytest.fixture(scope="module")
def trained_with_7(products: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("seeds") / "7"
    run_alone(settings(products, output), output.parent, "--seed_everything", "7")
    return output


def test_equal_seeds_give_equal_weights_and_others_do_not(trained_with_7: Path, products: Path, tmp_path: Path) -> None:
    """Also in another process, with other draws before."""
    run(settings(products, tmp_path / "again"), tmp_path, "--seed_everything", "7")
    assert equal(weights(tmp_path / "again"), weights(trained_with_7))
    run(settings(products, tmp_path / "8"), tmp_path, "--seed_everything", "8")
    assert not equal(weights(tmp_path / "8"), weights(trained_with_7))
    for index in range(2):  # a random seed, as anomalib says
        run(settings(products, tmp_path / f"random{index}"), tmp_path)
    assert not equal(weights(tmp_path / "random0"), weights(tmp_path / "random1"))


@pytest.mark.parametrize("seed", [[], ["--seed_everything", "9"]])
def test_a_resumed_training_goes_on_with_its_own_seed(
    trained_with_7: Path, products: Path, tmp_path: Path, seed: list[str]
) -> None:
    halfway = ["--ckpt_path", str(trained_with_7 / "epoch=0.ckpt")]
    run(settings(products, tmp_path / "resumed"), tmp_path, *halfway, *seed)
    assert equal(weights(tmp_path / "resumed"), weights(trained_with_7))
    assert not equal(weights(trained_with_7, 0), weights(trained_with_7))
