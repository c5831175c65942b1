# SPDX-License-Identifier: Apache-2.0

"""Thresholds on the device: from a product's own photos, as PyTorch computes them, and kept right."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load, save

from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.deploy.bank import ENTRY, checksum_of
from anomalib_resad.deploy.bundle import Scale, read_manifest
from anomalib_resad.enrollment.calibration import product_threshold
from anomalib_resad.enrollment.coreset import thin_out
from anomalib_resad.enrollment.files import write_whole
from anomalib_resad.export.edge_bundle import export_bundle, load_model
from anomalib_resad.export.parity import TorchReference
from anomalib_resad.reference_rows import leave_one_out

SPREAD = 0.2


def knowing(bundle: Path, folder: Path, spread: float | None = SPREAD, patch_spread: float | None = None) -> Path:
    """A copy of a bundle that knows how far good photos scatter; the tiny trainings hold too few out."""
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("banks"))
    replace(read_manifest(folder), spread=spread, patch_spread=patch_spread).write(folder)
    return folder


@pytest.fixture
def inferencer(bundle: Path, tmp_path: Path) -> ResADInferencer:
    return ResADInferencer(knowing(bundle, tmp_path / "bundle"), threads=1)


@pytest.mark.parametrize(("model", "photos"), [("", 4), ("_default", 4), ("_default", 3)])
def test_scores_and_threshold_are_those_of_pytorch(
    model: str, photos: int, request: pytest.FixtureRequest, good: list[Path], new: list[Path], tmp_path: Path
) -> None:
    """Label, score and map too, with a threshold for 5 % of the good photos."""
    folder = knowing(request.getfixturevalue(f"bundle{model}"), tmp_path / "bundle", SPREAD, 2 * SPREAD)
    edge = ResADInferencer(folder)
    bank = edge.enroll("tiles", good[:photos])
    evaluation = TorchReference(load_model(request.getfixturevalue(f"trained{model}")), good[:photos])
    resad = evaluation.model
    expected = leave_one_out(resad.model, resad.pre_processor)
    assert bank.leave_one_out == pytest.approx(expected.scores, rel=1e-5, abs=1e-4)
    assert bank.map_offset == pytest.approx(expected.map_offset, rel=1e-5, abs=1e-4)
    assert len(set(expected.scores)) == photos
    resad.post_processor.spread.fill_(SPREAD)
    resad.post_processor.patch_spread.fill_(2 * SPREAD)
    resad.post_processor.calibrate(expected, 0.05, resad.model.bank.record.judges_neighborhoods)
    assert bank.threshold == pytest.approx(resad.post_processor.image_threshold.item(), rel=1e-5, abs=1e-4)
    for photo in new:
        theirs, ours = edge.predict(photo, "tiles"), evaluation.predict(photo)
        assert theirs.score == pytest.approx(ours.score, abs=1e-4)
        assert theirs.label == ours.label
        np.testing.assert_allclose(theirs.map, ours.map, atol=1e-3)


def test_the_spread_is_that_of_what_is_judged(bundle_default: Path, good: list[Path], tmp_path: Path) -> None:
    """Of single patches alone with few photos and rotated ones; bundles that know one spread take it for all."""
    edge = ResADInferencer(knowing(bundle_default, tmp_path / "bundle", SPREAD, 2 * SPREAD), threads=1)
    few, many = (edge.enroll(f"{count}", good[:count], rotations=1) for count in (3, 4))
    rotated = edge.enroll("rotated", good[:4], rotations=8)
    assert [bank.spread(edge.manifest) for bank in (few, many, rotated)] == [2 * SPREAD, SPREAD, 2 * SPREAD]
    for bank, spread in ((few, 2 * SPREAD), (many, SPREAD), (rotated, 2 * SPREAD)):
        assert bank.threshold == product_threshold(bank.leave_one_out or (), spread, 0.05)
    assert edge.add("3", good[3:4]).threshold == many.threshold
    earlier = ResADInferencer(knowing(bundle_default, tmp_path / "earlier"), threads=1)
    assert earlier.enroll("few", good[:3]).spread(earlier.manifest) == SPREAD
    unknown = ResADInferencer(knowing(bundle_default, tmp_path / "unknown", None), threads=1)
    assert math.isnan(unknown.enroll("few", good[:3]).spread(unknown.manifest))


def test_a_bundle_carries_both_spreads(trained_default: Path, tmp_path: Path) -> None:
    model = load_model(trained_default)
    model.post_processor.spread.fill_(SPREAD)
    model.post_processor.patch_spread.fill_(2 * SPREAD)
    manifest = read_manifest(export_bundle(model, tmp_path / "bundle"))
    assert (manifest.spread, manifest.patch_spread) == pytest.approx((SPREAD, 2 * SPREAD))


def test_a_photo_scores_as_if_it_were_new(inferencer: ResADInferencer, good: list[Path]) -> None:
    """Against a bank without it, whole or thinned out."""
    for most in (None, 40):
        bank = inferencer.enroll("all", good[:3], max_patches=most, replace_existing=True)
        for reference, score in zip(bank.references, bank.leave_one_out or (), strict=True):
            photo = next(path for path in good if path.name == reference.name)
            inferencer.enroll("others", [each for each in good[:3] if each != photo], max_patches=most)
            assert inferencer.predict(photo, "others").raw_score == pytest.approx(score, abs=1e-5)
            inferencer.remove("others")


def test_a_threshold_for_a_rate_follows_the_photos(inferencer: ResADInferencer, good: list[Path]) -> None:
    """As if all had been enrolled at once; with a single photo it is the model's."""
    alone = inferencer.enroll("grown", good[:1])
    assert (alone.threshold, alone.false_alarm_rate, alone.leave_one_out) == (None, 0.05, ())
    inferencer.add("grown", good[1:3])
    at_once = inferencer.enroll("at once", good[:3])
    assert replace(inferencer.bank("grown"), product="at once").checksum == at_once.checksum
    assert at_once.threshold is not None
    assert at_once.threshold > max(at_once.leave_one_out or ())
    inferencer.remove("grown", good[1].name)
    inferencer.remove("grown", good[2].name)
    assert replace(inferencer.bank("grown"), product="alone").checksum == replace(alone, product="alone").checksum


def test_a_bundle_without_a_threshold_has_one_for_each_product(bundle: Path, good: list[Path], tmp_path: Path) -> None:
    """That of the plain distance; where a threshold and no scatter was learned, as in 0.1.0, it stays the default."""
    knowing(bundle, tmp_path / "bundle", spread=None)
    learned = read_manifest(tmp_path / "bundle")
    for score, rate in ((Scale(None, None, None), 0.05), (Scale(1.0, 0.0, 2.0), None)):
        replace(learned, score=score).write(tmp_path / "bundle")
        inferencer = ResADInferencer(tmp_path / "bundle", banks=tmp_path / f"{rate}", threads=1)
        alone, bank = inferencer.enroll("alone", good[:1]), inferencer.enroll("tiles", good[:3])
        assert (alone.threshold, alone.false_alarm_rate, bank.false_alarm_rate) == (None, rate, rate)
        label = inferencer.predict(good[0], "tiles").label
        if rate is None:
            assert bank.threshold is None
        else:
            assert bank.threshold == product_threshold(bank.leave_one_out or (), math.nan, 0.05)
            assert label is False, "a photo that is enrolled"
            assert inferencer.predict(good[0], "alone").label is None
            assert inferencer.add("alone", good[1:3]).threshold == bank.threshold


def test_what_somebody_chose_stays(inferencer: ResADInferencer, good: list[Path]) -> None:
    for choose, kept in (
        (lambda: inferencer.set_threshold("tiles", 1.5), (1.5, None)),
        (lambda: inferencer.set_threshold("tiles", None), (None, None)),
    ):
        inferencer.enroll("tiles", good[:2], replace_existing=True)
        choose()
        inferencer.add("tiles", good[2:3])
        inferencer.enroll("tiles", good[3:5], replace_existing=True)
        bank = inferencer.bank("tiles")
        assert (bank.threshold, bank.false_alarm_rate) == kept
        assert len(bank.leave_one_out or ()) == 2
    strict, loose = (inferencer.calibrate("tiles", rate).threshold for rate in (0.01, 0.2))
    assert strict is not None
    assert loose is not None
    assert strict > loose
    replaced = inferencer.enroll("tiles", good[:3], replace_existing=True)
    assert replaced.false_alarm_rate == 0.2, "computed anew, for the photos that are there now"
    assert replaced.threshold != loose
    assert inferencer.enroll("tiles", good[:3], threshold=2.0, replace_existing=True).threshold == 2.0
    assert inferencer.enroll("plain", good[:3], false_alarm_rate=None).threshold is None


def test_impossible_wishes_are_refused(inferencer: ResADInferencer, good: list[Path]) -> None:
    with pytest.raises(ValueError, match="are two thresholds"):
        inferencer.enroll("tiles", good[:2], threshold=1.0, false_alarm_rate=0.1)
    with pytest.raises(ValueError, match="false_alarm_rate=2 must be a share"):
        inferencer.enroll("tiles", good[:2], false_alarm_rate=2)
    inferencer.enroll("tiles", good[:1])
    with pytest.raises(ValueError, match="has one photo"):
        inferencer.calibrate("tiles", 0.1)
    with pytest.raises(ValueError, match="not enrolled"):
        inferencer.calibrate("pill", 0.1)


def test_bundles_that_know_no_scatter(bundle: Path, good: list[Path], tmp_path: Path) -> None:
    """As those of 0.1.0: the model's threshold stays, unless a rate is asked for."""
    earlier = ResADInferencer(knowing(bundle, tmp_path / "bundle", None))
    assert earlier.enroll("tiles", good[:3]).threshold is None
    bank = earlier.calibrate("tiles", 0.1)
    assert bank.threshold is not None
    assert bank.threshold > np.mean(bank.leave_one_out or (math.nan,))


def as_0_1_0(path: Path, most: int | None = None) -> None:
    """Rewrite a bank as 0.1.0 wrote it: without scores, and with ``max_patches`` without the other rows."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata, arrays = json.loads(header["__metadata__"][ENTRY]), load(content)
    for name in ("false_alarm_rate", "leave_one_out", "bit_depth", "checksum"):
        del metadata[name]
    if most is not None:
        arrays = {name: rows[thin_out(rows, most)] for name, rows in arrays.items()}
    metadata |= {"max_patches": json.dumps(most), "threshold": "null"}
    write_whole(path, save(arrays, metadata | {"checksum": checksum_of(metadata, arrays)}))


def test_banks_of_0_1_0(inferencer: ResADInferencer, good: list[Path], new: list[Path]) -> None:
    """Whole ones get their scores when they are needed; thinned ones inspect as before, and say what they lack."""
    expected = inferencer.enroll("tiles", good[:3])
    file = inferencer.banks / "tiles.safetensors"
    as_0_1_0(file)
    assert inferencer.bank("tiles").leave_one_out is None
    assert inferencer.calibrate("tiles", 0.05).checksum == expected.checksum
    as_0_1_0(file, 30)
    assert 0 < inferencer.predict(new[0], "tiles").score < 1
    for change in (lambda: inferencer.calibrate("tiles", 0.1), lambda: inferencer.add("tiles", good[3:4])):
        with pytest.raises(ValueError, match=r"thinned out by an earlier version .* Enroll it again"):
            change()
    assert inferencer.set_threshold("tiles", 1.0).threshold == 1.0


def test_a_limit_of_patches_keeps_all_on_the_disk(inferencer: ResADInferencer, good: list[Path]) -> None:
    """So photos can be added and removed; what is searched stays within the limit."""
    inferencer.enroll("tiles", good[:2], max_patches=64)
    inferencer.add("tiles", good[2:3])
    inferencer.remove("tiles", good[0].name)
    at_once = inferencer.enroll("at once", good[1:3], max_patches=64)
    assert replace(inferencer.bank("tiles"), product="at once").checksum == at_once.checksum
    assert [len(rows) for rows in inferencer.searched("tiles")] == [64, 64, 32]


def test_a_photo_that_is_there_twice_changes_nothing_within_a_limit(
    inferencer: ResADInferencer, good: list[Path], tmp_path: Path
) -> None:
    """A file of other bytes with the same pixels: identical files count once anyway."""
    Image.open(good[0]).save(tmp_path / "again.png", compress_level=0)
    inferencer.enroll("once", good[:2], max_patches=40, rotations=1)
    bank = inferencer.enroll("twice", [tmp_path / "again.png", *good[:2]], max_patches=40, rotations=1)
    assert len(bank.references) == 3
    for rows, others in zip(inferencer.searched("once"), inferencer.searched("twice"), strict=True):
        assert len(np.unique(rows, axis=0)) <= 40
        assert np.array_equal(np.unique(rows, axis=0), np.unique(others, axis=0))
    assert inferencer.predict(good[3], "once").raw_score == inferencer.predict(good[3], "twice").raw_score
