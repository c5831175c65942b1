# SPDX-License-Identifier: Apache-2.0

import math

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.metrics import AUROC
from anomalib.post_processing import PostProcessor
from sklearn.metrics import roc_auc_score
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_resad.deploy.bundle import Scale
from anomalib_resad.enrollment.thresholds import Thresholds, denormalize, normalize, product_map_threshold
from anomalib_resad.post_processor import RankKeepingPostProcessor
from anomalib_resad.pre_processor import AntialiasedResize, ExactPreProcessor


@pytest.mark.parametrize("size", [(64, 64), (320, 240), (31, 500), (1, 9), (1024, 768)])
def test_resize_is_the_one_of_evaluation(size: tuple[int, int]) -> None:
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = interpolate(image, size=(64, 48), mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(AntialiasedResize((64, 48))(image), expected, rtol=0, atol=5e-6)


def test_resize_to_the_same_size_is_left_out_where_the_size_is_known() -> None:
    resize, photo = AntialiasedResize((8, 6)), torch.rand(2, 3, 8, 6)
    assert resize(photo) is photo
    known = torch.export.export(resize, (photo,))
    assert not [node for node in known.graph.nodes if node.op == "call_function"]
    sides = {2: torch.export.Dim("height", min=1, max=99), 3: torch.export.Dim("width", min=1, max=99)}
    unknown = torch.export.export(resize, (photo,), dynamic_shapes=(sides,)).module()
    larger = torch.rand(2, 3, 20, 9)
    torch.testing.assert_close(unknown(photo), photo, rtol=0, atol=1e-6)
    torch.testing.assert_close(unknown(larger), resize(larger))


def test_export_keeps_antialiasing_after_a_restore() -> None:
    """anomalib switches antialiasing off in exports; a photo larger than the input is then another image."""
    transform = Compose([Resize((32, 32), antialias=True), Normalize([0.5] * 3, [0.2] * 3)])
    restored = ExactPreProcessor()
    restored.load_checkpoint_config(ExactPreProcessor(transform).checkpoint_config())
    photo = torch.rand(1, 3, 200, 150)
    assert restored.transform is not None
    torch.testing.assert_close(ExactPreProcessor(transform)(photo), transform(photo), rtol=0, atol=1e-5)  # and before
    torch.testing.assert_close(restored(photo), restored.transform(photo), rtol=0, atol=2e-5)


def with_statistics(post_processor: PostProcessor) -> PostProcessor:
    for name, value in (
        ("_image_threshold", 1.0),
        ("_pixel_threshold", 1.0),
        ("image_min", 0.5),
        ("image_max", 1.5),
        ("pixel_min", 0.5),
        ("pixel_max", 1.5),
    ):
        getattr(post_processor, name).fill_(value)
    return post_processor


def test_ranking_is_kept_far_beyond_the_range() -> None:
    scores = torch.tensor([-50.0, -3.0, 0.9, 1.0, 1.1, 3.0, 30.0, 400.0])
    batch = InferenceBatch(pred_score=scores, anomaly_map=scores.view(-1, 1, 1, 1))
    ours = with_statistics(RankKeepingPostProcessor())(batch)
    assert (ours.pred_score.diff() > 0).all()
    assert ours.pred_score[3] == 0.5
    assert ours.pred_label.tolist() == (scores > 1).tolist()
    assert ((ours.pred_score > 0) & (ours.pred_score < 1)).all()
    theirs = with_statistics(PostProcessor())(batch)
    assert (theirs.pred_score.diff() == 0).any(), "anomalib clamps; if it no longer does, ours can go"


@pytest.mark.parametrize("threshold", [0.4, math.nan])
@pytest.mark.parametrize(("low", "high"), [(0.1, 1.3), (math.nan, math.nan), (0.7, 0.7)])
def test_one_normalization_for_all(threshold: float, low: float, high: float) -> None:
    """PyTorch, the edge, and the file beside an export, also where threshold or range is unknown or the range empty."""
    raw = torch.tensor([-3.0, 0.4, 0.7, 0.9, 20.0])
    ours = RankKeepingPostProcessor._normalize(raw, *(torch.tensor(value) for value in (low, high, threshold)))
    assert ours is not None
    assert (ours.diff() > 0).all()
    scale = Scale(*(None if math.isnan(value) else value for value in (threshold, low, high)))
    np.testing.assert_allclose(normalize(raw.numpy(), *scale.numbers), ours, rtol=1e-6)
    beside = Thresholds(threshold, math.nan, (low, high), (math.nan, math.nan), math.nan, math.nan, ())
    np.testing.assert_allclose([beside.at_raw(value) for value in raw.tolist()], ours, rtol=1e-6)
    np.testing.assert_allclose([denormalize(value, *scale.numbers) for value in ours.tolist()], raw, rtol=1e-4)
    center = 0.4 if threshold == 0.4 else {1.3: 0.7, 0.7: 0.7}.get(high, 0.0)
    width = {1.3: 1.2, 0.7: 1.0}.get(high, 2.0)
    u = 2 * (0.9 - center) / width
    assert ours[3].item() == pytest.approx(0.5 + u / (2 * (1 + abs(u))), abs=1e-6)


@pytest.mark.parametrize(
    ("own", "source", "offset", "expected"),
    [
        (math.nan, 1.0, math.nan, 2.0),
        (math.nan, 1.0, 0.25, 2.0),
        (1.5, 1.0, math.nan, 2.5),
        (1.5, math.nan, math.nan, 1.5),
        (1.5, 1.0, 0.25, 1.25),
        (1.5, math.nan, 0.25, 1.25),
    ],
)
def test_threshold_of_maps_follows_that_of_scores(own: float, source: float, offset: float, expected: float) -> None:
    of_maps = 2.0 if source == 1.0 else math.nan
    assert product_map_threshold(of_maps, source, own, offset) == expected
    post_processor = RankKeepingPostProcessor()
    for name, value in (
        ("_image_threshold", source),
        ("_pixel_threshold", of_maps),
        ("product_threshold", own),
        ("map_offset", offset),
    ):
        getattr(post_processor, name).fill_(value)
    assert post_processor.pixel_threshold.item() == expected


def test_metrics_do_not_depend_on_the_batches() -> None:
    """torchmetrics passes those batches through a sigmoid that hold a raw score beyond 0..1."""
    scores = torch.linspace(0.2, 1.6, 40)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    labels = scores > 0.9
    values = {}
    for kind, post_processor in (("raw", None), ("ours", RankKeepingPostProcessor())):
        metric = AUROC(fields=["pred_score", "gt_label"])
        for part in range(0, 40, 4):
            batch = ImageBatch(
                image=torch.zeros(4, 3, 8, 8), pred_score=scores[part : part + 4], gt_label=labels[part : part + 4]
            )
            if post_processor is not None:
                post_processor.normalize_batch(batch)
            metric.update(batch)
        values[kind] = metric.compute().item()
    assert values["ours"] == roc_auc_score(labels, scores) == 1
    assert values["raw"] < 1, "torchmetrics was mended; raw scores can be used"


def test_statistics_are_kept_when_there_is_nothing_to_train() -> None:
    post_processor = with_statistics(RankKeepingPostProcessor())
    assert isinstance(post_processor, RankKeepingPostProcessor)
    batch = ImageBatch(
        image=torch.zeros(2, 3, 8, 8), pred_score=torch.tensor([7.0, 9.0]), gt_label=torch.tensor([False, True])
    )
    for keep, expected in ((True, 1.0), (False, 9.0)):
        post_processor.keep_statistics = keep
        post_processor.on_validation_batch_end(None, None, batch)
        post_processor.on_validation_epoch_end(None, None)
        assert post_processor.image_threshold.item() == expected
