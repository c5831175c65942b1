# SPDX-License-Identifier: Apache-2.0

"""Heads that come with the package: built again the same, and used only where they belong."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch import seed_everything
from safetensors.torch import load_file

from anomalib_resad import ResAD, cli, ready_heads
from anomalib_resad.deploy.bundle import MANIFEST, read_manifest
from anomalib_resad.ready_heads import head_file, read_card
from benchmarks.ready_heads import main
from benchmarks.sources.__main__ import main as draw_sources
from tests.conftest import cross_category, quiet_engine
from tests.test_commands import printed
from tests.test_edge_commands import resad

SMALL: dict[str, Any] = {"backbone": "resnet18", "epochs": 1, "batch_size": 8, "image_size": (64, 64)}


@pytest.fixture(scope="session")
def sources(share: Callable[..., Path]) -> Path:
    def draw(folder: Path) -> None:
        draw_sources(folder / "products", products=2, train=18, good=2, defective=3, size=64)

    return share("head_sources", draw) / "products"


def write_weights(folder: Path) -> None:
    """Two sets of random weights of a ResNet-18, and the first one with its first batch norm folded."""
    for seed, name in enumerate(("own", "other")):
        torch.manual_seed(seed)
        state = timm.create_model("resnet18", pretrained=False).state_dict()
        state |= {key: torch.rand_like(value) + 0.5 for key, value in state.items() if key.startswith("bn1.running")}
        # No patch without any feature, which a bank refuses and random weights have.
        state |= {key: value + 0.1 for key, value in state.items() if ".bn" in key and key.endswith("bias")}
        torch.save(state, folder / f"{name}.pth")
    state = torch.load(folder / "own.pth")
    scale = (state["bn1.running_var"] + 1e-5).rsqrt() * state["bn1.weight"]
    state["conv1.weight"] *= scale[:, None, None, None]
    state["bn1.bias"] -= state["bn1.running_mean"] * scale
    for name, value in (("weight", 1.0), ("running_mean", 0.0), ("running_var", 1 - 1e-5)):
        state[f"bn1.{name}"].fill_(value)
    torch.save(state, folder / "folded.pth")


@pytest.fixture(scope="session")
def weights(share: Callable[..., Path]) -> Path:
    return share("head_weights", write_weights)


@pytest.fixture(scope="session")
def heads(share: Callable[..., Path], sources: Path, weights: Path) -> Path:
    """A folder with a head of a random ResNet-18."""
    return share("heads", lambda folder: main(output=folder, sources=sources, weights=weights / "own.pth", **SMALL))


@pytest.fixture
def model(heads: Path, weights: Path, good: list[Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., ResAD]:
    """Makes models that find these heads in the package."""
    monkeypatch.setattr(ready_heads, "HEADS", heads)

    def make(file: str = "own", **given: Any) -> ResAD:
        settings = {"references": good[0].parent, "image_size": (64, 64), "rotations": 1, "visualizer": False}
        return ResAD("resnet18", weights=weights / f"{file}.pth", **settings | given)

    return make


def predicted(model: ResAD, photos: list[Path], folder: Path) -> torch.Tensor:
    found: Any = quiet_engine(folder).predict(model, data_path=photos[0].parent, return_predictions=True)
    return torch.cat([batch.pred_score for batch in found])


def test_the_command_makes_the_same_file_again(heads: Path, weights: Path, sources: Path, tmp_path: Path) -> None:
    main(output=tmp_path, sources=sources, weights=weights / "own.pth", **SMALL)
    first, second = head_file("resnet18", heads), head_file("resnet18.tv_in1k", tmp_path)
    assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["resnet18.safetensors"], "nothing else is left"
    assert first.stat().st_size < 500_000
    main(output=tmp_path, sources=sources, weights=weights / "own.pth", **SMALL | {"seed": 1})
    assert first.read_bytes() != second.read_bytes()
    card = read_card(first)
    assert card["settings"]["layers"] == ["layer1", "layer2", "layer3"]
    assert card["weights"].startswith("own.pth, SHA-256 ")
    assert (card["training"]["epochs"], card["training"]["seed"], card["training"]["products"]) == (1, 0, 2)
    assert card["sources"]["products"] == ["grain_0000", "weave_0001"]
    assert "Apache-2.0" in card["sources"]["license"]
    assert card["sources"]["photos"] == 46


@pytest.mark.parametrize("path", sorted(ready_heads.HEADS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_heads_of_the_package_are_small_and_say_what_they_are(path: Path) -> None:
    card = read_card(path)
    assert path.stat().st_size < 1_000_000
    assert card["settings"]["backbone"].partition(".")[0] == path.stem
    assert {"settings", "weights", "training", "command", "sources", "versions"} == card.keys()


@pytest.mark.parametrize("file", ["own", "folded"])
def test_an_untrained_model_predicts_with_the_ready_head(
    model: Callable[..., ResAD], heads: Path, new: list[Path], tmp_path: Path, file: str
) -> None:
    untrained = model(file)
    with printed() as said:
        scores = predicted(untrained, new, tmp_path)
    assert "Ready head of resnet18: trained on 2 products (drawn by benchmarks/sources" in said.getvalue()
    assert "target false-alarm rate of 0.05" in said.getvalue(), "not the one of drawn products"
    head = load_file(head_file("resnet18", heads))
    assert torch.equal(untrained.model.estimator.power, head["model.estimator.power"])
    assert torch.equal(untrained.model.encoder.join.directions, head["model.encoder.join.directions"])
    assert untrained.post_processor.source_thresholds[0] == head["post_processor._image_threshold"]
    assert untrained.post_processor.image_threshold != head["post_processor._image_threshold"]
    for_good = model(file, checkpoint="ready")
    assert not for_good.is_trainable
    assert torch.equal(predicted(for_good, new, tmp_path), scores)
    assert for_good.hparams["checkpoint"] is None, "it is saved like any other model"


def test_the_plain_distance_takes_the_keys_of_a_head(model: Callable[..., ResAD], heads: Path) -> None:
    distance = model("own", checkpoint="ready", estimator="distance")
    head = load_file(head_file("resnet18", heads))
    assert torch.equal(distance.model.encoder.join.directions, head["model.encoder.join.directions"])
    assert not distance.post_processor.has_statistics, "the head's threshold is for other scores"
    assert not model("other", checkpoint="ready", estimator="distance").model.encoder.join.learned


@pytest.mark.parametrize("file", ["own", "other"])  # the prediction takes the head, or the distance in its place
def test_a_training_starts_fresh(
    model: Callable[..., ResAD], products: Path, new: list[Path], tmp_path: Path, file: str
) -> None:
    """What a prediction took leaves no trace in a training of the same model."""
    trained: list[dict[str, Any]] = []
    for predicts in (False, True):
        seed_everything(0)
        each = model(file)
        if predicts:
            predicted(each, new, tmp_path)
            assert each.untrained is not None
        seed_everything(0)
        quiet_engine(tmp_path, max_epochs=1).fit(each, datamodule=cross_category(products, target=None))
        assert (each.untrained, each.hparams["estimator"]) == (None, "head")
        trained.append({name: value for name, value in each.state_dict().items() if torch.is_tensor(value)})
    plain, after = trained
    assert [
        name for name, value in plain.items() if not torch.equal(value.nan_to_num(), after[name].nan_to_num())
    ] == []
    scores = predicted(each, new, tmp_path)
    assert torch.equal(each.state_dict()["model.estimator.power"], plain["model.estimator.power"]), "and it stays"
    assert scores.isfinite().all()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"file": "other"}, r"is for its weights own\.pth, SHA-256 \w+, not for these \(other\.pth, SHA-256 \w+\)"),
        ({"layers": ["layer2"]}, r"is for layers=\['layer1', 'layer2', 'layer3'\]\. Train one"),
        ({"projection": 32}, r"is for projection=64\. Train one"),
    ],
)
def test_a_head_that_does_not_fit_is_not_used(
    model: Callable[..., ResAD], new: list[Path], tmp_path: Path, given: dict[str, Any], why: str
) -> None:
    """The distance stands in, with a threshold from the references, and says why."""
    other = model(**given, lr=1e-3)
    with printed() as said:
        scores = predicted(other, new, tmp_path)
    assert re.search(rf"The ready head of resnet18 {why}", said.getvalue())
    assert "The plain distance to the good photos is used" in said.getvalue()
    assert "at a target false-alarm rate of 0.05" in said.getvalue()
    assert scores.isfinite().all()
    distance = model(**given, estimator="distance")
    assert torch.equal(predicted(distance, new, tmp_path), scores)


def test_a_backbone_without_a_head_is_no_error(good: list[Path], new: list[Path], tmp_path: Path) -> None:
    one = ResAD("mobilenetv3_small_050", pre_trained=False, image_size=(64, 64), references=good[0], visualizer=False)
    with printed() as said:
        assert predicted(one, new, tmp_path).isfinite().all()
    assert "There is no ready head for backbone 'mobilenetv3_small_050' (there are: " in said.getvalue()
    assert "No threshold was learned" in said.getvalue(), "of one photo there is none"


def test_what_was_restored_stays(
    model: Callable[..., ResAD], trained_default: Path, heads: Path, new: list[Path], tmp_path: Path
) -> None:
    with printed() as said:
        run = quiet_engine(tmp_path)
        run.predict(model(), data_path=new[0].parent, ckpt_path=trained_default)
        restored = ResAD.load_from_checkpoint(trained_default)
        quiet_engine(tmp_path).predict(restored, data_path=new[0].parent)
    assert heads.is_dir()
    assert "eady head" not in said.getvalue()
    assert "plain distance" not in said.getvalue()


# -- commands without a checkpoint ------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """Run `resad` in this process, which finds the heads of these tests."""
    monkeypatch.setattr(sys, "argv", ["resad", *map(str, words)])
    cli.main()


def test_export_of_a_backbone_alone(
    model: Callable[..., ResAD], heads: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model
    words = ("export", "--backbone", "resnet18", "--weights")
    command(monkeypatch, *words, weights / "own.pth", "--output", tmp_path / "ready")
    manifest = read_manifest(tmp_path / "ready")
    assert manifest.score.threshold == float(load_file(head_file("resnet18", heads))["post_processor._image_threshold"])
    assert manifest.weights.startswith("own.pth")
    size = ("--image_size", "auto:320")
    command(monkeypatch, *words, weights / "other.pth", *size, "--output", tmp_path / "distance")
    manifest = read_manifest(tmp_path / "distance")
    assert (manifest.score.threshold, manifest.area_side, manifest.stride) == (None, 320, 16)
    for given in (
        [],
        ["--weights", "pypi"],
        size,
        [*size, "--checkpoint", "model.ckpt"],
        [*words[1:], "pypi", "--checkpoint", "model.ckpt"],
    ):
        with pytest.raises(SystemExit, match="2"):
            command(monkeypatch, "export", "--output", tmp_path / "none", *given)


def test_inspect_needs_torch_once(
    model: Callable[..., ResAD],
    weights: Path,
    good: list[Path],
    new: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert model
    words = ["inspect", "--good", good[0].parent, "--photos", new[0].parent, "--cache", tmp_path / "cache"]
    words += ["--backbone", "resnet18", "--weights", weights / "own.pth", "--output"]
    command(monkeypatch, *words, tmp_path / "first")
    said = resad(*words, tmp_path / "second")  # where PyTorch cannot be imported
    assert "photos inspected" in said
    tables = [(tmp_path / name / "results.csv").read_text() for name in ("first", "second")]
    assert tables[0] == tables[1]
    assert len(tables[0].splitlines()) == 1 + len(list(new[0].parent.iterdir()))
    (kept,) = (tmp_path / "cache").iterdir()
    (kept / MANIFEST).write_text("{")
    command(monkeypatch, *words, tmp_path / "third")
    assert (tmp_path / "third" / "results.csv").read_text() == tables[0], "what was damaged is made again"
    assert list((tmp_path / "cache").iterdir()) == [kept]
    command(monkeypatch, *words[:-3], "--weights", weights / "other.pth", "--output", tmp_path / "fourth")
    assert len(list((tmp_path / "cache").iterdir())) == 2, "other weights, another model"
