# SPDX-License-Identifier: Apache-2.0

"""Neighborhoods of patches, judged beside these where products lie alike: by hand, whose they are, on the edge."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset13 as op
from torch import Tensor, nn

from anomalib_resad import ResAD, ResADModel
from anomalib_resad.deploy.bank import SEARCHED_NEIGHBORHOODS, BankError
from anomalib_resad.deploy.bank_reading import check_bank
from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.deploy.plain_operations import REPLACEMENTS
from anomalib_resad.enrollment.neighborhoods import FEWEST_PHOTOS, judges_neighborhoods
from anomalib_resad.export.edge_bundle import export_bundle, load_model
from anomalib_resad.export.parity import TorchReference
from anomalib_resad.method.bank_record import BankRecord
from anomalib_resad.method.features import Features, rows_of
from anomalib_resad.method.head import EvidenceHead
from anomalib_resad.method.joined_levels import neighborhoods_of
from anomalib_resad.torch_model import fused


def unit(*shape: int) -> Tensor:
    return nn.functional.normalize(torch.randn(shape), dim=1)


@pytest.fixture
def model() -> ResADModel:
    torch.manual_seed(0)
    model = fused("resnet18", pre_trained=False).eval()
    head_of(model).mean[-1] = -1.0
    head_of(model).power.fill_(1e-6)  # so that no distance is below the shortest
    return model


def head_of(model: ResADModel) -> EvidenceHead:
    assert isinstance(model.estimator, EvidenceHead)
    return model.estimator


def fill(model: ResADModel, references: Features, photos: int, rotations: int) -> None:
    model.bank.store(rows_of(references), BankRecord(photos=photos, rotations=rotations))


def maps(model: ResADModel, features: Features) -> Tensor:
    with torch.no_grad():
        found = model.detect(features, model.bank.searched, (64, 96)).anomaly_map
    assert found is not None
    return found


def test_means_of_overlapping_windows() -> None:
    torch.manual_seed(0)
    keys = unit(2, 5, 9, 12)
    found = neighborhoods_of(keys)
    assert found.shape == (2, 5, 3, 5)
    for row, column in ((0, 0), (1, 3), (2, 4)):
        mean = keys[:, :, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4].mean(dim=(2, 3))
        torch.testing.assert_close(found[:, :, row, column], nn.functional.normalize(mean, dim=1))


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 4)])
def test_photos_smaller_than_a_neighborhood(size: tuple[int, int]) -> None:
    assert neighborhoods_of(unit(1, 3, *size)).shape[-2:] == (1, 1)


@pytest.mark.parametrize("size", [(28, 28), (9, 12), (5, 4)])
def test_means_without_a_pooling(size: tuple[int, int]) -> None:
    """As exports compute them."""
    keys = np.random.default_rng(0).normal(size=(2, 3, *size)).astype(np.float32)
    photos = op.parameter([-1, 3, -1, -1], np.float32)
    pooled = op.avg_pool(photos, [2, 2], [0, 0], [0, 0], [4, 4], exclude_pad=True)
    plain = REPLACEMENTS["AvgPool"](pooled)
    assert plain is not None
    model = ov.Core().compile_model(
        ov.Model([pooled, plain], [photos], "means"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    expected, found = model(keys).values()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_what_patches_do_not_show(model: ResADModel) -> None:
    """The same patches in another arrangement: nearest references are equal, neighborhoods are not."""
    with torch.no_grad():
        good = model.encode(torch.randn(FEWEST_PHOTOS, 3, 64, 96))
    fill(model, good, FEWEST_PHOTOS, 1)
    order = torch.randperm(8 * 12)
    values, keys = (level[:1].flatten(2)[..., order].unflatten(2, (8, 12)) for level in (good.values[0], good.keys))
    mixed = Features([values], keys, neighborhoods_of(keys))
    assert maps(model, mixed).mean() > maps(model, good.photo(0)).mean() + 1
    fill(model, good, FEWEST_PHOTOS, 8)
    torch.testing.assert_close(maps(model, mixed).mean(), maps(model, good.photo(0)).mean(), rtol=0, atol=0.5)


def test_evidence_by_hand(model: ResADModel) -> None:
    """The squared distance to the nearest neighborhood, interpolated, its logarithm in units of the source's."""
    with torch.no_grad():
        good = model.encode(torch.randn(FEWEST_PHOTOS, 3, 64, 96))
        photo = model.encode(torch.randn(1, 3, 64, 96))
    head, around = head_of(model), photo.neighborhoods
    assert around is not None
    assert good.neighborhoods is not None
    head.variance[-1] = 4.0
    fill(model, good, FEWEST_PHOTOS, 1)
    found = maps(model, photo)
    head.weights[-1] = 0
    without = maps(model, photo)
    rows = good.neighborhoods.permute(0, 2, 3, 1).flatten(0, 2)
    away = torch.cdist(around.permute(0, 2, 3, 1).flatten(0, 2), rows).square().amin(dim=1).reshape(1, 1, 3, 5)
    enlarged = nn.functional.interpolate(away, size=(8, 12), mode="bilinear", align_corners=False)
    part = EvidenceHead.WEIGHTS[-1] * (enlarged[:, 0].log() + 1.0) / 2.0
    _, expected = model.anomaly_map([part], (64, 96))
    torch.testing.assert_close(found - without, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("photos", "rotations"), [(1, 1), (3, 1), (4, 8), (1, 8)])
def test_rotated_products_and_few_photos_are_judged_by_patches_alone(
    model: ResADModel, photos: int, rotations: int
) -> None:
    """As if each neighborhood were as far away as usual, whatever is in the bank."""
    assert not judges_neighborhoods(photos, rotations)
    with torch.no_grad():
        good, photo = model.encode(torch.randn(photos, 3, 64, 96)), model.encode(torch.randn(1, 3, 64, 96))
    fill(model, good, photos, rotations)
    found = maps(model, photo)
    fill(model, good._replace(neighborhoods=unit(photos, 64, 3, 5)), photos, rotations)
    assert torch.equal(maps(model, photo), found)
    head_of(model).weights[-1] = 0
    torch.testing.assert_close(maps(model, photo), found, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("photos", "neighborhoods"), [(3, 1), (4, 4 * 9)])
def test_numbers_of_evaluation_on_the_edge(
    trained_default: Path,
    bundle_default: Path,
    good: list[Path],
    new: list[Path],
    photos: int,
    neighborhoods: int,
    tmp_path: Path,
) -> None:
    """Where neighborhoods are judged and where they are not: then one row of zeros stands for them."""
    model = load_model(trained_default)
    model.hparams["rotations"] = 1
    evaluation = TorchReference(model, good[:photos])
    inferencer = ResADInferencer(bundle_default, banks=tmp_path, threads=1)
    inferencer.enroll("tiles", good[:photos], rotations=1)
    assert len(np.unique(inferencer.searched("tiles")[1], axis=0)) == neighborhoods
    for photo in new:
        theirs, ours = inferencer.predict(photo, "tiles"), evaluation.predict(photo)
        assert theirs.raw_score == pytest.approx(ours.raw_score, rel=1e-4)
        np.testing.assert_allclose(theirs.map, ours.map, atol=1e-3)


def test_heads_of_before_judge_patches_alone(model: ResADModel) -> None:
    """Their features, banks and bundles have no neighborhoods."""
    state = model.state_dict()
    for name in ("mean", "variance", "weights"):
        state[f"estimator.{name}"] = state[f"estimator.{name}"][:3]
    del state["bank.rows_2"]
    model.load_state_dict(state)
    with torch.no_grad():
        features = model.encode(torch.randn(2, 3, 64, 96))
    assert features.neighborhoods is None
    fill(model, features, 2, 1)
    assert model.bank.searched.neighborhoods is None
    assert torch.isfinite(maps(model, features)).all()


def test_bundles_of_before_have_the_earlier_format(trained_default: Path, tmp_path: Path, good: list[Path]) -> None:
    model = ResAD(checkpoint=trained_default).eval()
    assert export_bundle(model, tmp_path / "now").joinpath("manifest.json").read_text().count('"format": 2') == 1
    head = head_of(model.model)
    state = head.state_dict()
    head.load_state_dict(state | {name: state[name][:3] for name in ("mean", "variance", "weights")})
    bundle = export_bundle(model, tmp_path / "before")
    assert '"format": 1' in bundle.joinpath("manifest.json").read_text()
    inferencer = ResADInferencer(bundle, threads=1)
    inferencer.enroll("tiles", good[:2], rotations=1)
    assert len(inferencer.searched("tiles")) == 2
    assert np.isfinite(inferencer.predict(good[2], "tiles").raw_score)


def test_a_limit_of_patches_limits_neighborhoods(bundle_default: Path, good: list[Path], tmp_path: Path) -> None:
    """To a quarter as many, chosen once; a choice that is none is refused."""
    inferencer = ResADInferencer(bundle_default, banks=tmp_path, threads=1)
    bank = inferencer.enroll("tiles", good[:4], rotations=1, max_patches=40)
    assert bank.arrays[SEARCHED_NEIGHBORHOODS].sum() == 10
    assert len(np.unique(inferencer.searched("tiles")[1], axis=0)) == 10
    whole = inferencer.enroll("whole", good[:4], rotations=1)
    assert SEARCHED_NEIGHBORHOODS not in whole.arrays
    assert len(np.unique(inferencer.searched("whole")[1], axis=0)) == 36
    chosen = bank.arrays[SEARCHED_NEIGHBORHOODS]
    for wrong in (chosen * 0, chosen[1:], chosen.astype(np.float32), chosen + 1):
        broken = replace(bank, arrays=bank.arrays | {SEARCHED_NEIGHBORHOODS: wrong})
        with pytest.raises(BankError, match="no list of 0 and 1"):
            check_bank(broken, inferencer.manifest, "bank")
    with pytest.raises(BankError, match="no list of 0 and 1"):
        check_bank(replace(whole, arrays=whole.arrays | {SEARCHED_NEIGHBORHOODS: chosen}), inferencer.manifest, "bank")
