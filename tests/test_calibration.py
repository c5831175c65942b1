# SPDX-License-Identifier: Apache-2.0

"""The threshold that travels, and the one that a product gets from its own references."""

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

from anomalib_resad import ResAD
from anomalib_resad.calibration import Thresholds
from anomalib_resad.enrollment.calibration import (
    PRIOR,
    OwnScores,
    least_rate,
    own_scores,
    pooled_spread,
    product_threshold,
)
from anomalib_resad.export.anomalib_export import write_thresholds
from anomalib_resad.method.bank_record import BankRecord
from anomalib_resad.method.features import Features
from anomalib_resad.method.reference_bank import Rows
from anomalib_resad.reference_rows import leave_one_out, read_photo
from tests.conftest import DISTANCE, TINY, cross_category, product, quiet_engine, rewrite


def enroll(trained: Path, products: Path, folder: Path, **arguments: object) -> tuple[ResAD, Path]:
    model = ResAD(checkpoint=trained, visualizer=False, **arguments)
    engine = quiet_engine(folder)
    engine.fit(model, datamodule=product(products, "tiles"))
    return model, Path(engine.best_model_path)


# -- the arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_rate_is_kept_where_products_scatter_about_as_the_source_does(k: int, rate: float) -> None:
    """Over many products, the share of good photos above their threshold is the wished one."""
    generator = np.random.default_rng(0)
    alarms = []
    for _ in range(4000):
        location, spread = generator.normal(5, 3), 0.5 * math.sqrt(PRIOR / generator.chisquare(PRIOR))
        threshold = product_threshold(generator.normal(location, spread, k), 0.5, rate)
        alarms.append(norm.sf(threshold, location, spread))
    assert np.mean(alarms) == pytest.approx(rate, rel=0.15)


def test_a_product_that_scatters_more_gets_a_wider_margin() -> None:
    """Which the source alone would not give it; one that scatters less keeps some of the source's."""
    generator = np.random.default_rng(0)
    wide = [norm.sf(product_threshold(generator.normal(0, 2, 8), 0.5, 0.05), 0, 2) for _ in range(500)]
    assert np.mean(wide) < 0.15
    assert norm.sf(0.5 * norm.isf(0.05), 0, 2) > 0.3
    calm = product_threshold([1.0, 1.001, 0.999, 1.0], 0.5, 0.05) - 1
    assert 0.5 < calm < 1.5


def test_rate_is_kept_where_the_spread_is_unknown() -> None:
    """With so few scores a normal distribution would alarm far too often."""
    generator = np.random.default_rng(0)
    alarms = [
        (generator.normal(0, 1, 30) > product_threshold(generator.normal(0, 1, 3), math.nan, 0.05)).mean()
        for _ in range(3000)
    ]
    assert np.mean(alarms) == pytest.approx(0.05, rel=0.15)


def test_spread_is_the_one_within_the_categories() -> None:
    generator = np.random.default_rng(1)
    names = [name for name in "abcd" for _ in range(500)]
    scores = [generator.normal(10 * "abcd".index(name), 0.7) for name in names]
    assert pooled_spread(scores, names) == pytest.approx(0.7, rel=0.05)
    assert np.std(scores) > 10
    assert math.isnan(pooled_spread([1.0, 2.0], ["a", "b"])), "nothing is known where each category has one image"


def test_stricter_rates_give_higher_thresholds_and_more_photos_narrower_ones() -> None:
    rates = [product_threshold([1.0, 1.2], 0.1, rate) for rate in (0.5, 0.1, 0.01, 0.001)]
    assert rates == sorted(set(rates))
    assert product_threshold([1.0, 1.2], 0.1, 0.5) == pytest.approx(1.1), "half of the photos lie above the mean"
    assert product_threshold([1.0, 1.2] * 4, 0.1, 0.01) < product_threshold([1.0, 1.2], 0.1, 0.01)
    assert [least_rate(k) for k in (1, 4)] == [0.5, 0.2]


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 5])
def test_impossible_rates_are_refused_at_once(rate: float) -> None:
    with pytest.raises(ValueError, match=rf"false_alarm_rate={rate} must be a share"):
        ResAD(**TINY, false_alarm_rate=rate)


@pytest.mark.parametrize("scores", [[], [1.0], [1.0, math.nan]])
def test_unusable_scores_are_refused_with_their_values(scores: list[float]) -> None:
    with pytest.raises(ValueError, match=r"finite scores of two or more reference photos, got \["):
        product_threshold(scores, 0.1, 0.1)


# -- leave one out ----------------------------------------------------------------------------------------------------


def test_each_reference_is_scored_as_a_photo_is_against_the_others(
    trained: Path, products: Path, tmp_path: Path
) -> None:
    """The same numbers as from a bank that was enrolled without it, photo in, score out."""
    photos = sorted((products / "tiles" / "train" / "good").glob("*.png"))[:3]
    model, _ = enroll(trained, products, tmp_path, references=products / "tiles" / "train" / "good", k_shot=6)
    model.eval()
    with torch.no_grad():
        images = [model.pre_processor.transform(read_photo(path)[None]) for path in photos]
        features = [model.model.encode(image) for image in images]

        def fill(chosen: list[Features]) -> None:
            model.model.bank.fill(Features([torch.cat(level) for level in zip(*(one.values for one in chosen))]))  # noqa: B905

        fill(features)
        own = leave_one_out(model.model, model.pre_processor)
        offsets = []
        for index, image in enumerate(images):
            fill(features[:index] + features[index + 1 :])
            found = model.model(image)
            assert own.scores[index] == pytest.approx(found.pred_score.item(), abs=1e-6)
            top = found.anomaly_map.flatten().topk(round(0.01 * found.anomaly_map.numel())).values
            offsets.append(found.pred_score.item() - top.mean().item())
    assert len(set(own.scores)) == 3
    assert own.map_offset == pytest.approx(np.mean(offsets), abs=1e-5)
    assert math.isnan(own_scores([]).map_offset)


def test_a_reduced_bank_is_refused(trained: Path) -> None:
    model = ResAD(checkpoint=trained)
    model.model.train()
    whole = model.model.bank.rows.values
    model.model.bank.store(Rows([level[:-1] for level in whole]), model.model.bank.record)
    with pytest.raises(ValueError, match=r"rows, which are not 2 whole photos"):
        leave_one_out(model.model, model.pre_processor)
    assert model.model.training, "the mode is given back after a failure too"
    model.model.bank.store(Rows(whole), BankRecord(photos=1))
    with pytest.raises(ValueError, match=r"rows, which are not 1 whole photos"):
        leave_one_out(model.model, model.pre_processor)


# -- enrollment -------------------------------------------------------------------------------------------------------


def test_a_product_gets_its_own_threshold_which_is_saved(
    trained: Path, products: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    source = ResAD(checkpoint=trained).post_processor
    model, checkpoint = enroll(trained, products, tmp_path, k_shot=4, false_alarm_rate=0.05)
    own = leave_one_out(model.model, model.pre_processor)
    scores = own.scores
    assert len(scores) == 4
    expected = product_threshold(scores, source.spread.item(), 0.05)
    assert "4 reference photos cannot show a false-alarm rate under 20 %" in caplog.text
    for restored in (ResAD.load_from_checkpoint(checkpoint), ResAD(checkpoint=checkpoint)):
        post_processor = restored.post_processor
        assert post_processor.image_threshold.item() == pytest.approx(expected)
        assert post_processor.pixel_threshold.item() == pytest.approx(expected - own.map_offset)
        assert torch.equal(post_processor._image_threshold, source._image_threshold), "the source's is kept"
        assert leave_one_out(restored.model, restored.pre_processor).scores == pytest.approx(scores, abs=1e-6)
    batch = restored.post_processor(restored.eval().model(torch.zeros(1, 3, 64, 64)))
    assert bool(batch.pred_label) == (batch.pred_score.item() > 0.5)


def test_another_product_does_not_inherit_it(trained: Path, products: Path, tmp_path: Path) -> None:
    _, checkpoint = enroll(trained, products, tmp_path, k_shot=4, false_alarm_rate=0.05)
    other = ResAD(checkpoint=checkpoint, k_shot=4, visualizer=False)
    assert not torch.isnan(other.post_processor.product_threshold + other.post_processor.map_offset)
    quiet_engine(tmp_path).test(other, datamodule=product(products, "pill"), verbose=False)
    assert torch.isnan(other.post_processor.product_threshold)
    assert torch.isnan(other.post_processor.map_offset)


def test_one_reference_keeps_the_stored_threshold_and_says_so(
    trained: Path, products: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model, _ = enroll(trained, products, tmp_path, k_shot=1, false_alarm_rate=0.2)
    assert "Enrolled 1 of 6 good photos" in caplog.text
    assert "at a target false-alarm rate" not in caplog.text, "none was learned"
    assert torch.isnan(model.post_processor.product_threshold)
    assert "needs two reference photos or more" in caplog.text


def test_the_training_itself_can_calibrate(products: Path, tmp_path: Path) -> None:
    """With the weights that are saved, not with those at the start; and it learns the spread with the threshold."""
    model = ResAD(**TINY, false_alarm_rate=0.3, visualizer=False)
    engine = quiet_engine(tmp_path, max_epochs=1)
    data = cross_category(products)
    data.val_ratio = 0.4  # three good photos of each category, which have a scatter
    engine.fit(model, datamodule=data)
    saved = ResAD.load_from_checkpoint(engine.best_model_path).eval()
    expected = leave_one_out(saved.model, saved.pre_processor).scores
    assert len(expected) == 2
    assert 0 < saved.post_processor.spread < 3
    threshold = product_threshold(expected, saved.post_processor.spread.item(), 0.3)
    assert saved.post_processor.image_threshold.item() == pytest.approx(threshold, abs=1e-5)


def test_two_spreads_are_learned_where_neighborhoods_are_judged(
    trained_default: Path, products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With them, and of single patches alone, which is that of products whose neighborhoods are not judged."""
    data = cross_category(products)
    data.val_ratio = 0.4
    learned = []
    for fewest in (2, 3):  # photos from which neighborhoods are judged; each category has two references here
        monkeypatch.setattr("anomalib_resad.enrollment.neighborhoods.FEWEST_PHOTOS", fewest)
        model = ResAD(checkpoint=trained_default, k_shot=2, rotations=1, visualizer=False)
        model.post_processor.keep_statistics = False
        quiet_engine(tmp_path).validate(model, datamodule=data, verbose=False)
        learned.append([model.post_processor.spread_of(neighborhoods) for neighborhoods in (True, False)])
    (judged, by_patches), without = learned
    assert without == pytest.approx([by_patches, by_patches], abs=1e-6)
    assert abs(judged - by_patches) > 0.01


def test_distance_without_any_training_gets_labels(products: Path, tmp_path: Path) -> None:
    """Nothing was learned on a source: the scatter is the references' own, and scores are relative to the threshold."""
    model = ResAD(**DISTANCE | {"k_shot": 6}, false_alarm_rate=0.1, visualizer=False)
    data = product(products, "tiles")
    batches = quiet_engine(tmp_path).predict(model, datamodule=data, return_predictions=True)
    scores = leave_one_out(model.model, model.pre_processor).scores
    assert model.post_processor.image_threshold.item() == pytest.approx(product_threshold(scores, math.nan, 0.1))
    for batch in batches:
        assert batch.pred_label.tolist() == (batch.pred_score > 0.5).tolist()
        assert ((batch.pred_score > 0) & (batch.pred_score < 1)).all()


def test_thresholds_of_a_flow_are_not_those_of_distances(trained: Path) -> None:
    assert not ResAD(checkpoint=trained, estimator="distance").post_processor.has_statistics


def test_earlier_checkpoints_have_no_spread(trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained, weights_only=True)
    for name in ("product_threshold", "map_offset", "spread", "patch_spread"):
        del content["state_dict"][f"post_processor.{name}"]
    rewrite(content, tmp_path / "earlier.ckpt")
    for model in (ResAD.load_from_checkpoint(tmp_path / "earlier.ckpt"), ResAD(checkpoint=tmp_path / "earlier.ckpt")):
        assert model.post_processor.has_statistics
        assert torch.isnan(model.post_processor.spread)
        model.post_processor.calibrate(OwnScores((1.0, 1.1, 1.3, 1.2), 0.2), 0.3, neighborhoods=False)
        assert model.post_processor.image_threshold.item() == pytest.approx(
            product_threshold([1.0, 1.1, 1.3, 1.2], math.nan, 0.3)
        )


# -- beside exports ---------------------------------------------------------------------------------------------------


def test_thresholds_survive_the_file(tmp_path: Path) -> None:
    thresholds = Thresholds(1.0, math.nan, (0.5, 2.0), (math.nan, math.nan), math.nan, 0.1, (1.0, 1.1))
    thresholds.write(tmp_path / "model.thresholds.json")
    assert "NaN" not in (tmp_path / "model.thresholds.json").read_text(), "that would be no JSON"
    assert repr(Thresholds.read(tmp_path / "model.thresholds.json")) == repr(thresholds)


def test_the_thresholds_file_is_of_the_estimator_that_is_exported(
    trained: Path, products: Path, tmp_path: Path
) -> None:
    """Not of the one whose checkpoint was calibrated before."""
    _, checkpoint = enroll(trained, products, tmp_path, k_shot=4, false_alarm_rate=0.2)
    model = ResAD(checkpoint=checkpoint, estimator="distance").eval()
    write_thresholds(tmp_path / "model.onnx", model.model, model.pre_processor, model.post_processor)
    thresholds = Thresholds.read(tmp_path / "model.thresholds.json")
    assert thresholds.leave_one_out == pytest.approx(leave_one_out(model.model, model.pre_processor).scores)
    flow = ResAD(checkpoint=checkpoint).eval()
    others = leave_one_out(flow.model, flow.pre_processor).scores
    assert all(abs(one - other) > 1e-3 for one, other in zip(thresholds.leave_one_out, others, strict=True))


def test_a_bank_that_was_filled_by_hand_has_thresholds_too(trained: Path, tmp_path: Path, images: torch.Tensor) -> None:
    model = ResAD(checkpoint=trained).eval()
    model.model.bank.fill(model.model.encode(images))
    write_thresholds(tmp_path / "model.onnx", model.model, model.pre_processor, model.post_processor)
    assert len(Thresholds.read(tmp_path / "model.thresholds.json").leave_one_out) == 3
