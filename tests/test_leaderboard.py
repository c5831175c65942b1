# SPDX-License-Identifier: Apache-2.0

"""The measuring instrument: figures against other libraries, the same photos for all."""

import json
import time
from pathlib import Path
from urllib.error import URLError

import pytest
import timm
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPRO, F1Max
from anomalib.models import Patchcore
from sklearn.metrics import average_precision_score, roc_auc_score
from torchvision import tv_tensors

from anomalib_resad import ProductFolder
from benchmarks.cells import Cell, append_cell, read_cells
from benchmarks.measure import PeakMemory, latency, quality, ranking_quality
from benchmarks.methods import Backbone, Method, build, reason
from benchmarks.perturbations import perturbation
from benchmarks.products import make_product
from benchmarks.settings import keep_settings
from benchmarks.target import target_data

# -- figures ----------------------------------------------------------------------------------------------------------


def test_ranking_quality_agrees_with_scikit_learn_and_anomalib() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(400, generator=generator) < 0.3
    scores = torch.rand(400, generator=generator) + 0.4 * labels
    auroc, precision, f1 = ranking_quality(scores, labels)
    assert auroc == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert precision == pytest.approx(average_precision_score(labels, scores), abs=1e-6)
    metric = F1Max(fields=["pred_score", "gt_label"])
    metric.update(ImageBatch(image=torch.zeros(400, 3, 1, 1), pred_score=scores / 2, gt_label=labels))
    assert f1 == pytest.approx(float(metric.compute()), abs=1e-6)


def test_large_raw_scores_keep_their_ranking() -> None:
    """A sigmoid in single precision makes 30 and 40 equal; torchmetrics would pass these scores through one."""
    scores = torch.tensor([30.0, 35.0, 40.0, 45.0])
    labels = torch.tensor([0, 0, 1, 1])
    assert ranking_quality(scores, labels)[0] == 1.0
    assert ranking_quality(scores * 1e4, labels)[0] == 1.0
    assert ranking_quality(-scores, labels)[0] == 0.0


def predictions(batch_size: int, scale: float = 1.0) -> list[ImageBatch]:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(6, 1, 32, 32, dtype=torch.bool)
    masks[3:, :, 8:16, 8:20] = True
    maps = torch.rand(6, 1, 32, 32, generator=generator) + 0.5 * masks
    whole = [maps * scale, masks, maps.flatten(1).amax(1) * scale, masks.flatten(1).any(1), torch.zeros(6, 3, 32, 32)]
    return [
        ImageBatch(anomaly_map=m, gt_mask=mask[:, 0], pred_score=score, gt_label=label, image=image)
        for m, mask, score, label, image in zip(*(part.split(batch_size) for part in whole), strict=True)
    ]


def test_quality_depends_neither_on_batches_nor_on_the_scale_of_scores() -> None:
    expected = quality(predictions(6))
    assert all(0 < value <= 1 for value in expected.values())
    for other in (predictions(1), predictions(4), predictions(4, scale=1e3)):
        assert quality(other) == pytest.approx(expected, abs=1e-6)
    aupro = AUPRO(fields=["anomaly_map", "gt_mask"])
    (batch,) = predictions(6, scale=0.5)
    aupro.update(batch)
    assert expected["AUPRO"] == pytest.approx(float(aupro.compute()), abs=1e-4)


def test_quality_without_masks_leaves_pixel_figures_out() -> None:
    batches = predictions(3)
    for batch in batches:
        batch.gt_mask = None
    figures = quality(batches)
    assert figures["pixel_AUROC"] is None
    assert figures["AUPRO"] is None
    assert figures["image_AUROC"] > 0.5


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 3 scores are not finite"):
        ranking_quality(torch.tensor([0.1, float("nan"), 0.3]), torch.tensor([0, 1, 1]))
    assert ranking_quality(torch.rand(4), torch.ones(4)) == (None, None, None)


def test_latency_is_the_methods_and_the_backbones() -> None:
    method_ms, backbone_ms = latency(
        lambda _: time.sleep(0.02), lambda _: time.sleep(0.005), torch.zeros(1, 3, 8, 8), 3
    )
    assert 19 < method_ms < 60
    assert 4 < backbone_ms < 19


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_memory_sees_what_is_freed_again() -> None:
    with PeakMemory() as memory:
        torch.ones(16_000_000).sum()
    assert memory.bytes is not None
    assert 60e6 < memory.bytes < 200e6


# -- cells ------------------------------------------------------------------------------------------------------------


def test_cells_survive_a_kill_and_a_second_measurement(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    assert read_cells(path) == []
    first, second = Cell("a", "data", "tiles", 4, 0), Cell("b", "data", "tiles", 4, 0)
    append_cell(path, first, {"status": "failed"})
    with path.open("a") as file:
        file.write('{"method": "b", "dataset": "da')
    assert [row["method"] for row in read_cells(path)] == ["a"]
    append_cell(path, second, {"status": "ok"})
    append_cell(path, first, {"status": "ok"})
    assert [(row["method"], row["status"]) for row in read_cells(path)] == [("a", "ok"), ("b", "ok")]


def test_other_settings_are_refused_and_more_cells_are_not(tmp_path: Path) -> None:
    settings = {"methods": {"a": {"class_path": "x"}}, "shots": [1], "backbone": "resnet18", "pre_trained": False}
    keep_settings(tmp_path, settings, None)
    more = settings | {"shots": [1, 2], "methods": settings["methods"] | {"b": {"class_path": "y"}}}
    keep_settings(tmp_path, more, None)
    assert list(json.loads((tmp_path / "settings.json").read_text())["methods"]) == ["a", "b"]
    with pytest.raises(ValueError, match=r"backbone='resnet18'.*another output folder"):
        keep_settings(tmp_path, settings | {"backbone": "resnet34"}, None)
    with pytest.raises(ValueError, match=r"methods\.a"):
        keep_settings(tmp_path, settings | {"methods": {"a": {"class_path": "z"}}}, None)
    with pytest.raises(ValueError, match=r"baseline='c' must be among the methods: \['a', 'b'\]"):
        keep_settings(tmp_path, settings | {"baseline": "c"}, None)
    keep_settings(tmp_path, settings | {"baseline": "b"}, None)


def test_settings_that_cannot_be_written_leave_no_part_behind(tmp_path: Path) -> None:
    (tmp_path / "settings.json").mkdir()
    with pytest.raises(OSError, match=r"settings\.json"):
        keep_settings(tmp_path, {"methods": {}, "pre_trained": False}, None)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


# -- methods and photos -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(timm.create_model("resnet18", pretrained=False).state_dict(), path)
    return path


def test_methods_share_the_backbone_and_its_weights(weights: Path) -> None:
    backbone = Backbone("resnet18", weights, pre_trained=True, image_size=(64, 64))
    patchcore = build(Method("anomalib.models.Patchcore"), backbone, k_shot=4)
    assert isinstance(patchcore, Patchcore)
    resad = build(Method("anomalib_resad.ResAD", {"estimator": "distance"}), backbone, k_shot=3)
    assert resad.hparams["k_shot"] == 3
    images = torch.rand(2, 3, 64, 64)
    (_, layer2, layer3), theirs = resad.model.encoder.backbone(images), patchcore.model.feature_extractor.eval()(images)
    torch.testing.assert_close(theirs["layer2"], layer2)
    torch.testing.assert_close(theirs["layer3"], layer3)
    assert patchcore.pre_processor.transform.transforms[0].size == [64, 64]


def test_weights_of_another_backbone_are_refused(weights: Path) -> None:
    with pytest.raises(ValueError, match="does not fit backbone 'resnet34'"):
        build(Method("anomalib.models.Patchcore"), Backbone("resnet34", weights, True, (64, 64)))
    for wrong in ("anomalib.models.Nothing", "pathlib.Path", "no_such_package.Model"):
        with pytest.raises(ValueError, match=wrong):
            Method(wrong).model_class  # noqa: B018


def test_missing_weights_are_called_so() -> None:
    error = RuntimeError("cannot load")
    error.__cause__ = URLError("no network")
    assert reason(error) == "weights not available (RuntimeError: cannot load)"
    assert reason(ImportError("no open_clip")) == "package not installed (ImportError: no open_clip)"
    assert reason(ValueError("two\nlines")) == "ValueError: two lines"


def test_every_method_gets_the_drawn_photos_and_nothing_else(products: Path) -> None:
    template = ProductFolder(products, "tiles", num_workers=0)
    cell = Cell("a", "tiles", "tiles", 2, 0)
    data = target_data(template, cell)
    again = target_data(template, Cell("b", "tiles", "tiles", 2, 0))
    assert len(data.train_data) == 2
    assert list(data.train_data.samples.image_path) == list(again.train_data.samples.image_path)
    drawn = {
        tuple(target_data(template, Cell("a", "t", "t", 2, draw)).train_data.samples.image_path) for draw in range(4)
    }
    assert len(drawn) > 1
    data.setup("fit")
    assert len(data.train_data) == 2, "the engine's own setup must not bring the other photos back"
    with pytest.raises(ValueError, match="k_shot=99"):
        target_data(template, Cell("a", "tiles", "tiles", 99, 0))


def test_an_unusable_photo_is_no_reference_of_any_method(tmp_path: Path) -> None:
    photo = make_product(tmp_path, "tiles", train=2, good=1, defective=1, size=64) / "train" / "good" / "001.png"
    photo.write_bytes(photo.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"1 of the reference photos cannot be used.*001\.png"):
        target_data(ProductFolder(tmp_path, "tiles", num_workers=0), Cell("Patchcore", "tiles", "tiles", 2, 0))


def test_a_bad_reference_is_a_defective_photo_that_leaves_the_test(products: Path) -> None:
    template = ProductFolder(products, "tiles", num_workers=0)
    clean = target_data(template, Cell("a", "tiles", "tiles", 3, 0))
    bad = target_data(template, Cell("a", "tiles", "tiles", 3, 0, "bad_reference", 1))
    folders = sorted(Path(path).parent.name for path in bad.train_data.samples.image_path)
    assert len(folders) == 3
    assert folders.count("good") == 2
    assert len(bad.test_data) == len(clean.test_data) - 1
    assert not set(bad.train_data.samples.image_path) & set(bad.test_data.samples.image_path)
    assert bad.train_data[0].image.shape == clean.train_data[0].image.shape


# -- conditions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "level"), [("noise", 0.1), ("blur", 1.0), ("brightness", 0.7), ("jpeg", 20), ("rotation", 5)]
)
def test_conditions_change_the_photo_and_not_its_frame(condition: str, level: float) -> None:
    torch.manual_seed(0)
    image = tv_tensors.Image(torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8), (60, 40), mode="bilinear")[0])
    mask = tv_tensors.Mask(torch.zeros(60, 40, dtype=torch.uint8))
    changed, kept = perturbation(condition, level)(image, mask)
    assert changed.shape == image.shape
    assert changed.dtype == image.dtype
    assert 0.001 < (changed - image).abs().mean() < 0.3
    assert kept.shape == mask.shape


def test_rotation_rotates_the_mask_with_the_photo() -> None:
    mask = tv_tensors.Mask(torch.zeros(80, 80, dtype=torch.uint8))
    mask[10:20, 55:70] = 1
    image = tv_tensors.Image(mask.float().expand(3, 80, 80).clone())
    rotated, rotated_mask = perturbation("rotation", 10)(image, mask)
    assert set(rotated_mask.unique().tolist()) == {0, 1}
    assert ((rotated[0] > 0.5) != (rotated_mask > 0)).float().mean() < 0.01
    assert not torch.equal(rotated_mask, mask)


def test_unknown_conditions_are_refused() -> None:
    with pytest.raises(ValueError, match="'fog' is not known"):
        perturbation("fog", 1)
