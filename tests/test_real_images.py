# SPDX-License-Identifier: Apache-2.0

"""On real images with real weights, where they are at hand: the pipeline sees defects."""

from pathlib import Path

import pytest

from anomalib_resad import ResAD
from benchmarks.measure import quality
from tests.conftest import SHARED, product, quiet_engine

WEIGHTS = SHARED / "weights" / "resnet18_tv_in1k_v1_layers1to3_bnfolded.pth"


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="no real images at hand")
@pytest.mark.parametrize(("category", "image", "pixel"), [("magnetic_tile", 0.7, 0.7), ("asphalt_tiles", 0.65, 0.85)])
def test_distance_finds_real_defects(category: str, image: float, pixel: float, tmp_path: Path) -> None:
    """Floors some ten points under what a reference implementation gave (81 / 81 and 79 / 93)."""
    settings = {"estimator": "distance", "match": "cosine", "post_processor": False, "visualizer": False}
    model = ResAD(backbone="resnet18", weights=WEIGHTS, **settings)
    data = product(SHARED / "data", category)
    figures = quality(quiet_engine(tmp_path).predict(model, datamodule=data, return_predictions=True))
    assert figures["image_AUROC"] > image
    assert figures["pixel_AUROC"] > pixel
