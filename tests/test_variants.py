# SPDX-License-Identifier: Apache-2.0

"""The two published methods and their ablations: settings, training, restoring, export."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import openvino
import pytest
import torch
from anomalib.data import InferenceBatch
from lightning.pytorch import seed_everything
from torch import Tensor

from anomalib_resad import ResAD, ResADModel
from anomalib_resad.method.constraintor import ConstraintorKind
from anomalib_resad.method.loss import OneClass, PushPull
from anomalib_resad.method.presets import TRAINING, VARIANTS, resolve
from anomalib_resad.method.reference_bank import Metric
from anomalib_resad.torch_model import Residual
from tests.conftest import TINY, cross_category, quiet_engine

PLUS = TINY | {"variant": "resad++", "codebook_size": 64}
OPTIONS = {
    "match": get_args(Metric),
    "residual": get_args(Residual),
    "constraintor": get_args(ConstraintorKind),
    "occ": get_args(OneClass),
    "push_pull": get_args(PushPull),
}


def small(**settings: Any) -> ResADModel:
    plus = {key: value for key, value in VARIANTS["resad++"].items() if key not in TRAINING}
    size = {"layers": ("layer1", "layer2"), "pre_trained": False}
    small_parts = {"coupling_layers": 1, "position_channels": 0, "codebook_size": 32}
    return ResADModel("resnet18", **size, **plus | small_parts | settings)


# -- settings ---------------------------------------------------------------------------------------------------------


def test_presets_are_the_published_settings() -> None:
    for variant, settings in VARIANTS.items():
        model = ResAD(backbone="resnet18", pre_trained=False, variant=variant)
        assert {key: model.hparams[key] for key in settings} == settings
    assert ResAD(backbone="resnet18", pre_trained=False).hparams["variant"] == "fused"
    assert resolve("resad++", {}) == VARIANTS["resad++"]
    assert VARIANTS["fused"].keys() == VARIANTS["resad"].keys() == VARIANTS["resad++"].keys()


def test_every_setting_can_be_changed_alone() -> None:
    """Also to values that are false, which are not "not given"."""
    for key, value in (("efdm", 0.0), ("codebook_size", 0), ("abnormal_gaussian", False), ("match", "l2")):
        assert resolve("resad++", {key: value}) == VARIANTS["resad++"] | {key: value}
    model = ResAD(**PLUS | {"efdm": 0.0}, match="l2")
    assert model.hparams["efdm"] == 0.0
    assert model.hparams["residual"] == "squared"
    assert not model.model.codebooks, "without matching there is nothing that a codebook does"
    assert model.model.bank.metric == "l2"


@pytest.mark.parametrize(("argument", "known"), [("variant", tuple(VARIANTS)), *OPTIONS.items()])
def test_unknown_values_are_refused_with_the_known_ones(argument: str, known: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"{argument}='x'") as error:
        ResAD(**TINY | {argument: "x"})
    assert all(f"'{value}'" in str(error.value) for value in known)


def test_impossible_shares_are_refused() -> None:
    for settings in ({"efdm": 1.5}, {"codebook_size": -1}):
        with pytest.raises(ValueError, match=r"efdm=.*share.*codebook_size="):
            small(**settings)


# -- ablations --------------------------------------------------------------------------------------------------------

ABLATIONS = [
    *({argument: value} for argument, values in OPTIONS.items() for value in values),
    {"codebook_size": 0},
    {"abnormal_gaussian": False},
    {"abnormal_gaussian": False, "push_pull": "hinge"},
    {"position_channels": 8},
]


@pytest.mark.parametrize("settings", ABLATIONS, ids=str)
def test_each_option_trains_a_step_and_scores(settings: dict[str, Any], images: Tensor) -> None:
    """Everything that has a loss gets a gradient, on every level; a level's name is printed if one does not."""
    torch.manual_seed(0)
    model = small(**settings).train()
    features = model.backbone(images)
    model.bank.fill([level[:1] for level in features])
    matched = model.bank(features)
    masks = [torch.zeros(3, *level.shape[-2:]) for level in features]
    for mask in masks:
        mask[1, :2, :2] = 1
    loss, constrained = model.constrain_loss(features, matched, masks)
    if loss.requires_grad:
        loss.backward()
    for flow_loss in model.flow_losses(constrained, masks, batch_size=512, steps=1):
        flow_loss.backward()
        assert torch.isfinite(flow_loss)
    untrained = ("constraintors", "fusion") if settings.get("occ") == "none" else ()
    wanted = [name for name, value in model.named_parameters() if value.requires_grad]
    parameters = dict(model.named_parameters())
    without = [name for name in wanted if parameters[name].grad is None and not name.startswith(untrained)]
    assert not without
    broken = [name for name in wanted if (grad := parameters[name].grad) is not None and not torch.isfinite(grad).all()]
    assert not broken
    with torch.no_grad():
        result = model.eval()(images)
    assert torch.isfinite(result.anomaly_map).all()
    if model.abnormal_gaussian:
        assert 0 <= result.anomaly_map.min() <= result.anomaly_map.max() <= 1


def test_orthogonality_counts_for_the_mlp_alone(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(
        "anomalib_resad.torch_model.orthogonality", lambda rows: (counted.append(len(rows)), rows.sum())[1]
    )
    for kind, expected in (("conv_bn_relu", 0), ("mlp", 2)):
        model = small(constraintor=kind)
        features = model.backbone(images)
        masks = [torch.zeros(3, *level.shape[-2:]) for level in features]
        model.constrain_loss(features, [0.9 * level for level in features], masks)
        assert len(counted) == expected


def test_warm_up_is_about_normal_patches_alone(images: Tensor) -> None:
    model = small(constraintor="none", occ="none")
    features = model.backbone(images)
    masks = [torch.ones(3, *level.shape[-2:]) for level in features]
    (loss,) = model.flow_losses(features, masks, 512, 1, warming_up=True)
    assert loss == 0
    (loss,) = model.flow_losses(features, masks, 512, 1, warming_up=False)
    assert loss > 0
    assert torch.isnan(model.boundaries).all(), "there is no boundary without normal patches"


# -- training, restoring, export --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def warm_ups() -> list[bool]:
    return []


@pytest.fixture(scope="module")
def started(products: Path, tmp_path_factory: pytest.TempPathFactory, warm_ups: list[bool]) -> tuple[ResAD, dict, Path]:
    """A tiny ResAD++ trained for one epoch, its first state, and its checkpoint."""
    seed_everything(0)
    model = ResAD(**PLUS, visualizer=False)
    before = {name: value.detach().clone() for name, value in model.model.named_parameters()}
    original = model._is_warming_up
    model._is_warming_up = lambda: (warm_ups.append(original()), warm_ups[-1])[1]  # type: ignore[method-assign]
    engine = quiet_engine(tmp_path_factory.mktemp("plus"), max_epochs=1)
    engine.fit(model, datamodule=cross_category(products))
    return model, before, Path(engine.best_model_path)


@pytest.fixture(scope="module")
def plus(started: tuple[ResAD, dict, Path]) -> ResAD:
    return ResAD.load_from_checkpoint(started[2]).eval()


@pytest.fixture
def photos() -> Tensor:
    """Noise has no two equal residuals; the tie of drawn, flat backgrounds is in test_codebook."""
    return torch.rand(4, 3, 90, 70, generator=torch.Generator().manual_seed(1))


def evaluate(model: ResAD, photos: Tensor) -> InferenceBatch:
    with torch.no_grad():
        return model.post_processor(model.model(model.pre_processor.transform(photos)))


def test_training_reaches_every_part(started: tuple[ResAD, dict, Path], warm_ups: list[bool]) -> None:
    model, before, _ = started
    trainable = {name: value for name, value in model.model.named_parameters() if value.requires_grad}
    assert not {name for name, value in trainable.items() if torch.equal(before[name], value)}
    assert {name.split(".")[0] for name in trainable} == {"codebooks", "constraintors", "flows"}
    assert torch.isfinite(model.model.boundaries).all()
    assert torch.isfinite(model.model.anomaly_map.ceilings).all()
    assert warm_ups[0], "a tenth of one epoch still is its first batch"
    assert not any(warm_ups[1:])
    assert len(warm_ups) > 1


def test_checkpoint_rebuilds_the_model(started: tuple[ResAD, dict, Path], plus: ResAD, photos: Tensor) -> None:
    content = torch.load(started[2], weights_only=True)
    changed = {"codebook_size": 64, "coupling_layers": 2, "position_channels": 8, "lr": TINY["lr"]}
    expected = VARIANTS["resad++"] | changed
    assert {key: content["hyper_parameters"][key] for key in expected} == expected
    expected = evaluate(plus, photos)
    for other in (ResAD(checkpoint=started[2]), ResAD(checkpoint=started[2], occ="none", match="l2")):
        assert other.hparams["variant"] == "resad++"
        assert torch.equal(evaluate(other.eval(), photos).anomaly_map, expected.anomaly_map)


@pytest.mark.parametrize("variant", ["resad", "resad++"])
def test_checkpoints_from_before_the_variants(trained: Path, variant: str, tmp_path: Path, photos: Tensor) -> None:
    """They lack the settings that came with the variants, and are the first, whatever the constructor was given."""
    content = torch.load(trained, weights_only=True)
    for key in ("variant", "constraintor", "occ", "codebook_size", "efdm", "abnormal_gaussian", "push_pull", "warmup"):
        del content["hyper_parameters"][key]
    torch.save(content, tmp_path / "earlier.ckpt")
    expected = evaluate(ResAD.load_from_checkpoint(trained).eval(), photos).anomaly_map
    model = ResAD(checkpoint=tmp_path / "earlier.ckpt", variant=variant).eval()
    assert model.hparams["variant"] == "resad"
    assert torch.equal(evaluate(model, photos).anomaly_map, expected)
    other = ResAD(**TINY | {"variant": variant})
    other.on_load_checkpoint(content)
    other.load_state_dict(content["state_dict"])
    assert torch.equal(evaluate(other.eval(), photos).anomaly_map, expected)
    assert torch.equal(
        evaluate(ResAD.load_from_checkpoint(tmp_path / "earlier.ckpt").eval(), photos).anomaly_map, expected
    )


def test_batch_composition_changes_nothing(plus: ResAD, photos: Tensor) -> None:
    """Exactly, from the features on: a backbone rounds differently with the batch size, and a code may be as near."""
    together = evaluate(plus, photos)
    with torch.no_grad():
        features = plus.model.backbone(plus.pre_processor.transform(photos))
        matched = plus.model.bank(features)
        whole = plus.model.score(features, matched, (64, 64))
        for index in range(4):
            one = [[level[index : index + 1] for level in levels] for levels in (features, matched)]
            alone = plus.model.score(one[0], one[1], (64, 64))
            torch.testing.assert_close(alone.anomaly_map[0], whole.anomaly_map[index], rtol=0, atol=1e-6)
            torch.testing.assert_close(alone.pred_score[0], whole.pred_score[index], rtol=0, atol=1e-6)
    alone = evaluate(plus, photos[2:3])
    torch.testing.assert_close(alone.pred_score, together.pred_score[2:3], rtol=0, atol=1e-4)
    torch.testing.assert_close(alone.anomaly_map, together.anomaly_map[2:3], rtol=0, atol=1e-3)


def test_order_and_copies_of_references_change_nothing(started: tuple[ResAD, dict, Path], photos: Tensor) -> None:
    model = ResAD.load_from_checkpoint(started[2]).eval()
    expected = evaluate(model, photos).anomaly_map
    rows = model.model.bank.levels
    for changed in ([level.flip(0) for level in rows], [torch.cat([level, level[:50]]) for level in rows]):
        model.model.bank.fill([level.T[None, :, :, None] for level in changed])
        torch.testing.assert_close(evaluate(model, photos).anomaly_map, expected, rtol=0, atol=1e-6)


def test_openvino_agrees_with_evaluation(started: tuple[ResAD, dict, Path], photos: Tensor, tmp_path: Path) -> None:
    model = ResAD.load_from_checkpoint(started[2]).eval()
    for kind in ("image", "pixel"):  # the scores of so short a training span a thousandth, which would be stretched
        for name, value in (("min", 0.0), ("max", 1.0), ("threshold", 0.5)):
            getattr(model.post_processor, f"_{kind}_{name}" if name == "threshold" else f"{kind}_{name}").fill_(value)
    compiled = openvino.Core().compile_model(model.to_openvino(tmp_path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    ours = evaluate(model, photos)
    for count in (1, 4):
        theirs = compiled(photos[:count].numpy())
        np.testing.assert_allclose(theirs["pred_score"].reshape(-1), ours.pred_score[:count], atol=1e-4)
        np.testing.assert_allclose(theirs["anomaly_map"], ours.anomaly_map[:count], atol=1e-3)
