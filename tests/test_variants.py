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
from anomalib_resad.method.bank_record import BankRecord
from anomalib_resad.method.constraintor import ConstraintorKind
from anomalib_resad.method.loss import OneClass, PushPull
from anomalib_resad.method.presets import PRESETS, SETTINGS, resolve
from anomalib_resad.method.reference_bank import Metric, Rows
from anomalib_resad.method.residual_flow import Residual, ResidualFlow
from anomalib_resad.torch_model import resad_plus_plus
from tests.conftest import DEFAULT, DISTANCE, PLUS, TINY, cross_category, quiet_engine

OPTIONS = {
    "match": get_args(Metric),
    "residual": get_args(Residual),
    "constraintor": get_args(ConstraintorKind),
    "occ": get_args(OneClass),
    "push_pull": get_args(PushPull),
}


def small(**settings: Any) -> ResADModel:
    size = {"layers": ("layer1", "layer2"), "pre_trained": False}
    parts = {"coupling_layers": 1, "position_channels": 0, "codebook_size": 32, "flow_batch_size": 512, "flow_steps": 1}
    return resad_plus_plus("resnet18", **size, **parts | settings)


def flow_of(model: ResADModel) -> ResidualFlow:
    assert isinstance(model.estimator, ResidualFlow)
    return model.estimator


# -- settings ---------------------------------------------------------------------------------------------------------


def test_presets_are_the_published_settings() -> None:
    for variant, settings in PRESETS.items():
        model = ResAD(backbone="resnet18", pre_trained=False, variant=variant)
        assert {key: model.hparams[key] for key in SETTINGS} == dict.fromkeys(SETTINGS) | settings
    assert ResAD(backbone="resnet18", pre_trained=False).hparams["variant"] == "fused"
    assert resolve("resad++", {}) == PRESETS["resad++"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (DEFAULT | {"coupling_layers": 4}, r"'fused' has no coupling_layers=4.*variant 'resad' or 'resad\+\+'"),
        (DEFAULT | {"residual": "squared", "efdm": 0.0}, r"has no residual='squared', efdm=0\.0"),
        (DISTANCE | {"lr": 1e-3}, r"'distance' has no lr=0\.001.*'fused' or 'resad' or 'resad\+\+', trained"),
        (DISTANCE | {"synthetic": 0.0}, "estimator='distance' has: estimator, match, projection, rotations"),
    ],
)
def test_arguments_that_a_method_does_not_have_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ResAD(**settings)


def test_arguments_that_the_checkpoints_method_does_not_have_are_refused(trained_default: Path) -> None:
    """Whatever the constructor's own variant has."""
    with pytest.raises(ValueError, match=r"variant='fused' has no efdm=0\.5"):
        ResAD(checkpoint=trained_default, variant="resad++", efdm=0.5)


def test_every_setting_can_be_changed_alone() -> None:
    """Also to values that are false, which are not "not given"."""
    for key, value in (("efdm", 0.0), ("codebook_size", 0), ("abnormal_gaussian", False), ("match", "l2")):
        assert resolve("resad++", {key: value}) == PRESETS["resad++"] | {key: value}
    model = ResAD(**PLUS | {"efdm": 0.0}, match="l2")
    assert model.hparams["efdm"] == 0.0
    assert model.hparams["residual"] == "squared"
    assert not flow_of(model.model).codebooks, "without matching there is nothing that a codebook does"
    assert model.model.bank.metric == "l2"


@pytest.mark.parametrize(("argument", "known"), [("variant", tuple(PRESETS)), *OPTIONS.items()])
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
    features = model.encode(images)
    model.bank.fill(features.photo(0))
    mask = torch.zeros(3, *images.shape[-2:])
    mask[1, :8, :8] = 1
    steps = list(model.losses(features.photos, [model.bank.rows] * 3, mask, progress=1.0))
    assert len(steps) == 1
    total = torch.stack([*steps[0].values()]).sum()
    assert torch.isfinite(total)
    total.backward()
    untrained = ("estimator.constraintors", "estimator.fusion") if settings.get("occ") == "none" else ()
    wanted = [name for name, value in model.named_parameters() if value.requires_grad]
    parameters = dict(model.named_parameters())
    without = [name for name in wanted if parameters[name].grad is None and not name.startswith(untrained)]
    assert not without
    broken = [name for name in wanted if (grad := parameters[name].grad) is not None and not torch.isfinite(grad).all()]
    assert not broken
    with torch.no_grad():
        result = model.eval()(images)
    assert torch.isfinite(result.anomaly_map).all()
    if flow_of(model).abnormal_gaussian:
        assert 0 <= result.anomaly_map.min() <= result.anomaly_map.max() <= 1


def test_orthogonality_counts_for_the_mlp_alone(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(
        "anomalib_resad.method.residual_flow.orthogonality", lambda rows: (counted.append(len(rows)), rows.sum())[1]
    )
    for kind, expected in (("conv_bn_relu", 0), ("mlp", 2)):
        model = small(constraintor=kind)
        features = model.encode(images)
        masks = [torch.zeros(3, *level.shape[-2:]) for level in features.values]
        flow_of(model).constrain_loss(features, [0.9 * level for level in features.values], masks)
        assert len(counted) == expected


def test_warm_up_is_about_normal_patches_alone(images: Tensor) -> None:
    model = small(constraintor="none", occ="none", warmup=0.1)
    features, mask = model.encode(images), torch.ones(3, *images.shape[-2:])
    model.bank.fill(features)
    losses = {
        progress: next(model.losses(features.photos, [model.bank.rows] * 3, mask, progress))["flow"]
        for progress in (0.0, 0.09, 0.11, 1.0)
    }
    assert losses[0.0] == losses[0.09] == 0
    assert losses[0.11] > 0 < losses[1.0]
    assert torch.isnan(flow_of(model).boundaries).all(), "there is no boundary without normal patches"


# -- training, restoring, export --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plus(trained_plus: Path) -> ResAD:
    return ResAD.load_from_checkpoint(trained_plus).eval()


@pytest.fixture
def photos() -> Tensor:
    """Noise has no two equal residuals; the tie of drawn, flat backgrounds is in test_codebook."""
    return torch.rand(4, 3, 90, 70, generator=torch.Generator().manual_seed(1))


def evaluate(model: ResAD, photos: Tensor) -> InferenceBatch:
    with torch.no_grad():
        return model.post_processor(model.model(model.pre_processor.transform(photos)))


def test_training_reaches_every_part(products: Path, tmp_path: Path) -> None:
    seed_everything(0)
    model = ResAD(**PLUS, visualizer=False)
    before = {name: value.detach().clone() for name, value in model.model.named_parameters()}
    flow, progress = flow_of(model.model), []
    original = flow.losses
    flow.losses = lambda *arguments: (progress.append(arguments[-1]), original(*arguments))[1]  # type: ignore[method-assign]
    quiet_engine(tmp_path, max_epochs=1).fit(model, datamodule=cross_category(products))
    trainable = {name: value for name, value in model.model.named_parameters() if value.requires_grad}
    assert not {name for name, value in trainable.items() if torch.equal(before[name], value)}
    assert {name.split(".")[1] for name in trainable} == {"codebooks", "constraintors", "flows"}
    assert torch.isfinite(flow.boundaries).all()
    assert torch.isfinite(flow.ceilings).all()
    assert progress[0] == 0, "a tenth of one epoch still is its first batch"
    assert progress == sorted(progress)
    assert 0.5 < progress[-1] < 1


def test_checkpoint_rebuilds_the_model(trained_plus: Path, plus: ResAD, photos: Tensor) -> None:
    content = torch.load(trained_plus, weights_only=True)
    changed = {"codebook_size": 64, "coupling_layers": 2, "position_channels": 8, "lr": TINY["lr"]}
    expected = PRESETS["resad++"] | changed | {"flow_batch_size": TINY["flow_batch_size"]}
    assert {key: content["hyper_parameters"][key] for key in expected} == expected
    expected = evaluate(plus, photos)
    for other in (ResAD(checkpoint=trained_plus), ResAD(checkpoint=trained_plus, occ="none", match="l2")):
        assert other.hparams["variant"] == "resad++"
        assert torch.equal(evaluate(other.eval(), photos).anomaly_map, expected.anomaly_map)


def test_batch_composition_changes_nothing(plus: ResAD, photos: Tensor) -> None:
    """Exactly, from the features on: a backbone rounds differently with the batch size, and a code may be as near."""
    together = evaluate(plus, photos)
    with torch.no_grad():
        features, rows = plus.model.encode(plus.pre_processor.transform(photos)), plus.model.bank.rows
        whole = plus.model.detect(features, rows, (64, 64))
        for index in range(4):
            alone = plus.model.detect(features.photo(index), rows, (64, 64))
            torch.testing.assert_close(alone.anomaly_map[0], whole.anomaly_map[index], rtol=0, atol=1e-6)
            torch.testing.assert_close(alone.pred_score[0], whole.pred_score[index], rtol=0, atol=1e-6)
    alone = evaluate(plus, photos[2:3])
    torch.testing.assert_close(alone.pred_score, together.pred_score[2:3], rtol=0, atol=1e-4)
    torch.testing.assert_close(alone.anomaly_map, together.anomaly_map[2:3], rtol=0, atol=1e-3)


def test_order_and_copies_of_references_change_nothing(trained_plus: Path, photos: Tensor) -> None:
    model = ResAD.load_from_checkpoint(trained_plus).eval()
    expected = evaluate(model, photos).anomaly_map
    rows = model.model.bank.rows.values
    for changed in ([level.flip(0) for level in rows], [torch.cat([level, level[:50]]) for level in rows]):
        model.model.bank.store(Rows(changed), BankRecord())
        torch.testing.assert_close(evaluate(model, photos).anomaly_map, expected, rtol=0, atol=1e-6)


def test_openvino_agrees_with_evaluation(trained_plus: Path, photos: Tensor, tmp_path: Path) -> None:
    model = ResAD.load_from_checkpoint(trained_plus).eval()
    for kind in ("image", "pixel"):  # the scores of so short a training span a thousandth, which would be stretched
        for name, value in (("min", 0.0), ("max", 1.0), ("threshold", 0.5)):
            getattr(model.post_processor, f"_{kind}_{name}" if name == "threshold" else f"{kind}_{name}").fill_(value)
    compiled = openvino.Core().compile_model(model.to_openvino(tmp_path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    ours = evaluate(model, photos)
    for count in (1, 4):
        theirs = compiled(photos[:count].numpy())
        np.testing.assert_allclose(theirs["pred_score"].reshape(-1), ours.pred_score[:count], atol=1e-4)
        np.testing.assert_allclose(theirs["anomaly_map"], ours.anomaly_map[:count], atol=1e-3)
