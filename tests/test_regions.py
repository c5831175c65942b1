# SPDX-License-Identifier: Apache-2.0

"""Regions of a map: where they are, how large, and what is none."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anomalib_resad import cli
from anomalib_resad.deploy import Prediction, ResADInferencer, find_regions
from anomalib_resad.deploy.pictures import BOX, overlay
from anomalib_resad.deploy.regions import MOST, bounded

SIDES = st.integers(8, 40)


def painted(height: int, width: int, *blobs: tuple[int, int, int, int, float]) -> np.ndarray:
    """A map of 0.1 with rectangles: left, top, width, height, value."""
    values = np.full((height, width), 0.1, np.float32)
    for left, top, wide, high, value in blobs:
        values[top : top + high, left : left + wide] = value
    return values


@settings(max_examples=50, deadline=None)
@given(SIDES, SIDES, st.data())
def test_a_painted_blob_gives_its_box(height: int, width: int, data: st.DataObject) -> None:
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    wide, high = data.draw(st.integers(1, width - left)), data.draw(st.integers(1, height - top))
    (found,) = find_regions(painted(height, width, (left, top, wide, high, 0.75)), (height, width))
    assert (found.x, found.y, found.width, found.height) == (left, top, wide, high)
    assert found.area == wide * high
    assert found.peak == found.mean == 0.75
    assert (found.center_x, found.center_y) == pytest.approx((left + (wide - 1) / 2, top + (high - 1) / 2))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), SIDES, SIDES)
def test_mirrored_maps_give_mirrored_regions(seed: int, height: int, width: int) -> None:
    values = np.random.default_rng(seed).random((height, width), dtype=np.float32) ** 3
    found = find_regions(values, values.shape, most=1 << 20)
    mirrored = find_regions(values[:, ::-1], values.shape, most=1 << 20)
    turned = find_regions(values.T, values.T.shape, most=1 << 20)
    seen = sorted((each.x, each.y, each.width, each.height, each.area, each.peak) for each in found)
    assert seen == sorted((width - r.x - r.width, r.y, r.width, r.height, r.area, r.peak) for r in mirrored)
    assert seen == sorted((r.y, r.x, r.height, r.width, r.area, r.peak) for r in turned)
    assert sum(each.area for each in found) <= (values > 0.45).sum()
    assert all(each.peak > 0.5 for each in found)
    assert {each.peak for each in found} <= set(values[values > 0.5].tolist())


@settings(max_examples=50, deadline=None)
@given(st.integers(60, 400), st.integers(60, 400))
def test_coordinates_are_those_of_the_photo(height: int, width: int) -> None:
    """Each axis by its own scale, as the photo was squeezed: a blob in the middle half is there in the photo."""
    (found,) = find_regions(painted(32, 32, (8, 8, 16, 16, 0.9)), (height, width))
    scale = max(width, height) / 32
    assert abs(found.x - width / 4) <= scale
    assert abs(found.x + found.width - 3 * width / 4) <= scale
    assert abs(found.y - height / 4) <= scale
    assert abs(found.y + found.height - 3 * height / 4) <= scale
    assert (found.center_x, found.center_y) == pytest.approx(((width - 1) / 2, (height - 1) / 2), abs=0.6)
    assert 0.2 < found.area / (width * height) < 0.32


def test_hysteresis() -> None:
    """A region grows around what is above the threshold, and joins two peaks; without a peak it is none."""
    values = painted(20, 40, (2, 2, 10, 4, 0.47), (3, 3, 2, 2, 0.8), (9, 3, 2, 2, 0.6), (20, 10, 6, 6, 0.49))
    (found,) = find_regions(values, values.shape)
    assert (found.x, found.y, found.width, found.height, found.area) == (2, 2, 10, 4, 40)
    assert found.mean == pytest.approx((32 * 0.47 + 4 * 0.8 + 4 * 0.6) / 40)
    assert len(find_regions(values, values.shape, grown=0.5)) == 2
    touching = painted(9, 9, (1, 1, 2, 2, 0.8), (3, 3, 2, 2, 0.8))
    assert len(find_regions(touching, touching.shape)) == 1, "across a corner"


def test_none_one_pixel_and_all() -> None:
    assert find_regions(painted(9, 9), (90, 90)) == ()
    assert find_regions(np.full((9, 9), 0.5, np.float32), (9, 9)) == (), "at the threshold it is good"
    (one,) = find_regions(painted(9, 9, (4, 5, 1, 1, 0.9)), (9, 9))
    assert (one.x, one.y, one.width, one.height, one.area) == (4, 5, 1, 1, 1)
    (whole,) = find_regions(np.ones((9, 9), np.float32), (37, 91))
    assert (whole.x, whole.y, whole.width, whole.height, whole.area) == (0, 0, 91, 37, 91 * 37)


def test_small_ones_are_left_out_and_the_loudest_come_first() -> None:
    values = painted(20, 40, (1, 1, 4, 4, 0.6), (10, 1, 2, 2, 0.9), (20, 1, 3, 3, 0.9), (30, 1, 5, 5, 0.7))
    assert [each.area for each in find_regions(values, values.shape)] == [9, 4, 25, 16]
    assert [each.area for each in find_regions(values, values.shape, min_area=9)] == [9, 25, 16]
    assert [each.area for each in find_regions(values, values.shape, most=2)] == [9, 4]
    dots = np.zeros((64, 64), np.float32)
    dots[::2, ::2] = 1
    assert len(find_regions(dots, dots.shape)) == MOST


def test_huge_photos_are_bounded() -> None:
    """The map of a photo of 48 million pixels is looked at with 16 million; coordinates are of the photo."""
    height, width = bounded((6000, 8000))
    assert 15_900_000 < height * width <= 16_000_000
    (found,) = find_regions(painted(64, 64, (16, 16, 32, 32, 0.9)), (6000, 8000))
    assert abs(found.x - 2000) <= 125
    assert abs(found.y + found.height - 4500) <= 94
    assert abs(found.area - 12_000_000) < 1_500_000


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_map_is_refused(value: float) -> None:
    values = painted(9, 9)
    values[3, 3] = value
    with pytest.raises(ValueError, match="without NaN"):
        find_regions(values, (9, 9))
    for shape in ((0, 9), (1, 9, 9)):
        with pytest.raises(ValueError, match=r"has to be \(H, W\)"):
            find_regions(np.zeros(shape, np.float32), (9, 9))


def test_impossible_numbers_are_refused() -> None:
    values = painted(9, 9)
    for wrong in ({"min_area": -1}, {"min_area": True}, {"seed": 0.4}, {"grown": -0.1}, {"most": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            find_regions(values, (9, 9), **wrong)
    with pytest.raises(ValueError, match="height and width"):
        find_regions(values, (0, 9))


def test_without_opencv_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert find_regions(painted(9, 9), (9, 9)) == ()
    with pytest.raises(ModuleNotFoundError, match="pip install opencv-python-headless"):
        find_regions(painted(9, 9, (1, 1, 2, 2, 0.9)), (9, 9))


def test_a_prediction_knows_its_photo() -> None:
    found = Prediction(0.7, True, painted(16, 16, (4, 4, 8, 8, 0.9)), 1.5, (60, 120))
    assert found.photo_map.shape == (60, 120)
    assert found.regions is not None
    assert found.regions == find_regions(found.map, (60, 120))
    assert replace(found, min_area=60 * 120).regions == ()
    assert replace(found, label=None).regions is None, "without a threshold nothing is above it"
    assert replace(found, label=False).regions == (), "a photo that counts as good has none"
    (region,) = found.regions
    for scale in (1, 2):  # also in a smaller picture
        picture = np.asarray(found.picture(np.zeros((60 // scale, 120 // scale, 3), np.uint8)))
        rows, columns = np.nonzero((picture == BOX).all(axis=2))
        assert abs(columns.min() - (region.x / scale - 1)) <= 1
        assert abs(columns.max() - (region.x + region.width) / scale) <= 1
        assert abs(rows.min() - (region.y / scale - 1)) <= 1
        assert abs(rows.max() - (region.y + region.height) / scale) <= 1


def test_sizes_are_those_of_the_files(inferencer: ResADInferencer, good: list[Path], tmp_path: Path) -> None:
    """Also of photos that are made smaller when they are read."""
    inferencer.enroll("regions", good[:1], rotations=1)
    Image.open(good[1]).resize((6000, 3000)).save(tmp_path / "large.jpg")
    found, pixels = inferencer.inspect(tmp_path / "large.jpg", "regions")
    assert found.size == (3000, 6000)
    assert pixels.shape == (1500, 3000, 3)
    assert inferencer.predict((tmp_path / "large.jpg").read_bytes(), "regions").size == (3000, 6000)
    assert next(inferencer.predict_batch([np.zeros((30, 50, 3), np.uint8)], "regions")).size == (30, 50)
    assert inferencer.predict(Image.new("L", (50, 30)), "regions").size == (30, 50)


def test_a_product_has_a_minimum_area(inferencer: ResADInferencer, good: list[Path]) -> None:
    """It stays when photos are added, removed or replaced, and a bank without one is the file that it always was."""
    most = 64 * 64
    plain = inferencer.enroll("regions", good[:2], threshold=-1e6, rotations=1)
    assert "min_area" not in plain._metadata()
    assert inferencer.set_min_area("regions", most + 1).min_area == most + 1
    inferencer.add("regions", good[2:3])
    inferencer.remove("regions", good[2].name)
    inferencer.set_threshold("regions", -2e6)
    kept = inferencer.enroll("regions", good[:2], rotations=1, replace_existing=True)
    assert (kept.min_area, kept.threshold) == (most + 1, -2e6)
    found = ResADInferencer(inferencer.bundle, banks=inferencer.banks).predict(good[3], "regions")
    assert found.label
    assert found.regions == (), "as the file of the bank says"
    for least, count in ((most, 1), (most + 1, 0)):
        inferencer.enroll("regions", good[:2], rotations=1, replace_existing=True, min_area=least)
        assert [len(each.regions or ()) for each in inferencer.predict_batch(good[3:5], "regions")] == [count] * 2
    assert inferencer.set_min_area("regions", 0).checksum == replace(plain, threshold=-2e6).checksum
    with pytest.raises(ValueError, match="not enrolled"):
        inferencer.set_min_area("others", 1)
    for change in (
        inferencer.set_min_area,
        lambda name, least: inferencer.enroll(f"{name} 2", good[:1], min_area=least),
    ):
        with pytest.raises(ValueError, match="min_area=-3"):
            change("regions", -3)


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_the_command_writes_regions(bundle: Path, good: list[Path], new: list[Path], tmp_path: Path) -> None:
    inferencer = ResADInferencer(bundle, banks=tmp_path / "banks")
    inferencer.enroll("tiles", good[:2], threshold=-1e6, rotations=1)  # everything lies above it
    photos, output = tmp_path / "photos", tmp_path / "found"
    photos.mkdir()
    shutil.copy(new[0], photos / "=a.png")
    Image.new("RGB", (4, 4)).save(photos / "b.png")  # too small
    with pytest.raises(SystemExit):
        cli.predict(bundle, "tiles", photos, output, tmp_path / "banks")
    whole, failed = lines(output)
    assert whole["photo"] == "=a.png", "as the file is called"
    assert whole["size"] == {"width": 64, "height": 64}
    (region,) = whole["regions"]  # type: ignore[misc]
    assert region["area"] == 64 * 64
    assert (region["x"], region["y"], region["width"], region["height"]) == (0, 0, 64, 64)
    assert set(failed) == {"photo", "error"}
    (output / "results.jsonl").open("a").write('{"photo": "=a.png", "sco')  # a process was killed here
    with pytest.raises(SystemExit):
        cli.predict(bundle, "tiles", photos, output, tmp_path / "banks", resume=True)
    assert lines(output) == [whole, failed]
    with pytest.raises(SystemExit):
        cli.predict(bundle, "tiles", photos, output, tmp_path / "banks", resume=True, min_area=64 * 64 + 1)
    assert lines(output)[0]["regions"] == [], "the option belongs to the mark: nothing of the earlier run was kept"
    with pytest.raises(ValueError, match="min_area=-1"):
        cli.predict(bundle, "tiles", photos, output, tmp_path / "banks", min_area=-1)
    inferencer.set_min_area("tiles", 64 * 64 + 1)
    for least, count in ((None, 0), (1, 1)):
        with pytest.raises(SystemExit):
            cli.predict(bundle, "tiles", photos, output, tmp_path / "banks", min_area=least)
        assert len(lines(output)[0]["regions"]) == count, "the product's own, unless another is given"


def test_pictures_are_clear_below_the_threshold_and_red_from_it_on() -> None:
    photo = np.full((4, 5, 3), 100, dtype=np.uint8)
    maps = np.repeat(np.array([[0.0, 0.4, 0.5, 0.6, 0.9]], dtype=np.float32), 4, axis=0)
    zero, clear, threshold, above, highest = np.asarray(overlay(photo, maps))[0].astype(int)
    assert zero.tolist() == clear.tolist() == [100, 100, 100]
    assert threshold[0] > 200, "red"
    assert max(threshold[1:]) < 50
    assert highest[0] > 200
    assert threshold[1] < above[1] < highest[1], "yellow above"
    assert highest[2] < 50
