# SPDX-License-Identifier: Apache-2.0

"""Checkpoints that version 0.1.0 wrote load, by every way, to the same scores."""

from pathlib import Path
from typing import Any

import pytest
import torch

from anomalib_resad import ResAD
from anomalib_resad.checkpoint import PARTS_0_1, upgrade_hyper_parameters
from anomalib_resad.method.head import EvidenceHead
from anomalib_resad.method.presets import PRESETS, SETTINGS
from tests.conftest import rewrite

# What 0.1.0 stored for settings that a method does not have.
UNUSED = {"residual": "difference", "constraintor": "none", "occ": "none", "coupling_layers": 0, "push_pull": "hinge"}
UNUSED |= {"position_channels": 0, "codebook_size": 0, "efdm": 0.0, "abnormal_gaussian": False, "warmup": 0.0}
UNUSED |= {"push_pull_weight": 1.0, "flow_batch_size": 8192, "flow_steps": None}


def as_0_1_0(path: Path, folder: Path) -> Path:
    """A checkpoint with the names and settings that 0.1.0 wrote."""
    content = torch.load(path, weights_only=True)
    settings = content["hyper_parameters"]
    is_head = settings["estimator"] == "head"
    settings |= {name: UNUSED[name] for name in SETTINGS if settings[name] is None and name in UNUSED}
    settings["estimator"] = "fused" if is_head else settings["estimator"]
    state: dict[str, Any] = {}
    for name, value in content["state_dict"].items():
        parts = [old for old, new in PARTS_0_1.items() if name.startswith(new) and (old != "model.head." or is_head)]
        old = max(parts, key=lambda part: len(PARTS_0_1[part]), default=None)
        state[name if old is None else old + name.removeprefix(PARTS_0_1[old])] = value
    record = state["model.bank._extra_state"]
    files = [{"name": name, "sha256": digest} for name, digest in record["files"]]
    kept = {key: record[key] for key in ("category", "origin", "k_shot", "seed", "rotations")}
    del state["model.backbone._extra_state"]
    state["model.bank._extra_state"] = kept | {"files": files, "leave_one_out": [1.0, 2.0]}
    if is_head:
        state["model.anomaly_map.ceilings"] = torch.full((1,), float("nan"))
        del state["model.head.weights"], state["model.bank.rows_2"]  # neighborhoods came later
        for name in ("model.head.mean", "model.head.variance"):
            state[name] = state[name][: len(EvidenceHead.WEIGHTS_0_1)]
    content["state_dict"] = state
    return rewrite(content, folder / "earlier.ckpt")


@pytest.fixture(params=["trained", "trained_plus", "trained_default"])
def current(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def evaluate(model: ResAD, photos: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().post_processor(model.model(model.pre_processor.transform(photos))).anomaly_map


def test_checkpoints_of_0_1_0_load(current: Path, tmp_path: Path, images: torch.Tensor) -> None:
    earlier = as_0_1_0(current, tmp_path)
    names = torch.load(earlier, weights_only=True)["state_dict"]
    assert any(name.startswith("model.backbone.") for name in names)
    assert not any("encoder" in name or "estimator" in name for name in names)
    as_it_was = ResAD.load_from_checkpoint(current)
    head = as_it_was.model.estimator
    if isinstance(head, EvidenceHead):
        state = head.state_dict()
        state |= {name: state[name][: len(EvidenceHead.WEIGHTS_0_1)] for name in ("mean", "variance")}
        head.load_state_dict(state | {"weights": torch.tensor(EvidenceHead.WEIGHTS_0_1)})
    expected = evaluate(as_it_was, images)
    restored = ResAD.load_from_checkpoint(earlier)
    started = ResAD(checkpoint=earlier)
    resumed = ResAD(pre_trained=False, backbone="resnet18")
    content = torch.load(earlier, weights_only=True)
    resumed.on_load_checkpoint(content)
    resumed.load_state_dict(content["state_dict"])
    for model in (restored, started, resumed):
        assert torch.equal(evaluate(model, images), expected)
        assert model.model.bank.record.photos == 2
        own = PRESETS[model.hparams["variant"]]
        assert [name for name in SETTINGS if model.hparams[name] is None and own.get(name) is not None] == []
        assert [name for name in SETTINGS if model.hparams[name] is not None and name not in own] == []


def test_checkpoints_from_before_the_variants_are_the_first_method(
    trained: Path, tmp_path: Path, images: torch.Tensor
) -> None:
    """They lack the settings that came with the variants, whatever the constructor is given."""
    content = torch.load(as_0_1_0(trained, tmp_path), weights_only=True)
    for key in ("variant", "constraintor", "occ", "codebook_size", "efdm", "abnormal_gaussian", "push_pull", "warmup"):
        del content["hyper_parameters"][key]
    del content["hyper_parameters"]["estimator"], content["hyper_parameters"]["projection"]
    rewrite(content, tmp_path / "first.ckpt")
    expected = evaluate(ResAD.load_from_checkpoint(trained), images)
    for model in (
        ResAD.load_from_checkpoint(tmp_path / "first.ckpt"),
        ResAD(checkpoint=tmp_path / "first.ckpt", variant="resad++"),
    ):
        assert model.hparams["variant"] == "resad"
        assert torch.equal(evaluate(model, images), expected)


def test_optimizers_find_their_parameters_in_the_same_order(trained_plus: Path) -> None:
    """So that a training of 0.1.0 can go on: its optimizer counted constraintors, flows, fusion, then codes."""
    estimator = ResAD.load_from_checkpoint(trained_plus).model.estimator
    names = {id(value): name.split(".")[0] for name, value in estimator.named_parameters()}
    decayed, exempt = estimator.parameter_groups()
    order = list(dict.fromkeys(names[id(value)] for value in decayed))
    assert order == ["constraintors", "flows"]
    assert {names[id(value)] for value in exempt} == {"codebooks"}


def test_settings_that_a_method_does_not_have_are_dropped() -> None:
    earlier = {"variant": "fused", "estimator": "fused", "match": "cosine", "lr": 1e-3} | UNUSED
    upgraded = upgrade_hyper_parameters(earlier)
    assert upgraded["estimator"] == "head"
    assert upgraded["lr"] == 1e-3
    assert upgraded["projection"] == PRESETS["fused"]["projection"]
    assert all(upgraded[name] is None for name in UNUSED)
