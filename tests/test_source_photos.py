# SPDX-License-Identifier: Apache-2.0

"""Awkward photos among those that are trained on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from PIL import Image

from anomalib_resad import CrossCategory, ResAD
from anomalib_resad.enrollment.photos import PhotoError, read_pixels
from tests.conftest import DEFAULT, quiet_engine
from tests.photo_cases import photo, source


def fit(folder: Path, data: CrossCategory, **arguments: Any) -> ResAD:
    model = ResAD(**DEFAULT, visualizer=False, **arguments)
    quiet_engine(folder, max_epochs=1).fit(model, datamodule=data)
    return model


@pytest.mark.parametrize(
    ("orientation", "size", "fits"), [(6, (96, 64), True), (6, (64, 96), False), (3, (96, 64), False)]
)
def test_masks_of_photos_that_are_shown_turned(
    tmp_path: Path, orientation: int, size: tuple[int, int], fits: bool
) -> None:
    """A mask fits the pixels as they are stored; where its size does not tell, the photo is refused."""
    exif = Image.Exif()
    exif[274] = orientation
    photos = source(tmp_path / "p", lambda _: None)
    for name in ("test/hole/0.png", "ground_truth/hole/0_mask.png"):
        path = tmp_path / "p/two" / name
        path.parent.mkdir(parents=True)
        if "mask" in name:
            mask = np.zeros(size[::-1], np.uint8)
            mask[10:20, 10:20] = 255
            Image.fromarray(mask).save(path)
        else:
            Image.fromarray(photo(0, 96, 64)).save(path, exif=exif)
    if fits:
        fit(tmp_path, photos)
    else:
        with pytest.raises(PhotoError, match=r"0\.png: .*orientation.*; save it turned"):
            fit(tmp_path, photos)


@pytest.mark.parametrize("cache_gb", [1.0, 0.0])
def test_a_truncated_source_photo_is_named_before_the_first_epoch(
    tmp_path: Path, cache_gb: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ResAD, "training_step", lambda *_: pytest.fail("a step was taken"))
    data = source(tmp_path, lambda path: path.write_bytes(path.read_bytes()[:900]))
    with pytest.raises(PhotoError, match=r"3\.png: unreadable"):
        fit(tmp_path, data, cache_gb=cache_gb)


def test_unusable_source_photos_are_refused_before_training(cases: Path, tmp_path: Path) -> None:
    for number, (name, message) in enumerate(
        {
            "bit_depth/gray12.png": "does not say how many",
            "pages/two_pages.tif": "2 pages",
            "sizes/thread.png": "50 times as long",
        }.items()
    ):
        content = (cases / name).read_bytes()
        data = source(tmp_path / str(number), lambda path, content=content: path.write_bytes(content))  # type: ignore[misc]
        with pytest.raises(PhotoError, match=message):
            fit(tmp_path, data)


def test_deep_source_photos_are_trained_on_as_their_copies(cases: Path, tmp_path: Path) -> None:
    deep = (cases / "bit_depth/gray12.png").read_bytes()
    copy = Image.fromarray(read_pixels(cases / "bit_depth/gray12.png", 12))
    weights = []
    for name, change in (("deep", lambda path: path.write_bytes(deep)), ("plain", copy.save)):
        seed_everything(0)
        model = fit(tmp_path, source(tmp_path / name / "products", change), bit_depth=12)
        weights.append(torch.cat([each.flatten() for each in model.model.estimator.parameters()]))
    assert torch.equal(*weights)
